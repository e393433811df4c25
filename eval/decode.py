"""Decoding from a replayed state: given tokens in blocks, or greedily."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.generate import Rows, decode_block, decode_step
from a2ats_jax.methods.base import Method, State
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.sampling import Sampling
from a2ats_jax.typing import Float, Int

_BLOCK = 32  # tokens decoded at once
_SCORES = 1 << 25  # float32 scores of one layer a block may need: 128 MiB


Figures = Mapping[str, np.ndarray]  # a step's statistics by name, [L, B, S, ...]


def figures_of(stats: Any) -> dict[str, np.ndarray]:
  """Statistics of a step on the host; empty where a method keeps none by name."""
  if dataclasses.is_dataclass(stats):
    stats = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
  return {k: np.asarray(x) for k, x in stats.items()} if isinstance(stats, Mapping) else {}


def bytes_of(tree: Any) -> dict[str, int]:
  """``device_bytes`` and ``host_bytes`` of live arrays, such as a state and its method."""
  out = {"device_bytes": 0, "host_bytes": 0}
  for leaf in jax.tree.leaves(tree):
    host = "host" in (leaf.sharding.memory_kind or "")
    out["host_bytes" if host else "device_bytes"] += leaf.nbytes
  return out


def block_of(config: ModelConfig, *, batch: int, slots: int, new: int) -> int:
  """Tokens to decode at once: 32, fewer where the scores over a long cache grow too large."""
  return max(1, min(_BLOCK, new, _SCORES // (batch * config.heads * slots)))


def fed_block(
  decoder: Decoder,
  method: Method,
  state: State,
  tokens: Int[np.ndarray, "B N"],
  lengths: Int[np.ndarray, "B"],
  *,
  start: int,
  block: int,
) -> tuple[Float[np.ndarray, "B n V"], dict[str, np.ndarray], State]:
  """Feed the given tokens from place ``start`` on; every one of them makes its own selection.

  Equals single steps. The last block is padded, so that one shape is compiled.

  Args:
    state: after the tokens before ``start``; used up.
    tokens: all inputs, the first at position ``lengths``.
    block: tokens handed in, fewer at the end of ``tokens``.

  Returns:
    Logits after each token fed, the method's statistics by name, ``[L, B, n, ...]``, and the state.
  """
  count = tokens.shape[1]
  offsets = np.arange(start, start + block)
  here = offsets < count
  piece = np.where(here, tokens[:, np.minimum(offsets, count - 1)], 0).astype(np.int32)
  positions = np.where(here, lengths[:, None] + offsets, -1).astype(np.int32)
  out, state, figures = decode_step(
    decoder, method, state, jnp.asarray(piece), jnp.asarray(positions)
  )
  kept = int(here.sum())
  stats = {name: x[:, :, :kept] for name, x in figures_of(figures).items()}
  return np.asarray(out)[:, :kept], stats, state


def teacher_forced(
  decoder: Decoder,
  method: Method,
  state: State,
  tokens: Int[np.ndarray, "B N"],
  lengths: Int[np.ndarray, "B"],
  *,
  block: int,
) -> tuple[Float[np.ndarray, "B N V"], dict[str, np.ndarray]]:
  """Feed given tokens after the prompt, block by block, and keep all logits.

  Args:
    state: after the prompt; used up.
    tokens, block: as in :func:`fed_block`.

  Returns:
    Logits after each token, and the method's statistics by name, ``[L, B, N, ...]``.
  """
  logits, stats = [], []
  for start in range(0, tokens.shape[1], block):
    out, figures, state = fed_block(
      decoder, method, state, tokens, lengths, start=start, block=block
    )
    logits.append(out)
    stats.append(figures)
  joined = {name: np.concatenate([s[name] for s in stats], axis=2) for name in stats[0]}
  return np.concatenate(logits, axis=1), joined


def greedy_from(
  decoder: Decoder,
  method: Method,
  state: State,
  last: Sequence[int],
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
  steps: int | None = None,
  stop: Sequence[int] = (),
) -> tuple[list[list[int]], list[dict[str, np.ndarray]]]:
  """Greedy continuations, every token of them chosen under the method.

  A prompt's attention is exact, and so would be the token that follows it. So the state holds each
  prompt but for its last token, which is decoded first.

  Args:
    state: after the prompts less their last tokens, with room for ``new``; used up.
    last: the last token of each prompt.
    lengths: tokens in the state.
    new: tokens to generate at most; a row ends before a stop token.
    steps: length of the program, ``new`` by default; one of more steps serves other ``new``, too.

  Returns:
    The tokens of each row, and the statistics of every step taken, ``[L, B, 1, ...]``.
  """
  rows = Rows(
    state=state,
    token=jnp.asarray(last, jnp.int32),
    position=jnp.asarray(lengths, jnp.int32),
    live=jnp.ones(len(lengths), bool),
  )
  tokens, stats, count, _ = decode_block(
    decoder,
    method,
    rows,
    jnp.full(len(lengths), new, jnp.int32),
    jax.random.split(jax.random.key(0), len(lengths)),  # greedy draws nothing
    jnp.asarray(stop, jnp.int32),
    steps=new if steps is None else steps,
    sampling=Sampling(),
  )
  ends = {-1, *stop}
  made = [[token for token in row if token not in ends] for row in np.asarray(tokens).tolist()]
  figures = figures_of(stats)
  return made, [{name: x[i] for name, x in figures.items()} for i in range(int(count))]
