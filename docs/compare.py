"""The tables that put every method beside full attention, from a finished comparison.

a2ats eval compare --config configs/compare-4k.yaml --codebook runs/books --out runs/compare
python docs/compare.py runs/compare  # the record, and the tables in README.md and docs/compare.md
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2ats_jax.methods.registry import METHODS
from eval import tables
from eval.compare import side_by_side

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "compare.jsonl"
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
KEPT = (
  *("benchmark", "task", "model", "method", "options", "T", "batch", "budget", "per", "n"),
  *(
    "read",
    "read_bytes",
    "moved_bytes",
    "device_bytes",
    "host_bytes",
    "kl",
    "kl_se",
    "top1",
    "score",
  ),
)  # of a benchmark's row

WHO = ("benchmark", "task", "method", "options", "T", "budget", "per")

Row = dict[str, Any]


def _mb(size: float) -> str:
  """Bytes in 10^6, as short as they can be read."""
  return f"{size / 1e6:.0f}" if size >= 9.95e6 else f"{size / 1e6:.1f}"


def _tasks(rows: Sequence[Row]) -> tuple[str, list[str]]:
  """The task of closeness, and those of needles."""
  names = [name for row in rows for name in row]
  (close,) = dict.fromkeys(name[3:] for name in names if name.startswith("kl "))
  return close, list(dict.fromkeys(name[6:] for name in names if name.startswith("score ")))


def short(rows: Sequence[Row]) -> str:
  """A line a method, its budgets side by side; what does not read by budget stands in the first."""
  merged = side_by_side(rows)
  close, needles = _tasks(merged)
  budgets = list(dict.fromkeys(r["budget"] for r in merged if r["budget"] is not None))
  each = " KL | needles | read | held |"
  lines = [
    "| method |" + "".join(f" {b:.0%}:{each}" for b in budgets),
    "|---" * (1 + 4 * len(budgets)) + "|",
  ]
  for name in dict.fromkeys(tables.label(row, merged) for row in merged):
    mine = [row for row in merged if tables.label(row, merged) == name]
    cells = [f"`{name}`"]
    for place, budget in enumerate(budgets):
      found = [r for r in mine if r["budget"] == budget or (r["budget"] is None and place == 0)]
      if not found:
        cells += ["", "", "", ""]
        continue
      (row,) = found
      share = sum(row[f"score {task}"] for task in needles) / len(needles)
      held = " + ".join(_mb(row[f"{m}_bytes"]) for m in ("device", "host") if row[f"{m}_bytes"])
      kl = row[f"kl {close}"]
      shown = f"{kl:.4f}" if kl < 0.1 else f"{kl:.2f}"
      cells += [shown, f"{share:.0%}", _mb(row["read_bytes"]), held]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def long(rows: Sequence[Row]) -> str:
  """Every figure of every method and budget."""
  merged = side_by_side(rows)
  close, needles = _tasks(merged)
  head = "| method | budget | KL ± s.e. |" + "".join(f" {task} |" for task in needles)
  head += " tokens read | MB read | MB moved | MB on the device | MB on the host |"
  lines = [head, "|---" * (head.count("|") - 1) + "|"]
  for row in merged:
    error = row.get(f"kl_se {close}")
    cells = [
      f"`{tables.label(row, merged)}`",
      tables.budget_label(row) or "-",
      f"{row[f'kl {close}']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
      *(f"{row[f'score {task}']:.0%}" for task in needles),
      f"{row['read']:.1%}",
      *(_mb(row[f"{name}_bytes"]) for name in ("read", "moved", "device", "host")),
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def filled(text: str, table: str) -> str:
  """A page with a table between its marks."""
  before, _, rest = text.partition(BEGIN)
  _, mark, after = rest.partition(END)
  if not mark:
    raise ValueError(f"the page has no {BEGIN} and {END}")
  return f"{before}{BEGIN}\n{table}\n{END}{after}"


def pages(rows: Sequence[Row]) -> dict[Path, str]:
  """What the README and docs/compare.md are with the tables of some rows."""
  both = {ROOT / "README.md": short(rows), ROOT / "docs" / "compare.md": long(rows)}
  return {path: filled(path.read_text(), table) for path, table in both.items()}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("runs", type=Path, nargs="+", help="directories of finished comparisons")
  found: dict[tuple[Any, ...], Row] = {}
  for run in parser.parse_args().runs:
    for row in json.loads((run / "metrics.json").read_text())["rows"]:
      kept = {name: row[name] for name in KEPT if name in row}
      found.setdefault(tuple(kept[name] for name in WHO), kept)
  order = list(METHODS)
  rows = sorted(found.values(), key=lambda row: (row["benchmark"], order.index(row["method"])))
  RECORD.write_text("".join(json.dumps(row) + "\n" for row in rows))
  for path, text in pages(rows).items():
    path.write_text(text)
  return 0


if __name__ == "__main__":
  sys.exit(main())
