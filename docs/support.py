"""The support matrix of the README: what was interpreted, compiled, run and measured, and where.

  make aot | tee aot.jsonl          # one line a program
  python docs/support.py aot.jsonl  # docs/support.jsonl, and the table in README.md

Every line of ``docs/support.jsonl`` says what was seen of one op on one device. A cell without a
line says no.
"""

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "support.jsonl"
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
OPS = ("page_fetch", "page_write", "paged_decode", "vq_encode", "decode step")
DEVICES = ("CPU", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "H100")
SEEN = ("interpreted", "compiled", "ran", "measured")
CHIPS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "tpu7x": "TPU7x"}

Line = dict[str, Any]


def compiled(rows: Iterable[Line], *, date: str, versions: str) -> list[Line]:
  """What the lines of ``make aot`` say: an op counts where none of its programs went wrong."""
  bad: set[tuple[str, str]] = set()
  programs: dict[tuple[str, str], int] = {}
  for row in rows:
    name = str(row.get("program") or row.get("case") or "")
    chip = str(row.get("chip", "H100")).split(":")[0]
    device = CHIPS.get(chip, chip)
    op = next((op for op in OPS if name.replace("_", " ").startswith(op.replace("_", " "))), None)
    if op is None or "growth" in name or "refused" in row:
      continue
    programs[op, device] = programs.get((op, device), 0) + 1
    if "problem" in row or "error" in row:
      bad.add((op, device))
  return [
    {
      "op": op,
      "device": device,
      "what": "compiled",
      "programs": count,
      "date": date,
      "versions": versions,
    }
    for (op, device), count in programs.items()
    if (op, device) not in bad
  ]


def table(lines: Sequence[Line]) -> str:
  """The matrix, as Markdown."""
  seen = {(line["op"], line["device"], line["what"]) for line in lines}
  text = ["| | " + " | ".join(DEVICES) + " |", "|---" * (len(DEVICES) + 1) + "|"]
  for op in OPS:
    cells = []
    for device in DEVICES:
      found = [what for what in SEEN if (op, device, what) in seen]
      cells.append(", ".join(found) or "no")
    text.append(f"| `{op}` | " + " | ".join(cells) + " |")
  notes = sorted({f"{line['what']} {line['date']}, {line['versions']}" for line in lines})
  said = "What is not named was not done. Interpreted: on the CPU, by one interpreter for all TPUs "
  said += "and one for GPUs, with race detection."
  return "\n".join([*text, "", f"{said} {'; '.join(notes)}."])


def filled(readme: str, lines: Sequence[Line]) -> str:
  """The README with the matrix between its marks."""
  before, _, rest = readme.partition(BEGIN)
  _, mark, after = rest.partition(END)
  if not mark:
    raise ValueError(f"README.md has no {BEGIN} and {END}")
  return f"{before}{BEGIN}\n{table(lines)}\n{END}{after}"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("aot", type=Path, help="lines that make aot printed")
  aot = parser.parse_args().aot
  rows = [json.loads(line) for line in aot.read_text().splitlines() if line.startswith("{")]
  names = ("jax", "libtpu", "jax-cuda13-plugin")
  held = []
  for name in names:
    try:
      held.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  today = datetime.date.today().isoformat()
  old = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
  lines = [line for line in old if line["what"] != "compiled"]
  lines += compiled(rows, date=today, versions=", ".join(held))
  RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines))
  readme = ROOT / "README.md"
  readme.write_text(filled(readme.read_text(), lines))
  return 0


if __name__ == "__main__":
  sys.exit(main())
