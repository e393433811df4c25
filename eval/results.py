"""A run's directory: config.yaml, predictions.jsonl as prompts finish, metrics.json at the end.

A run that was killed goes on where it stopped: prompts with a line in ``predictions.jsonl`` are not
repeated, and ``metrics.json`` is made from the lines alone.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from a2ats_jax.errors import UserError

CONFIG, PREDICTIONS, METRICS = "config.yaml", "predictions.jsonl", "metrics.json"

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
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"out {out}: {error.strerror or error}") from error
  path = out / CONFIG
  if path.exists():
    _same_config(out, path, config)
  else:
    for name in (PREDICTIONS, METRICS):
      if (out / name).exists():
        raise UserError(f"out {out}: holds {name} but no {CONFIG}; give another directory")
    write_atomically(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
  return Run(out, config, _read_lines(out / PREDICTIONS))


def _same_config(out: Path, path: Path, config: Mapping[str, Any]) -> None:
  try:
    there = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, yaml.YAMLError) as error:
    raise UserError(f"out {out}: {CONFIG} cannot be read as YAML") from error
  old, new = dict(_flat(there, "")), dict(_flat(config, ""))
  missing = object()
  differs = [
    k for k in [*old, *(new.keys() - old.keys())] if old.get(k, missing) != new.get(k, missing)
  ]
  if differs:
    first = "; ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in sorted(differs)[:3])
    more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
    raise UserError(f"out {out}: holds a run with another config: {first}{more}")


def _flat(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
  if isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, value


def _read_lines(path: Path) -> list[Row]:
  """Finished lines; the piece of a line that a kill left at the end is cut off."""
  if not path.exists():
    return []
  text = path.read_text(encoding="utf-8", errors="replace")
  whole = text[: text.rfind("\n") + 1]
  try:
    lines = [json.loads(line) for line in whole.splitlines()]
  except ValueError as error:
    raise UserError(
      f"{path}: is damaged, a line in it is not JSON; give another directory"
    ) from error
  if whole != text:
    write_atomically(path, whole)
  return lines


def dump(line: Mapping[str, Any]) -> str:
  """One line of JSON."""
  return json.dumps(line, allow_nan=False, ensure_ascii=True) + "\n"


def write_atomically(path: Path, text: str) -> None:
  """The whole new file or the old one, whatever happens on the way."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with open(temporary, "w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


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
