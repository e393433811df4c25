"""Run a model over calibration documents and keep what codebooks are trained from.

Keys before rotary embedding go to a file in bfloat16, as in the released A2ATS: the rounding, up
to 0.4%, is far below the distance to a codeword. Queries are never kept: their second moment is
summed in float64 on the host, because its smallest eigenvalues lie about six orders of magnitude
below the largest and would drown in a float32 sum.
"""

import dataclasses
import os
import time
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.rope import make_rope, rotate
from a2ats_jax.typing import Array, Float, Int, Shaped
from train_codebooks.files import load_arrays, save_arrays
from train_codebooks.progress import Progress, silent
from train_codebooks.texts import Corpus

KEYS, MOMENTS = "keys.bfloat16", "moments.npz"
_BFLOAT16 = np.dtype(jnp.bfloat16)
_CHUNK = 512  # tokens attended at once
_BATCH = 4096  # tokens of a forward pass, over its documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
  """What the calibration text looks like from inside the model.

  Attributes:
    keys: before rotary embedding, ``[L, K, N, D]`` bfloat16, a memory-mapped file. Of a model with
      local layers, L counts the global ones.
    query_square, query_sum: sums of ``q^T q`` and ``q`` before rotary embedding over the N tokens
      and G query heads of each KV head, ``[L, K, D, D]`` and ``[L, K, D]`` float64.
    key_square, key_sum: the same of the keys, over the N tokens.
    group: G.
  """

  keys: np.ndarray
  query_square: Float[np.ndarray, "L K D D"]
  query_sum: Float[np.ndarray, "L K D"]
  key_square: Float[np.ndarray, "L K D D"]
  key_sum: Float[np.ndarray, "L K D"]
  group: int

  @property
  def tokens(self) -> int:
    """N."""
    return self.keys.shape[2]


@partial(jax.jit, static_argnames=("local", "chunk"), donate_argnames="x")
def _layer(
  decoder: Decoder, x: Float[Array, "B T E"], layer: Int[Array, ""], *, local: bool, chunk: int
) -> tuple[Float[Array, "B T E"], Float[Array, "B T H D"], Float[Array, "B T K D"]]:
  """One layer under exact causal attention: its output, and its queries and keys before rope."""
  config, block = decoder.config, decoder.layer(layer)
  span = config.local if local else None
  rope = make_rope(config.rope if span is None else span.rope)
  window = None if span is None else span.window
  b, t, _ = x.shape
  cache = jnp.zeros((b, config.kv_heads, t, config.head_dim), x.dtype)

  def step(carry, start):
    rotated, values = carry
    piece = jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (b, chunk))
    q, k, v = block.project(piece)
    now = jnp.swapaxes(rotate(k, positions, rope), 1, 2)
    rotated = jax.lax.dynamic_update_slice_in_dim(rotated, now, start, 2)
    values = jax.lax.dynamic_update_slice_in_dim(values, jnp.swapaxes(v, 1, 2), start, 2)
    out = attention.causal_chunk(rotate(q, positions, rope), rotated, values, start, window=window)
    return (rotated, values), (block.finish(piece, out.astype(x.dtype)), q, k)

  starts = jnp.arange(0, t, chunk, dtype=jnp.int32)
  _, pieces = jax.lax.scan(step, (cache, cache), starts)
  out, q, k = (jnp.moveaxis(p, 0, 1).reshape(b, t, *p.shape[3:]) for p in pieces)
  return out, q, k


def _grams(x: Float[np.ndarray, "n K G D"]) -> tuple[np.ndarray, np.ndarray]:
  """Sums of ``x^T x`` and of ``x`` for each K, over n and G, in float64."""
  n, kv, group, dim = x.shape
  rows = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(kv, n * group, dim)
  return rows.swapaxes(1, 2) @ rows, rows.sum(axis=1)


def _open_keys(path: Path, shape: tuple[int, ...]) -> np.memmap:
  """The key file, allocated in full at once: a full disk is an error here, not a fault later."""
  size = 2 * int(np.prod(shape))
  with open(path, "ab") as f:
    if os.path.getsize(path) != size:
      f.truncate(0)
      os.posix_fallocate(f.fileno(), 0, size)
  return np.memmap(path, dtype=_BFLOAT16, mode="r+", shape=shape)


