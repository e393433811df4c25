"""A document's state on disk: one safetensors file with a JSON header, whole or absent."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from a2ats_jax import store
from a2ats_jax.errors import UserError
from a2ats_jax.files import replacing
from a2ats_jax.methods.base import Geometry, Method
from a2ats_jax.methods.layout import layout
from a2ats_jax.methods.sharded import Sharded, unsharded
from a2ats_jax.prefix import Prefix
from a2ats_jax.sequence import OverSequence

FORMAT = "a2ats-prefix"
VERSION = 1
_HEADER, _HASH = "a2ats", "sha256"  # names in the metadata of the safetensors file
_TOKENS = "tokens"


def method_identity(method: Method) -> dict[str, str]:
  """A method's name and options as text; of arrays and of what is long, a hash.

  On which devices its state lies is none of them.
  """
  method = unsharded(method)
  found = {"name": method.name}
  for field in dataclasses.fields(method):  # pyrefly: ignore[bad-argument-type]  all are
    if field.name == "split":
      continue
    value = getattr(method, field.name)
    arrays = [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array | np.ndarray)]
    text = repr(value) if not arrays else _hash("", {str(i): x for i, x in enumerate(arrays)})
    found[field.name] = text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()
  return found


def _check_place(method: Method) -> None:
  if isinstance(method, OverSequence):
    raise UserError("prefix: a state that is split along its tokens cannot be saved or loaded yet")


def _hash(header: str, arrays: Mapping[str, Any]) -> str:
  """Over a text, and names, types, shapes and bytes of arrays."""
  digest = hashlib.sha256(header.encode())
  for name in sorted(arrays):
    x = np.asarray(arrays[name])
    digest.update(f"{name} {x.dtype} {x.shape};".encode())
    digest.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def save_prefix(path: Path, prefix: Prefix, *, fingerprint: str) -> None:
  """Write a document's state as one safetensors file, whole or not at all.

  Its metadata hold a JSON header: method and options, the model, the geometry, a hash of the
  document, versions; and a hash over the header and all arrays.

  Args:
    path: in a directory that exists.
    fingerprint: identity of the model, such as ``Model.fingerprint``.

  Raises:
    UserError: the file cannot be written, in which case an old one is untouched; or the state is
      split along its tokens, or lies over several processes.
  """
  _check_place(prefix.method)
  if not all(x.is_fully_addressable for x in jax.tree.leaves(prefix.state)):
    raise UserError("prefix: a state that lies over several processes cannot be saved yet")
  leaves, _ = layout(unsharded(prefix.method), prefix.geometry)
  arrays = {
    leaf.name: np.ascontiguousarray(x).reshape(leaf.shape)
    for leaf, x in zip(leaves, jax.tree.leaves(prefix.state), strict=True)
  }
  arrays[_TOKENS] = prefix.tokens
  packages = ("a2ats_jax", "jax", "jaxlib")
  header = json.dumps(
    {
      "format": FORMAT,
      "version": VERSION,
      "model_fingerprint": fingerprint,
      "method": method_identity(prefix.method),
      "geometry": dataclasses.asdict(prefix.geometry)
      | {"dtype": np.dtype(prefix.geometry.dtype).name},
      "tokens": len(prefix.tokens),
      "tokens_sha256": _hash("", {_TOKENS: prefix.tokens}),
      "versions": {name: importlib.metadata.version(name) for name in packages},
    }
  )
  metadata = {_HEADER: header, _HASH: _hash(header, arrays)}
  try:
    with replacing(path) as temporary:
      safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f"prefix {path}: cannot be written: {getattr(e, 'strerror', None) or e}") from e


def load_prefix(path: Path, method: Method, *, fingerprint: str) -> Prefix:
  """Read a document's state and check that it belongs to this model and method.

  Args:
    method: that the state is to be used with, its options and codebooks those it was made with; it
      may lie over another mesh than it did, or over none.
    fingerprint: of this model.

  Raises:
    UserError: no such file, not a prefix, of an unknown version, of another model, method, options
      or shape, or damaged; the message names what differs and holds both values.
  """
  _check_place(method)
  where = f"prefix {path}"
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      header = _checked_header(where, metadata.get(_HEADER, ""), method, fingerprint)
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except FileNotFoundError as e:
    raise UserError(f"{where}: no such file") from e
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f"{where}: is not a whole safetensors file") from e
  if _hash(metadata[_HEADER], arrays) != metadata.get(_HASH):
    raise UserError(f"{where}: does not match the hash that it holds; it is damaged")
  geometry = Geometry(
    **(header["geometry"] | {"dtype": jnp.dtype(header["geometry"]["dtype"]).type})
  )
  leaves, structure = layout(unsharded(method), geometry)
  tokens = arrays.pop(_TOKENS)
  wanted = {leaf.name: (leaf.dtype, leaf.shape) for leaf in leaves}
  found = {name: (x.dtype, x.shape) for name, x in arrays.items()}
  for name in {**wanted, **found}:
    if wanted.get(name) != found.get(name):
      raise UserError(
        f"{where}: expected {name} as {wanted.get(name)}, got {found.get(name)}; it was made by "
        "another version or on another backend"
      )
  if isinstance(method, Sharded):
    state = method.place(geometry, [arrays[leaf.name] for leaf in leaves])
  else:
    state = jax.tree.unflatten(
      structure, [store.put(arrays[leaf.name], host=leaf.host) for leaf in leaves]
    )
  return Prefix(method=method, state=state, geometry=geometry, tokens=tokens)


def _checked_header(where: str, text: str, method: Method, fingerprint: str) -> dict[str, Any]:
  """The header of a prefix that was made with this method and model."""
  try:
    header = json.loads(text)
  except ValueError:
    header = None
  if not isinstance(header, dict) or header.get("format") != FORMAT:
    raise UserError(f"{where}: expected format {FORMAT!r}, as save_prefix writes it")
  if header.get("version") != VERSION:
    raise UserError(f"{where}: expected format version {VERSION}, got {header.get('version')}")
  identity = header.get("method")
  theirs = {"model": header.get("model_fingerprint")}
  theirs |= identity if isinstance(identity, dict) else {}
  mine = {"model": fingerprint} | method_identity(method)
  for key in {**mine, **theirs}:
    if mine.get(key) != theirs.get(key):
      what = "model" if key == "model" else "method"
      raise UserError(
        f"{where}: was made with another {what}: {key} was {theirs.get(key)} and is now "
        f"{mine.get(key)}"
      )
  return header
