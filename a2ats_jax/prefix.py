"""A long document read once, copied into a batch, and asked many questions.

The document goes through the model as a prompt does. A question is appended to it token by token,
as decoding would, so that its answer does not depend on what else is asked; what a method keeps of
the document was decided without knowing the question.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.forward import geometry_of, hidden_step
from a2ats_jax.generate import (
  BLOCK,
  Block,
  Progress,
  begin,
  checked_streams,
  go_on,
  pad_prompts,
  prefill,
)
from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.methods.layout import fork
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.prompt import chunk_of
from a2ats_jax.sampling import Sampling
from a2ats_jax.sharding import committed
from a2ats_jax.typing import Array, Float, Int

PIECE = 16  # tokens of questions appended at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
  """A document in a method's state. Nothing here uses it up: it can be continued many times.

  Attributes:
    method: whose state it is.
    state: of one row.
    geometry: of the state; its ``new`` is the room for a question and its answer together.
    tokens: of the document.
  """

  method: Method
  state: State
  geometry: Geometry
  tokens: Int[np.ndarray, "n"]


def read_prefix(
  decoder: Decoder,
  method: Method,
  tokens: Sequence[int],
  *,
  new: int,
  progress: Progress | None = None,
) -> Prefix:
  """Run a document through the model.

  Args:
    new: room after it, in tokens: for the longest question and its answer together.
    progress: called after every layer.

  Raises:
    UserError: a document as :func:`a2ats_jax.generate.pad_prompts` refuses it, or no room.
  """
  if new < 1:
    raise UserError(f"new: expected room for at least 1 token, got {new}")
  padded, lengths = pad_prompts([tokens], decoder.config, new=new)
  _, state = prefill(decoder, method, padded, lengths, new=new, progress=progress)
  geometry = geometry_of(decoder.config, batch=1, prompt=padded.shape[1], new=new)
  return Prefix(method=method, state=state, geometry=geometry, tokens=np.asarray(tokens, np.int32))


def continue_prefix(
  decoder: Decoder,
  prefix: Prefix,
  questions: Sequence[Sequence[int]],
  *,
  new: int,
  sampling: Sampling = Sampling(),
  stop: Sequence[int] = (),
  seed: int = 0,
  streams: Sequence[int] | None = None,
  block: int = BLOCK,
) -> Iterator[Block]:
  """Append a question to each of several copies of a document, and generate what follows.

  Args:
    questions: tokens, at least one each; rows may differ in length.
    new: tokens to make of each row at most.
    sampling, stop, seed, streams: as in :func:`a2ats_jax.generate.start`.
    block: tokens between two yields.

  Yields:
    As :func:`a2ats_jax.generate.generate`: the first token of every row, then blocks.

  Raises:
    UserError: at the first yield: a question that is empty, outside the vocabulary, or with its
      answer longer than the prefix has room for; a prefix of another model's shape; a number out
      of its range.
  """
  if block < 1:
    raise UserError(f"block: expected at least 1 token, got {block}")
  streams = checked_streams(len(questions), new=new, seed=seed, streams=streams)
  tokens, lengths = _padded(prefix, questions, decoder.config, new=new)
  method, length = prefix.method, len(prefix.tokens)
  state = fork(method, prefix.state, prefix.geometry, rows=len(questions))
  logits, state = committed((jnp.zeros((len(questions), decoder.config.vocab)), state))
  size = chunk_of(int(lengths.max()), PIECE)
  for start in range(0, int(lengths.max()), size):
    piece = tokens[:, start : start + size]
    place = np.broadcast_to(start + np.arange(size, dtype=np.int32), piece.shape)
    positions = np.where(place < lengths[:, None], length + place, -1).astype(np.int32)
    last = lengths - 1 - start
    logits, state = _append(
      decoder, method, state, logits, *jax.device_put((piece, positions, last))
    )
  made, generation = begin(
    logits,
    state,
    length + lengths,
    new=new,
    sampling=sampling,
    stop=stop,
    seed=seed,
    streams=streams,
  )
  yield made
  yield from go_on(decoder, method, made, generation, block=block)


@partial(jax.jit, donate_argnames=("state", "logits"))
def _append(
  decoder: Decoder,
  method: Method,
  state: State,
  logits: Float[Array, "B V"],
  tokens: Int[Array, "B S"],
  positions: Int[Array, "B S"],
  last: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], State]:
  """Append S tokens, and take the logits of the rows whose last token is among them.

  Args:
    last: where that is, not in 0 .. S - 1 for a row that ends elsewhere.
  """
  x, state, _ = hidden_step(decoder, method, state, tokens, positions)
  here = (last >= 0) & (last < tokens.shape[1])
  ends = jnp.take_along_axis(x, jnp.where(here, last, 0)[:, None, None], axis=1)
  return jnp.where(here[:, None], decoder.logits(ends)[:, 0], logits), state


def _padded(
  prefix: Prefix, questions: Sequence[Sequence[int]], config: ModelConfig, *, new: int
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B"]]:
  """Questions as one array of whole pieces, and their lengths, if the prefix can take them."""
  g = prefix.geometry
  mine = geometry_of(config, batch=1, prompt=g.prompt, new=g.new)
  names = ("layers", "heads", "kv_heads", "head_dim", "local_layers", "window")
  if differ := [name for name in names if getattr(g, name) != getattr(mine, name)]:
    shapes = (", ".join(f"{name} {getattr(x, name)}" for name in differ) for x in (g, mine))
    raise UserError("prefix: made for {}; this model has {}".format(*shapes))
  if not questions or min(map(len, questions)) == 0:
    raise UserError("prefix: expected questions of at least one token each")
  longest = max(map(len, questions))
  if longest + new > g.new:
    raise UserError(
      f"prefix: a question of {longest} tokens and {new} new ones exceed its room of {g.new}; "
      "read the document again with more room"
    )
  low, high = min(map(min, questions)), max(map(max, questions))
  if low < 0 or high >= config.vocab:
    raise UserError(f"prefix: token ids must lie in [0, {config.vocab}), got {low} to {high}")
  size = chunk_of(longest, PIECE)
  tokens = np.zeros((len(questions), size * -(-longest // size)), np.int32)
  for row, question in zip(tokens, questions):
    row[: len(question)] = question
  return tokens, np.asarray([len(question) for question in questions], np.int32)