def _shape(corpus: Corpus) -> tuple[int, int, int]:
  """Of every forward pass: documents, padded length, and tokens attended at once."""
  longest = max(len(d) for d in corpus.documents)
  chunk = min(_CHUNK, 1 << (longest - 1).bit_length())
  width = chunk * -(-longest // chunk)
  return max(1, min(_BATCH // width, len(corpus.documents))), width, chunk


def collect(
  decoder: Decoder,
  corpus: Corpus,
  directory: Path,
  *,
  progress: Progress = silent,
  save_seconds: float = 20.0,
) -> Collected:
  """Run the documents, each from position 0, or take up where an earlier call was cut off.

  Documents are padded on the right to one shape, so that each layer is compiled once; padding
  reaches neither keys nor moments, because attention is causal and only a row's own tokens are
  read back.

  Args:
    directory: exists; takes the keys and, every ``save_seconds`` and at the end, the moments with
      the number of documents they sum. The caller sees to it that it belongs to this model and
      text.

  Raises:
    UserError: a token outside the vocabulary, a document longer than the model's context, or a
      model whose keys or queries are not finite.
    OSError: no space for the keys.
  """
  config = decoder.config
  _check(corpus, config.vocab, config.context)
  shape = (config.global_layers, config.kv_heads, corpus.tokens, config.head_dim)
  rows, width, chunk = _shape(corpus)
  state, done = _resume(directory, shape)
  keys = _open_keys(directory / KEYS, shape)
  start = sum(len(d) for d in corpus.documents[:done])
  if done:
    progress("collect", start, corpus.tokens)

  def run(x: Array, layer: int) -> tuple[Array, Array, Array]:
    return _layer(decoder, x, jnp.int32(layer), local=config.is_local(layer), chunk=chunk)

  saved = time.monotonic()
  while done < len(corpus.documents):
    batch = corpus.documents[done : done + rows]
    lengths = [len(d) for d in batch]
    tokens = np.zeros((rows, width), np.int32)
    for row, document in zip(tokens, batch):
      row[: len(document)] = document
    valid = np.arange(width)[None, :] < np.asarray(lengths + [0] * (rows - len(lengths)))[:, None]
    end = start + sum(lengths)
    pending = run(decoder.embed(jnp.asarray(tokens)), 0)
    layers = config.global_layers * config.period  # local ones after the last global are not run
    for layer in range(layers):
      x, q, k = pending
      if layer + 1 < layers:  # the device runs ahead while the host sums
        pending = run(x, layer + 1)
      if not config.is_local(layer):
        own, q, k = layer // config.period, np.asarray(q)[valid], np.asarray(k)[valid]
        _absorb(state, keys[own, :, start:end], own, q, k)
    start, done = end, done + len(batch)
    if time.monotonic() - saved >= save_seconds or done == len(corpus.documents):
      keys.flush()
      save_arrays(directory / MOMENTS, state | {"documents": np.asarray(done)})
      saved = time.monotonic()
    progress("collect", start, corpus.tokens)
  return Collected(keys=keys, group=config.group, **state)


def _check(corpus: Corpus, vocab: int, context: int) -> None:
  if not corpus.documents or min(len(d) for d in corpus.documents) == 0:
    raise UserError("calibration: expected documents of at least one token")
  longest = max(len(d) for d in corpus.documents)
  if longest > context:
    raise UserError(
      f"calibration: a document has {longest} tokens, the model's context is {context}"
    )
  low = min(int(d.min()) for d in corpus.documents)
  high = max(int(d.max()) for d in corpus.documents)
  if low < 0 or high >= vocab:
    raise UserError(f"calibration: token ids must lie in [0, {vocab}), got {low} to {high}")


def _resume(directory: Path, shape: tuple[int, int, int, int]) -> tuple[dict[str, np.ndarray], int]:
  """The sums so far and the documents they cover; zeros for a fresh start."""
  fresh = _no_sums(shape)
  size = 2 * int(np.prod(shape))
  keys, moments = directory / KEYS, directory / MOMENTS
  if not moments.exists() or not keys.exists() or keys.stat().st_size != size:
    return fresh, 0
  try:
    found = load_arrays(moments)
    done = int(found.pop("documents"))
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
    return fresh, 0  # damaged: what it held is collected again
  if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in fresh.items()}:
    return fresh, 0
  return found, done


def _no_sums(shape: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
  layers, kv, _, dim = shape
  return {
    name: np.zeros((layers, kv, dim, dim) if "square" in name else (layers, kv, dim))
    for name in ("query_square", "query_sum", "key_square", "key_sum")
  }


def from_arrays(
  keys: Shaped[np.ndarray, "L N K D"], queries: Shaped[np.ndarray, "L N H D"] | None
) -> Collected:
  """What keys and queries of any model look like, both before rotary embedding.

  Args:
    keys: of N calibration tokens, in any order; floats of any width, memory-mapped or not.
    queries: of the same tokens. Without them their sums are zero.

  Raises:
    UserError: a key or query is not finite.
  """
  layers, tokens, kv, dim = keys.shape
  shape = (layers, kv, tokens, dim)
  kept, state = np.empty(shape, _BFLOAT16), _no_sums(shape)
  for layer in range(layers):
    for start in range(0, tokens, _BATCH):
      some = slice(start, start + _BATCH)
      k = np.asarray(keys[layer, some], np.float32)
      q = np.zeros_like(k) if queries is None else np.asarray(queries[layer, some], np.float32)
      _absorb(state, kept[layer, :, some], layer, q, k)
  group = 1 if queries is None else queries.shape[2] // kv
  return Collected(keys=kept, group=group, **state)


def _absorb(
  state: dict[str, np.ndarray],
  keys: np.ndarray,
  layer: int,
  q: Float[np.ndarray, "n H D"],
  k: Float[np.ndarray, "n K D"],
) -> None:
  """Add one layer's tokens to the sums, and write its keys to ``keys`` ``[K, n, D]``."""
  n, kv, dim = k.shape
  for name, rows in (("query", q.reshape(n, kv, -1, dim)), ("key", k[:, :, None, :])):
    square, total = _grams(rows)
    if not np.isfinite(square).all():
      raise UserError(f"calibration: the model's layer {layer} gives a non-finite {name}")
    state[f"{name}_square"][layer] += square
    state[f"{name}_sum"][layer] += total
  keys[...] = k.transpose(1, 0, 2).astype(_BFLOAT16)
