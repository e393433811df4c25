"""Tile sizes that were measured on a device, in a file that is part of the package.

``a2ats tune`` writes ``tuned/KIND.json`` beside this file, KIND being the device's. Where the file
holds an op at exactly the shape asked for, its kernel takes the sizes from there, elsewhere by
shape. A file is read once a process. Sizes change neither what is chosen nor what is fetched; those
of ``paged_decode`` change the order of its sums, and so the last bits of its output.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from a2ats_jax.errors import UserError

FORMAT, VERSION = "a2ats-tiles", 1
FOLDER = Path(__file__).parent / "tuned"

Shape = Mapping[str, int | str | bool]
Key = tuple[str, tuple[tuple[str, int | str | bool], ...]]


def path_of(kind: str) -> Path:
  """The file that is read on devices of a kind, whether it exists or not.

  Args:
    kind: as JAX says it, such as ``NVIDIA H100 80GB HBM3``.
  """
  return FOLDER / (re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json")


def find[Tiles](op: str, tiles: type[Tiles], shape: Shape) -> Tiles | None:
  """The sizes stored for an op at a shape on this process's device; None where there are none.

  Args:
    op: its name.
    tiles: the kernel's class of sizes.
    shape: everything that the choice may depend on, as the op's ``shape_of`` says.

  Raises:
    UserError: the device's file is damaged or another device's.
  """
  kind = jax.devices()[0].device_kind
  path = path_of(kind)
  found = _read(path, kind).get(_key(op, shape))
  if found is None:
    return None
  try:
    return tiles(**found)
  except (TypeError, UserError):
    raise _refused(path, f"no sizes of {op}: {found}") from None


@functools.cache
def _read(path: Path, kind: str) -> Mapping[Key, Mapping[str, int]]:
  lines = read(path, kind=kind) if path.exists() else []
  return {key_of(line): line["tiles"] for line in lines}


def read(path: Path, *, kind: str) -> list[dict[str, Any]]:
  """The lines of a file: ``op``, ``shape`` and ``tiles`` each, and what was measured.

  Raises:
    UserError: the file is not one that ``a2ats tune`` wrote, or for another kind of device.
  """
  try:
    held = json.loads(path.read_text(encoding="utf-8"))
    found, lines = (held["format"], held["version"], held["device"]), held["tiles"]
    whole = all(line["tiles"].keys() and hash(key_of(line)) is not None for line in lines)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise _refused(path, f"damaged: {type(e).__name__}: {e}") from None
  if not whole or found != (FORMAT, VERSION, kind):
    raise _refused(path, f"expected {FORMAT} {VERSION} of {kind}, got {' '.join(map(str, found))}")
  return lines


def text_of(lines: Sequence[Mapping[str, Any]], *, kind: str) -> str:
  """A file's text.

  Args:
    lines: as :func:`read` returns them.
    kind: of the device.
  """
  head = {"format": FORMAT, "version": VERSION, "device": kind}
  rows = ",\n  ".join(json.dumps(line) for line in lines)
  return f'{json.dumps(head)[:-1]}, "tiles": [\n  {rows}\n]}}\n'


def key_of(line: Mapping[str, Any]) -> Key:
  """What a line is for."""
  return _key(line["op"], line["shape"])


def _key(op: str, shape: Shape) -> Key:
  return op, tuple(sorted(shape.items()))


def _refused(path: Path, what: str) -> UserError:
  return UserError(f"tiles: {path}: {what}; run a2ats tune again, or remove the file")
