"""The rows of ``a2ats tune`` and ``a2ats device`` as tables."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.table import Table

from eval.results import Row


def _times(row: Row) -> str:
  return f"{row['ms']:.4g} ({row['ms_low']:.4g} to {row['ms_high']:.4g})" if "ms" in row else "-"


def _size(name: str) -> Callable[[Row], str]:
  return lambda row: "-" if row.get(name) is None else f"{row[name] / 1e6:.1f}"


def _number(name: str) -> Callable[[Row], str]:
  return lambda row: "-" if row.get(name) is None else f"{row[name]:.4g}"


def _text(name: str) -> Callable[[Row], str]:
  return lambda row: str(row.get(name) or "")


def _tiles(row: Row) -> str:
  return ", ".join(f"{name} {size}" for name, size in row["tiles"].items())


def _said(row: Row) -> str:
  return str(row.get("problem") or ("equal" if row.get("ok") else "itself"))


def _mark(row: Row) -> str:
  names = {"by_shape": "by shape", "best": "best"}
  return ", ".join(text for name, text in names.items() if row.get(name))


_COLUMNS: Mapping[str, Mapping[str, Callable[[Row], str]]] = MappingProxyType(
  {
    "copy": {
      "plain copy": _text("copy"),
      "MB": _size("bytes"),
      "ms (quartiles)": _times,
      "GB/s": _number("gb_per_s"),
    },
    "kernel": {
      "op": _text("op"),
      "case": _text("note"),
      "implementation": _text("implementation"),
      "against the reference": _said,
      "ms (quartiles)": _times,
      "GB/s": _number("gb_per_s"),
      "of a copy": _number("share"),
      "which copy": _text("of"),
    },
    "step": {
      "method": _text("method"),
      "T": _text("T"),
      "batch": _text("batch"),
      "ms (quartiles)": _times,
      "tokens/s": _number("tokens_per_s"),
      "over full": _number("ratio"),
      "plan ms": _number("plan_ms"),
      "moved MB": _size("moved_bytes"),
      "device MB": _size("device_bytes"),
      "host MB": _size("host_bytes"),
      "temp MB": _size("temp_bytes"),
      "problem": _text("problem"),
    },
    "tune": {
      "op": _text("op"),
      "case": _text("note"),
      "kernel": _text("kernel"),
      "tiles": _tiles,
      "": _mark,
      "ms (quartiles)": _times,
      "problem": _text("problem"),
    },
  }
)


def table(what: str, rows: Sequence[Row]) -> Table:
  """Rows of one kind: ``copy``, ``kernel``, ``step`` or ``tune``."""
  columns = _COLUMNS[what]
  out = Table(box=None, header_style="bold", pad_edge=False)
  for place, name in enumerate(columns):
    out.add_column(name, no_wrap=name != "problem", justify="left" if place < 3 else "right")
  last: Any = None
  for row in rows:
    group = (row.get("op"), row.get("note"), row.get("T"))
    if last not in (None, group):
      out.add_section()
    last = group
    out.add_row(*(show(row) for show in columns.values()))
  return out
