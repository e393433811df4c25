"""Prompts and decode steps of a decoder under any KV method."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.methods.base import Geometry, Method, PromptLayer, State
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.rope import make_rope, rotate
from a2ats_jax.typing import Array, Float, Int

CHUNK = 512  # prompt tokens attended at once

Progress = Callable[[int, int], None]  # (done, of)


def geometry_of(config: ModelConfig, *, batch: int, prompt: int, new: int) -> Geometry:
  """The shape of a cache for a model."""
  return Geometry(
    batch=batch,
    layers=config.layers,
    heads=config.heads,
    kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    prompt=prompt,
    new=new,
  )


def pad_prompts(
  prompts: Sequence[Sequence[int]], config: ModelConfig, *, new: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
  """Prompts of different lengths as one array, padded on the right, and their lengths.

  Raises:
    UserError: no prompt, an empty one, a token outside the vocabulary, or one that with ``new``
      tokens exceeds the model's context.
  """
  if not prompts:
    raise UserError("prompt: expected at least one, got none")
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  if lengths.min() == 0:
    raise UserError(f"prompt: row {int(lengths.argmin())} is empty, expected at least one token")
  if int(lengths.max()) + new > config.context:
    raise UserError(
      f"prompt: {int(lengths.max())} tokens and {new} new ones exceed the model's context "
      f"of {config.context}"
    )
  ids = [token for prompt in prompts for token in prompt]
  if min(ids) < 0 or max(ids) >= config.vocab:
    raise UserError(
      f"prompt: token ids must lie in [0, {config.vocab}), got {min(ids)} to {max(ids)}"
    )
  longest = int(lengths.max())
  width = _chunk_of(longest) * -(-longest // _chunk_of(longest))
  tokens = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, lengths


def _chunk_of(length: int) -> int:
  """CHUNK, or for a short prompt the next power of two: few shapes, little padding."""
  return min(CHUNK, 1 << max(length - 1, 0).bit_length())


@partial(jax.jit, static_argnames="chunk", donate_argnames=("state", "x"))
def _prefill_layer(
  decoder: Decoder,
  method: Method,
  state: State,
  x: Float[Array, "B T E"],
  lengths: Int[Array, "B"],
  layer: Int[Array, ""],
  *,
  chunk: int,
) -> tuple[Float[Array, "B T E"], State]:
  """One layer over a whole prompt: exact attention by chunks, then the method absorbs it."""
  block, rope = decoder.layer(layer), make_rope(decoder.config.rope)
  b, t, _ = x.shape
  cache = jnp.zeros((b, decoder.config.kv_heads, t, decoder.config.head_dim), x.dtype)

  def step(carry, start):
    x, rotated, values, keys = carry
    piece = jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    positions = jnp.broadcast_to(start + jnp.arange(chunk, dtype=jnp.int32), (b, chunk))
    q, k, v = block.project(piece)
    k_now = rotate(k, positions, rope)
    rotated = jax.lax.dynamic_update_slice_in_dim(rotated, jnp.swapaxes(k_now, 1, 2), start, 2)
    values = jax.lax.dynamic_update_slice_in_dim(values, jnp.swapaxes(v, 1, 2), start, 2)
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k, start, 1)
    out = attention.causal_chunk(rotate(q, positions, rope), rotated, values, start)
    piece = block.finish(piece, out.astype(x.dtype))
    return (jax.lax.dynamic_update_slice_in_dim(x, piece, start, 1), rotated, values, keys), None

  starts = jnp.arange(0, t, chunk, dtype=jnp.int32)
  carry = (x, cache, cache, jnp.swapaxes(cache, 1, 2))
  (x, rotated, values, keys), _ = jax.lax.scan(step, carry, starts)
  prompt = PromptLayer(keys, jnp.swapaxes(rotated, 1, 2), jnp.swapaxes(values, 1, 2), lengths)
  return x, method.absorb(state, prompt, layer=layer)


@jax.jit
def _last_logits(
  decoder: Decoder, x: Float[Array, "B T E"], lengths: Int[Array, "B"]
) -> Float[Array, "B V"]:
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
  return decoder.logits(last)[:, 0]


def prefill(
  decoder: Decoder,
  method: Method,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
  progress: Progress | None = None,
) -> tuple[Float[Array, "B V"], State]:
  """Run prompts through the model, layer by layer over their whole length.

  Attention is exact and chunked; beside the method's state the device holds one layer's keys and
  values. Nothing has T x T elements.

  Args:
    tokens, lengths: from :func:`pad_prompts`.
    new: tokens the state must have room for after the prompt.
    progress: called after every layer.

  Returns:
    Logits after each row's last token, and the state.
  """
  config = decoder.config
  state = method.init(geometry_of(config, batch=len(tokens), prompt=tokens.shape[1], new=new))
  x = decoder.embed(jnp.asarray(tokens))
  rows = jnp.asarray(lengths)
  for layer in range(config.layers):
    index = jnp.asarray(layer, jnp.int32)
    x, state = _prefill_layer(
      decoder, method, state, x, rows, index, chunk=_chunk_of(tokens.shape[1])
    )
    if progress is not None:
      x.block_until_ready()
      progress(layer + 1, config.layers)
  return _last_logits(decoder, x, rows), state


@partial(jax.jit, donate_argnames="state")
def decode_step(
  decoder: Decoder,
  method: Method,
  state: State,
  tokens: Int[Array, "B S"],
  positions: Int[Array, "B S"],
) -> tuple[Float[Array, "B S V"], State, Any]:
  """Append S tokens to every row and return the logits after each.

  Args:
    positions: of the tokens, each row's going up by one; -1 for a row or place that takes no
      token. The state has room for as many as its prefill was told (``new``): later ones are lost.

  Returns:
    Logits, the new state, and the method's statistics with a leading layer axis.
  """
  rope = make_rope(decoder.config.rope)

  def layer_step(carry, scanned):
    x, state = carry
    block, layer = scanned
    q, k, v = block.project(x)
    out, state, stats = method.attend(state, q, k, v, positions=positions, rope=rope, layer=layer)
    return (block.finish(x, out), state), stats

  layers = jnp.arange(decoder.config.layers, dtype=jnp.int32)
  carry = (decoder.embed(tokens), state)
  (x, state), stats = jax.lax.scan(layer_step, carry, (decoder.layers, layers))
  return decoder.logits(x), state, stats


def greedy(
  decoder: Decoder,
  method: Method,
  prompts: Sequence[Sequence[int]],
  *,
  new: int,
  stop: Sequence[int] = (),
  progress: Progress | None = None,
) -> Iterator[tuple[Int[np.ndarray, "B"], Any]]:
  """Greedy continuations, a token of every row at a time.

  A row that produced a stop token is done: it yields -1 from then on. Ends after ``new`` tokens or
  when every row is done.

  Yields:
    The tokens, and the statistics of the step that produced them (None for the first, which the
    prompt's exact attention gives).
  """
  tokens, lengths = pad_prompts(prompts, decoder.config, new=new)
  logits, state = prefill(decoder, method, tokens, lengths, new=new, progress=progress)
  positions, live, stats = lengths.copy(), np.ones(len(prompts), bool), None
  for i in range(new):
    token = np.where(live, np.asarray(jnp.argmax(logits, axis=-1)), -1)
    yield token, stats
    live &= ~np.isin(token, list(stop))
    if not live.any() or i == new - 1:
      return
    logits, state, stats = decode_step(
      decoder,
      method,
      state,
      jnp.asarray(np.maximum(token, 0)[:, None], jnp.int32),
      jnp.asarray(np.where(live, positions, -1)[:, None], jnp.int32),
    )
    logits = logits[:, 0]
    positions = positions + live
