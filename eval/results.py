"""A run's directory: config.yaml, predictions.jsonl as prompts finish, metrics.json at the end.

A run that was killed goes on where it stopped: prompts with a line in ``predictions.jsonl`` are not
repeated, and ``metrics.json`` is made from the lines alone.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from a2ats_jax.errors import UserError
from a2ats_jax.files import claim, write_atomically

PREDICTIONS, METRICS = "predictions.jsonl", "metrics.json"

KEYS = frozenset({"task", "T", "index", "results"})  # of every line

Row = dict[str, Any]
Key = tuple[Any, ...]


class Run:
  """Lines of one evaluation, in memory and, where there is a directory, on disk.

  Attributes:
    config: resolved, JSON types only.
    lines: finished prompts, in the order they finished.
  """

  def __init__(self, out: Path | None, config: Mapping[str, Any], lines: list[Row]):
    self.out = out
    self.config = config
    self.lines = lines

  def keep(self, wanted: Callable[[Row], bool]) -> None:
    """Forget the lines that are not wanted, on disk too."""
    kept = [line for line in self.lines if wanted(line)]
    if len(kept) < len(self.lines):
      self.lines = kept
      if self.out is not None:
        write_atomically(self.out / PREDICTIONS, "".join(map(dump, kept)))

  def append(self, lines: Sequence[Row]) -> None:
    """Add finished prompts; on disk before this returns."""
    text = "".join(map(dump, lines))
    if self.out is not None:
      with open(self.out / PREDICTIONS, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    self.lines.extend(json.loads(line) for line in text.splitlines())

  def finish(self, rows: Sequence[Row]) -> None:
    """Write the metrics."""
    if self.out is not None:
      metrics = {"config": self.config, "environment": environment(), "rows": list(rows)}
      text = json.dumps(metrics, indent=1, allow_nan=False, ensure_ascii=False)
      write_atomically(self.out / METRICS, text + "\n")


def open_run(out: Path | None, config: Mapping[str, Any]) -> Run:
  """Begin a run or go on with one.

  Args:
    out: directory, made if need be; None keeps everything in memory.
    config: everything that decides the results.

  Raises:
    UserError: the directory belongs to a run with another config (the message names what differs),
      holds results without one, or is damaged.
  """
  config = json.loads(json.dumps(config, allow_nan=False))
  if out is None:
    return Run(None, config, [])
  claim(out, config, results=(PREDICTIONS, METRICS))
  return Run(out, config, _read_lines(out / PREDICTIONS))


def _read_lines(path: Path) -> list[Row]:
  """Finished lines; the piece of a line that a kill left at the end is cut off."""
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8", errors="replace")
  whole = text[: text.rfind("\n") + 1]
  damaged = f"{path}: is damaged, a line in it is not of a finished prompt; give another directory"
  try:
    lines = [json.loads(line) for line in whole.splitlines()]
  except ValueError as error:
    raise UserError(damaged) from error
  if not all(isinstance(line, dict) and line.keys() >= KEYS for line in lines):
    raise UserError(damaged)
  if whole != text:
    write_atomically(path, whole)
  # Two runs that met on one directory may have written a prompt twice: the first line counts.
  first: dict[Key, Row] = {}
  for line in lines:
    first.setdefault((line["task"], line["T"], line["index"]), line)
  return list(first.values())


def dump(line: Mapping[str, Any]) -> str:
  """One line of JSON."""
  return json.dumps(line, allow_nan=False, ensure_ascii=True) + "\n"


def environment() -> dict[str, Any]:
  """Where the figures were made: versions, platform, number of CPUs."""
  packages = ("a2ats_jax", "jax", "jaxlib", "flax", "numpy", "tokenizers")
  device = jax.devices()[0]
  return {
    "versions": {"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in packages},
    "platform": {
      "system": platform.system(),
      "machine": platform.machine(),
      "backend": device.platform,
      "device": device.device_kind,
    },
    "cpu_count": os.cpu_count(),
  }
