"""The support matrix of the README: what was interpreted, compiled, run and measured, and where.

  make aot | tee aot.jsonl                       # one line a program
  a2ats device --out device.jsonl                # on a GPU or a TPU: one line a kernel and a step
  python docs/support.py aot.jsonl device.jsonl  # docs/support.jsonl, and the table in README.md

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
OPS = ("page_fetch", "page_write", "paged_decode", "vq_encode", "lookup", "decode step")
DEVICES = ("CPU", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x", "H100")
SEEN = ("interpreted", "compiled", "ran", "measured")
# What a device of each column calls itself, or begins with; the first that fits.
KINDS = {
  "NVIDIA H100": "H100",
  "TPU v5 lite": "TPU v5e",
  "TPU v5e": "TPU v5e",
  "TPU v5": "TPU v5p",
  "TPU v6": "TPU v6e",
  "TPU7x": "TPU7x",
}
_OTHER = ("refused", "schedules", "chips")  # controls, kernels once more, meshes
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
    if op is None or "growth" in name or not row.keys().isdisjoint(_OTHER):
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


def ran(rows: Iterable[Line], *, date: str) -> list[Line]:
  """What the lines of ``a2ats device`` say: kernels equal to the reference, and steps.

  An op counts where none of its kernels went wrong, and as measured where one was timed at a
  model's shapes.
  """
  bad: set[tuple[str, str]] = set()
  seen: dict[tuple[str, str, str], Line] = {}
  versions: dict[str, str] = {}
  for row in rows:
    if row["what"] == "card":
      held = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
      versions[row["device"]] = f"{row['device']}, {held}"
    name = next((to for mark, to in KINDS.items() if row["device"].startswith(mark)), None)
    kernel = row["what"] == "kernel" and row["implementation"] != "reference"
    step = row["what"] == "step" and row["method"] != "full"
    if name is None or not (kernel or step):
      continue
    op = row["op"] if kernel else "decode step"
    if kernel and not row["ok"]:
      bad.add((op, name))
    done = "ms" in row or kernel
    for what in ("ran",) * done + ("measured",) * ("ms" in row and not row["small"]):
      line = {"op": op, "device": name, "what": what, "command": "a2ats device", "date": date}
      seen[op, name, what] = line | {"versions": versions[row["device"]]}
  return [line for (op, name, _), line in seen.items() if (op, name) not in bad]


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
  parser.add_argument("files", type=Path, nargs="+", help="lines of make aot or of a2ats device")
  rows = [
    json.loads(line)
    for path in parser.parse_args().files
    for line in path.read_text().splitlines()
    if line.startswith("{")
  ]
  devices = [row for row in rows if row.get("benchmark") == "device"]
  aot = [row for row in rows if row.get("benchmark") != "device"]
  held = []
  for name in ("jax", "libtpu", "jax-cuda13-plugin"):
    try:
      held.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      continue
  today = datetime.date.today().isoformat()
  lines = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.exists() else []
  if aot:
    lines = [line for line in lines if line["what"] != "compiled"]
    lines += compiled(aot, date=today, versions=", ".join(held))
  new = ran(devices, date=today)
  keys = ("op", "device", "what")
  again = {tuple(line[key] for key in keys) for line in new}
  lines = [line for line in lines if tuple(line[key] for key in keys) not in again] + new
  RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines))
  readme = ROOT / "README.md"
  readme.write_text(filled(readme.read_text(), lines))
  return 0


if __name__ == "__main__":
  sys.exit(main())
