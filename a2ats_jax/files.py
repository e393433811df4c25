"""Files that are whole or absent, and directories that belong to one run."""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from a2ats_jax.errors import UserError

CONFIG, LOCK = "config.yaml", ".lock"


def write_atomically(path: Path, data: bytes | str) -> None:
  """Write a file so that a reader sees the old one or the new one, never a part.

  Args:
    data: text is written as UTF-8.

  Raises:
    OSError: the disk is full or the directory cannot be written; the old file is untouched.
  """
  with replacing(path) as temporary:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """A file to write in place of ``path``, which it becomes when the block ends without an error.

  Raises:
    OSError: the disk is full or the directory cannot be written; the old file is untouched.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def claim(directory: Path, config: Mapping[str, Any], *, results: Iterable[str]) -> None:
  """Make a directory a run's own, or check that it already is.

  Args:
    directory: made if need be.
    config: everything that decides the run's results, JSON types only; kept in ``config.yaml``.
    results: names of files that only a run with a config may have left.

  Raises:
    UserError: it is another run's (the message names what differs, with both values), it holds
      results without a config, or it cannot be used.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"{directory}: {e.strerror or e}") from e
  path = directory / CONFIG
  if not path.exists():
    for name in results:
      if (directory / name).exists():
        raise UserError(f"{directory}: holds {name} without {CONFIG}; choose another directory")
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return
  try:
    there = yaml.safe_load(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, yaml.YAMLError) as e:
    raise UserError(f"{path}: is not readable YAML; choose another directory") from e
  if not isinstance(there, dict):
    raise UserError(f"{path}: is empty or damaged; choose another directory")
  found = dict(_flat(there))
  wanted, absent = dict(_flat(config)), object()
  keys = [*wanted, *(key for key in found if key not in wanted)]
  differ = [
    f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}"
    for key in keys
    if found.get(key, absent) != wanted.get(key, absent)
  ]
  if differ:
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise UserError(
      f"{directory}: belongs to another run: {'; '.join(differ[:3])}{more}; choose another "
      "directory, or remove this one to start over"
    )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
  """Hold a run's directory: two runs writing the same files would spoil both.

  Raises:
    UserError: another process holds it.
  """
  with open(directory / LOCK, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"{directory}: another run is at work there") from None
    yield


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(tree, Mapping):
    for key, value in tree.items():
      yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
  else:
    yield prefix, tree
