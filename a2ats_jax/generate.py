"""Prompts, decode steps and whole continuations of a decoder under any KV method."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.forward import geometry_of, hidden_step, layer_over_prompt
from a2ats_jax.methods import caches
from a2ats_jax.methods.base import Method, State
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.prompt import CHUNK, chunk_of
from a2ats_jax.sampling import Sampling, sample
from a2ats_jax.sharding import committed, device_get
from a2ats_jax.typing import Array, Bool, Float, Int, Key

BLOCK = 16  # tokens made on the device between two looks at them

Progress = Callable[[int, int], None]  # (done, of)


def padded(
  prompts: Sequence[Sequence[int]], vocab: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
  """Prompts as one array, padded on the right to one of few widths, and their lengths.

  Raises:
    UserError: no prompt, an empty one, or a token outside the vocabulary.
  """
  if not prompts:
    raise UserError("prompt: expected at least one, got none")
  lengths = np.asarray([len(p) for p in prompts], np.int32)
  if lengths.min() == 0:
    raise UserError(f"prompt: row {int(lengths.argmin())} is empty, expected at least one token")
  ids = [token for prompt in prompts for token in prompt]
  if min(ids) < 0 or max(ids) >= vocab:
    raise UserError(f"prompt: token ids must lie in [0, {vocab}), got {min(ids)} to {max(ids)}")
  longest = int(lengths.max())
  chunk = chunk_of(longest, CHUNK)
  tokens = np.zeros((len(prompts), chunk * -(-longest // chunk)), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, lengths


def pad_prompts(
  prompts: Sequence[Sequence[int]], config: ModelConfig, *, new: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
  """Prompts of different lengths as one array, padded on the right, and their lengths.

  Raises:
    UserError: no prompt, an empty one, a token outside the vocabulary, or one that with ``new``
      tokens exceeds the model's context.
  """
  tokens, lengths = padded(prompts, config.vocab)
  if int(lengths.max()) + new > config.context:
    raise UserError(
      f"prompt: {int(lengths.max())} tokens and {new} new ones exceed the model's context "
      f"of {config.context}"
    )
  return tokens, lengths


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
  geometry = geometry_of(config, batch=len(tokens), prompt=tokens.shape[1], new=new)
  state = caches.init(method, geometry)
  ids, rows, state = committed((jnp.asarray(tokens), jnp.asarray(lengths), state))
  x = decoder.embed(ids)
  far, near = caches.split(state)
  for layer in range(config.layers):
    index = jnp.asarray(layer, jnp.int32)
    local = config.is_local(layer)
    state = near if local else far
    x, state = layer_over_prompt(decoder, method, state, x, rows, index, local=local, chunk=CHUNK)
    far, near = (far, state) if local else (state, near)
    if progress is not None:
      x.block_until_ready()
      progress(layer + 1, config.layers)
  return _last_logits(decoder, x, rows), caches.join(far, near)


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
    Logits, the new state, and the method's statistics with a leading axis of global layers.
  """
  x, state, stats = hidden_step(decoder, method, state, tokens, positions)
  return decoder.logits(x), state, stats


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["state", "token", "position", "live"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Where the rows of a batch stand between two decode steps.

  Attributes:
    state: the method's; it holds every token of a row but the last.
    token: the last token of each row, which the next step reads in.
    position: where that token goes.
    live: rows that go on; the others are padding in every later step.
  """

  state: State
  token: Int[Array, "B"]
  position: Int[Array, "B"]
  live: Bool[Array, "B"]


@partial(jax.jit, static_argnames=("steps", "sampling"), donate_argnames="rows")
def decode_block(
  decoder: Decoder,
  method: Method,
  rows: Rows,
  limit: Int[Array, "B"],
  keys: Key[Array, "B"],
  stop: Int[Array, "stops"],
  *,
  steps: int,
  sampling: Sampling,
) -> tuple[Int[Array, "B {steps}"], Any, Int[Array, ""], Rows]:
  """Up to ``steps`` decode steps on the device, each reading in a row's last token.

  A row is padding from its stop token on, or from its limit on; steps in which every row is padding
  do not run. Every token of a row equals that of single steps, whatever the others do.

  Args:
    rows: used up.
    limit: tokens that each row may make here, at most ``steps`` and what its state has room for.
      A row at its limit is still live, and goes on in the next block.
    keys: of the rows' draws; a token's draw depends on its row's key and its position.
    stop: tokens that end a row.
    steps: length of the program.

  Returns:
    The tokens made, -1 where a row is padding; the steps' statistics with a leading axis of
    ``steps``, zero where no step ran; how many steps ran; and the rows after them.
  """

  def step(rows: Rows, i: Int[Array, ""]) -> tuple[Int[Array, "B"], Any, Rows]:
    going = rows.live & (i < limit)
    logits, state, stats = decode_step(
      decoder,
      method,
      rows.state,
      jnp.where(going, rows.token, 0)[:, None],
      jnp.where(going, rows.position, -1)[:, None],
    )
    position = rows.position + going.astype(jnp.int32)
    token = sample(logits[:, 0], sampling, _fold(keys, position))
    token = jnp.where(going, token, rows.token)
    live = rows.live & ~_among(token, stop)
    rows = Rows(state=state, token=token, position=position, live=live)
    return jnp.where(going, token, -1), stats, rows

  def going_on(carry):
    i, rows, _, _ = carry
    return (i < steps) & jnp.any(rows.live & (i < limit))

  def body(carry):
    i, rows, tokens, stats = carry
    made, figures, rows = step(rows, i)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, made, i, 1)
    stats = jax.tree.map(
      lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), stats, figures
    )
    return i + 1, rows, tokens, stats

  first = jnp.zeros((), jnp.int32)
  _, figures, _ = step(rows, first)  # for its shape alone: the compiler drops the step itself
  stats = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), figures)
  tokens = jnp.full((len(rows.token), steps), -1, jnp.int32)
  count, rows, tokens, stats = jax.lax.while_loop(going_on, body, (first, rows, tokens, stats))
  return tokens, stats, count, rows


def _fold(keys: Key[Array, "B"], data: Int[Array, "B"]) -> Key[Array, "B"]:
  return jax.vmap(jax.random.fold_in)(keys, data)


def _among(token: Int[Array, "B"], stop: Int[Array, "stops"]) -> Bool[Array, "B"]:
  return jnp.any(token[:, None] == stop[None, :], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """What a block made.

  Attributes:
    tokens: end with a row's stop token and are -1 from then on; on the host.
    stats: the method's statistics of the steps that made them, on the device, with a leading axis
      of the block's length, zero beyond the last token. None for the first token, which the
      prompt's exact attention gives.
    live: rows that go on; on the host.
  """

  tokens: Int[np.ndarray, "B n"]
  stats: Any
  live: Bool[np.ndarray, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """A batch that is being continued: from :func:`start`, and from one :func:`advance` to the next.

  Attributes:
    rows: where each row stands.
    keys: of each row's draws.
    stop: tokens that end a row.
    sampling: how tokens are drawn.
    room: tokens that may still be made.
  """

  rows: Rows
  keys: Key[Array, "B"]
  stop: Int[Array, "stops"]
  sampling: Sampling
  room: int


@partial(jax.jit, static_argnames="sampling")
def _first_token(
  logits: Float[Array, "B V"],
  lengths: Int[Array, "B"],
  streams: Int[Array, "B"],
  stop: Int[Array, "stops"],
  seed: Key[Array, ""],
  *,
  sampling: Sampling,
) -> tuple[Int[Array, "B"], Bool[Array, "B"], Key[Array, "B"]]:
  """The token after each prompt, whether its row goes on, and the key of each row's draws."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seed, streams)
  token = sample(logits, sampling, _fold(keys, lengths))
  return token, ~_among(token, stop), keys


def start(
  decoder: Decoder,
  method: Method,
  prompts: Sequence[Sequence[int]],
  *,
  new: int,
  sampling: Sampling = Sampling(),
  stop: Sequence[int] = (),
  seed: int = 0,
  streams: Sequence[int] | None = None,
  progress: Progress | None = None,
) -> tuple[Block, Generation]:
  """Run prompts through the model and draw the first token after each.

  A draw depends on the seed, the row's stream and the token's position, and on nothing else but the
  row's logits: not on the other rows, nor on how many tokens are made at once. A prompt alone, with
  the stream it had in a batch, is continued as in that batch, as far as its logits are the same
  numbers.

  Args:
    new: room: tokens that may be made of each row, this one included.
    stop: tokens that end a row.
    seed: of all draws, 0 to 2^32 - 1; greedy draws nothing.
    streams: a number for each row, 0 to 2^31 - 1; 0, 1, ... unless given. Equal prompts in
      different streams are continued differently.
    progress: called after every layer of the prompts.

  Returns:
    A block of one token, and the generation that goes on from it.

  Raises:
    UserError: a prompt as in :func:`pad_prompts`, or a number out of its range.
  """
  streams = checked_streams(len(prompts), new=new, seed=seed, streams=streams)
  tokens, lengths = pad_prompts(prompts, decoder.config, new=new)
  logits, state = prefill(decoder, method, tokens, lengths, new=new, progress=progress)
  draws = {"sampling": sampling, "stop": stop, "seed": seed, "streams": streams}
  return begin(logits, state, lengths, new=new, **draws)


def checked_streams(
  rows: int, *, new: int, seed: int, streams: Sequence[int] | None
) -> Sequence[int]:
  """The rows' streams, 0, 1, ... unless given, after a look at what :func:`start` is asked for.

  Raises:
    UserError: a number out of its range.
  """
  if new < 1:
    raise UserError(f"new: expected at least 1 token, got {new}")
  if not 0 <= seed < 1 << 32:
    raise UserError(f"seed: expected a whole number from 0 to 2^32 - 1, got {seed}")
  streams = range(rows) if streams is None else streams
  if len(streams) != rows:
    raise UserError(f"streams: expected one a prompt, {rows}, got {len(streams)}")
  if not all(0 <= number < 1 << 31 for number in streams):
    raise UserError(f"streams: expected whole numbers from 0 to 2^31 - 1, got {list(streams)}")
  return streams


def begin(
  logits: Float[Array, "B V"],
  state: State,
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
  sampling: Sampling,
  stop: Sequence[int],
  seed: int,
  streams: Sequence[int],
) -> tuple[Block, Generation]:
  """Draw the first token of every row from the logits after its last one.

  Args:
    logits: after each row's last token. state: which holds that token.
    lengths: tokens of each row so far.
    new, sampling, stop, seed, streams: as in :func:`start`, checked.
  """
  position, numbers, ends = jax.device_put(
    (lengths, np.asarray(streams, np.int32), np.asarray(stop, np.int32))
  )
  token, live, keys = _first_token(
    logits, position, numbers, ends, jax.random.key(seed), sampling=sampling
  )
  rows = Rows(state=state, token=token, position=position, live=live)
  rows = committed(rows)
  first, going = device_get((token, live))
  block = Block(tokens=first[:, None], stats=None, live=going)
  return block, Generation(rows=rows, keys=keys, stop=ends, sampling=sampling, room=new - 1)


def advance(
  decoder: Decoder, method: Method, generation: Generation, *, new: int, block: int = BLOCK
) -> tuple[Block, Generation]:
  """Make the next tokens of every row that is live.

  Args:
    generation: used up, unless this raises.
    new: tokens to make of each row, at most ``block``.
    block: length of the compiled program, which serves any smaller ``new`` too.

  Returns:
    The block, as long as its longest row, and the generation that goes on from it.

  Raises:
    UserError: more tokens than a block holds or than there is room for.
  """
  if not 1 <= new <= block:
    raise UserError(f"new: expected 1 to {block} tokens, the length of a block, got {new}")
  if new > generation.room:
    raise UserError(
      f"new: the cache has room for {generation.room} more tokens a row, got {new} to make"
    )
  rows = generation.rows
  limit = jax.device_put(np.full(rows.token.shape, new, np.int32))
  tokens, stats, count, rows = decode_block(
    decoder,
    method,
    rows,
    limit,
    generation.keys,
    generation.stop,
    steps=block,
    sampling=generation.sampling,
  )
  tokens, count, live = device_get((tokens, count, rows.live))
  made = Block(tokens=tokens[:, :count], stats=stats, live=live)
  return made, dataclasses.replace(generation, rows=rows, room=generation.room - new)


def generate(
  decoder: Decoder,
  method: Method,
  prompts: Sequence[Sequence[int]],
  *,
  new: int,
  sampling: Sampling = Sampling(),
  stop: Sequence[int] = (),
  seed: int = 0,
  streams: Sequence[int] | None = None,
  block: int = BLOCK,
  progress: Progress | None = None,
) -> Iterator[Block]:
  """Continue prompts, some tokens at a time; the tokens are the same for every ``block``.

  Compiles what the prompts need and one block, whatever ``new``; nothing after the first block.

  Args:
    new: tokens to make of each row at most.
    block: tokens between two yields; each yield waits for the device.
    sampling, stop, seed, streams, progress: as in :func:`start`.

  Yields:
    The first token of every row, then blocks. Ends when every row has ``new`` tokens or its stop
    token.

  Raises:
    UserError: as :func:`start`, at the first yield.
  """
  if block < 1:
    raise UserError(f"block: expected at least 1 token, got {block}")
  made, generation = start(
    decoder,
    method,
    prompts,
    new=new,
    sampling=sampling,
    stop=stop,
    seed=seed,
    streams=streams,
    progress=progress,
  )
  yield made
  yield from go_on(decoder, method, made, generation, block=block)


def go_on(
  decoder: Decoder, method: Method, made: Block, generation: Generation, *, block: int
) -> Iterator[Block]:
  """The blocks after one that was made, until every row has its tokens or its stop token.

  Args:
    block: tokens between two yields.
  """
  while generation.room and made.live.any():
    made, generation = advance(
      decoder, method, generation, new=min(block, generation.room), block=block
    )
    yield made
