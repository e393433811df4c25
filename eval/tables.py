"""Rows for people and for programs."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from eval.results import Row, dump

COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
  {
    "fidelity": ("selected", "kl", "kl_se", "top1", "ppl", "moved_bytes", "read_bytes", "tail"),
    "recall": ("selected", "mass", "mass_se", "far_mass", "topk_recall"),
    "needle": ("selected", "score", "score_se", "moved_bytes"),
    "ruler": ("selected", "score", "score_se", "tasks", "tokens", "moved_bytes"),
    "longbench": ("selected", "score", "score_se", "moved_bytes", "read_bytes"),
    "perplexity": (
      *("bucket", "ppl", "nll", "nll_se", "nll_diff", "nll_diff_se", "kl", "top1"),
      *("selected", "read_bytes", "tail"),
    ),
    "generation": (
      *("bucket", "kl", "kl_se", "top1", "ppl", "nll_diff", "mass", "selected", "read_bytes"),
      *("tail", "agree"),
    ),
    "speed attention": (
      *("selected", "fetched", "ms", "ms_low", "ms_high", "baseline", "baseline_ms", "ratio"),
      *("score_ms", "selection_ms", "selection_share", "moved_bytes"),
      *("device_bytes", "host_bytes", "temp_bytes"),
    ),
    "speed model": (
      *("selected", "fetched", "ms", "ms_low", "ms_high", "baseline", "baseline_ms", "ratio"),
      *("tokens_per_s", "moved_bytes", "device_bytes", "host_bytes", "temp_bytes"),
    ),
  }
)

VARY = ("task", "T", "dtype", "batch")  # columns of their own where rows differ in them

HEADS: Mapping[str, str] = MappingProxyType(
  {
    "selected": "chosen",
    "kl_se": "± s.e.",
    "mass_se": "± s.e.",
    "score_se": "± s.e.",
    "nll_se": "± s.e.",
    "nll_diff_se": "± s.e.",
    "nll_diff": "less full's",
    "moved_bytes": "moved",
    "read_bytes": "bytes read",
    "topk_recall": "top-k",
    "far_mass": "far mass",
    "ms_low": "25%",
    "ms_high": "75%",
    "baseline_ms": "baseline ms",
    "score_ms": "score",
    "selection_ms": "select",
    "selection_share": "share",
    "tokens_per_s": "tokens/s",
    "device_bytes": "device",
    "host_bytes": "host",
    "temp_bytes": "temp",
  }
)


def console() -> Console:
  """Stdout; as wide as tables want where it is no terminal."""
  return Console() if sys.stdout.isatty() else Console(width=200)


def json_lines(rows: Iterable[Row]) -> Iterable[str]:
  """One JSON object a row, without line ends."""
  return (dump(row).rstrip("\n") for row in rows)


def label(row: Row, rows: Sequence[Row]) -> str:
  """The method's name, with those of its options that differ among the rows."""
  mine = [r["options"].split(":") for r in rows if r["method"] == row["method"]]
  shown = [o for o in row["options"].split(":") if any(o not in options for options in mine)]
  return ":".join([row["method"], *shown])


def budget_label(row: Row) -> str | None:
  """As a command line spells it; None for a method without one."""
  budget = row.get("budget")
  if budget is None:
    return None
  amount = f"{budget:.4g}" if isinstance(budget, float) else str(budget)
  return amount + "/kv" * (row.get("per") == "kv_head")


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> Table:
  """A table of methods and figures; task and length are columns where they vary.

  Args:
    columns: figures to show; by default the benchmark's own.
  """
  if columns is None:
    columns = columns_of(rows[0]) if rows else ()
  names = [*shown(rows, columns), "n"]
  given = [name for name in ("task", "T") if rows and rows[0].get(name) is not None]
  fixed = [f"{name} {rows[0][name]}" for name in given if name not in names]
  out = Table(
    title=", ".join(fixed), title_justify="left", box=None, header_style="bold", pad_edge=False
  )
  for name in names:
    left = name in ("task", "method", "dtype", "baseline")
    out.add_column(head(name), justify="left" if left else "right", no_wrap=True)
  last: object = None
  for row in rows:
    group = tuple(row.get(name) for name in VARY)
    if last is not None and group != last:
      out.add_section()
    last = group
    out.add_row(*cells(row, rows, names))
  return out


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
  """A table for a README: methods, budgets and figures; lengths where they vary."""
  names = shown(rows, columns)
  lines = ["| " + " | ".join(map(head, names)) + " |", "|---" * len(names) + "|"]
  for row in rows:
    lines.append("| " + " | ".join(cells(row, rows, names, mark="`")) + " |")
  return "\n".join(lines) + "\n"


def shown(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
  """What a table of some figures shows before them: what varies, and who."""
  varying = [name for name in VARY if len({row.get(name) for row in rows}) > 1]
  return [*varying, "method", "budget", *columns]


def cells(row: Row, rows: Sequence[Row], names: Sequence[str], *, mark: str = "") -> list[str]:
  """A row's figures as text.

  Args:
    rows: that it is shown beside.
    mark: put around the method's name.
  """
  method = f"{mark}{label(row, rows)}{mark}"
  named = {**row, "method": method, "budget": budget_label(row)}
  return [_cell(name, named.get(name)) for name in names]


def head(name: str) -> str:
  """A column's name; of a figure of one task, with the task."""
  figure, _, task = name.partition(" ")
  return " ".join(filter(None, (HEADS.get(figure, figure), task)))


def columns_of(row: Row) -> Sequence[str]:
  """A benchmark's figures, or those of one of its tasks."""
  benchmark = row["benchmark"]
  return COLUMNS.get(benchmark) or COLUMNS.get(f"{benchmark} {row['task']}", ())


def _cell(name: str, value: Any) -> str:
  if value is None:
    return "-"
  if name.endswith("_bytes"):
    return f"{value / 1e6:.2f} MB"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
