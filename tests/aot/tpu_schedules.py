"""What libtpu's compiler says of the kernels it has scheduled, read from the texts that it leaves.

A bundle is what a TPU core issues in one cycle. Bundles are counted once, however often a loop
runs, so they bound nothing by themselves; they say how large a body is and whether a change made it
smaller. VMEM is what a kernel allocates; arguments that XLA keeps there are its own.
"""

import re
from pathlib import Path
from typing import Any

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
"""For ``LIBTPU_INIT_ARGS``, before the compiler is first called: some 20 MB a kernel."""

_NAME = re.compile(r"(\d+-(\w+?)(?:\.\d+)?)-\d+-schedule-analysis_final_bundles\.txt")


def read(folder: Path, kernels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
  """Bundles, VMEM bytes and stores of spilled registers of each kernel, the largest of its calls.

  Args:
    folder: where the compiler left its texts.
    kernels: by name.
  """
  found: dict[str, dict[str, Any]] = {}
  for path in folder.iterdir():
    match = _NAME.fullmatch(path.name)
    if match is None or match[2] not in kernels:
      continue
    bundles = int(re.findall(r"total scheduled bundles:\s+(\d+)", path.read_text())[0])
    if bundles > found.get(match[2], {}).get("bundles", 0):
      allocations = _text(folder, match[1], "pre-finalize-registers-and-allocations")
      sizes = re.findall(r"^\s*#allocation.*?space=vmem, size = (0x\w+)", allocations, re.MULTILINE)
      final = _text(folder, match[1], "final_bundles")
      found[match[2]] = {
        "bundles": bundles,
        "vmem_bytes": sum(int(size, 16) for size in sizes),
        "spills": len(re.findall(r"vst \[vmem:\[#allocation\w*_spill", final)),
      }
  return found


def _text(folder: Path, call: str, stage: str) -> str:
  (path,) = (p for p in folder.glob(f"{call}*-{stage}.txt") if "schedule" not in p.name)
  return path.read_text()
