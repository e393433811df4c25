"""Rows for people and for programs."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.table import Table

from eval.results import Row, dump

COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
  {
    "fidelity": ("read", "selected", "kl", "kl_se", "top1", "ppl", "moved_bytes", "tail"),
    "recall": ("read", "selected", "mass", "far_mass", "topk_recall", "mass_se"),
    "needle": ("read", "selected", "score", "score_se", "moved_bytes"),
  }
)
_WHO = ("task", "T", "method", "options", "budget")


def json_lines(rows: Iterable[Row]) -> Iterable[str]:
  """One JSON object a row, without line ends."""
  return (dump(row).rstrip("\n") for row in rows)


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> Table:
  """A table of who, where and the figures.

  Args:
    columns: figures to show; by default the benchmark's own, or every figure a row holds.
  """
  if columns is None:
    benchmark = rows[0]["benchmark"] if rows else ""
    columns = COLUMNS.get(benchmark, ())
  shown = [*_WHO, *columns, "n"]
  out = Table(box=None, header_style="bold", pad_edge=False)
  for name in shown:
    out.add_column(name, justify="left" if name in ("task", "method", "options") else "right")
  last: object = None
  for row in rows:
    group = row["task"], row["T"]
    if last is not None and group != last:
      out.add_section()
    last = group
    out.add_row(*(_cell(name, row.get(name)) for name in shown))
  return out


def _cell(name: str, value: Any) -> str:
  if value is None:
    return "-"
  if name == "moved_bytes":
    return f"{value / 1e6:.2f} MB"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
