"""A model whose layers are given one by one: prompts, decode steps and greedy or drawn tokens.

What :mod:`a2ats_jax.generate` is for this library's own decoder, for any model that can be taken
apart where queries, keys and values exist.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.generate import Rows, begin, checked_streams, padded
from a2ats_jax.methods import caches
from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.sliding import Sliding
from a2ats_jax.prompt import Projected, prefill_by_chunks
from a2ats_jax.rope import Rope, RopeConfig, make_rope
from a2ats_jax.sampling import Sampling, sample
from a2ats_jax.sharding import committed
from a2ats_jax.typing import Array, Float, Int, Key


@runtime_checkable
class Layer(Protocol):
  """One layer: a pytree, in which layers of one kind differ by their arrays alone."""

  @property
  def local(self) -> bool:
    """Whether it sees only a window of the latest tokens."""
    ...

  def project(self, x: Float[Array, "B S E"]) -> Projected:
    """Queries, keys and values before rotary embedding, queries such that logits are
    ``q k / sqrt(D)``.
    """
    ...

  def finish(
    self, x: Float[Array, "B S E"], attended: Float[Array, "B S H D"]
  ) -> Float[Array, "B S E"]:
    """What leaves the layer, in the dtype of ``x``."""
    ...


@runtime_checkable
class Ends(Protocol):
  """What lies before the first layer and after the last; a pytree."""

  def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    """What enters the first layer."""
    ...

  def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    """Logits of what leaves the last layer, float32."""
    ...


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["layers", "ends"],
  meta_fields=["vocab", "rope", "window", "local_rope"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
  """A model in the parts that a KV method needs. Holds the zoo's arrays, not copies of them.

  Attributes:
    layers: all of them, in order. The method's layers are the global ones, numbered from 0.
    ends: embedding, final norm and head.
    vocab: V.
    rope: of the global layers.
    window: tokens that a local layer sees, the query's own included; 0 without local layers.
    local_rope: of the local layers.
  """

  layers: tuple[Layer, ...]
  ends: Ends
  vocab: int
  rope: RopeConfig
  window: int = 0
  local_rope: RopeConfig | None = None

  def numbered(self) -> Iterator[tuple[Layer, int]]:
    """Every layer with its number among the local, or the global, ones."""
    counts = [0, 0]
    for layer in self.layers:
      yield layer, counts[layer.local]
      counts[layer.local] += 1

  def geometry(self, *, batch: int, prompt: int, new: int) -> Geometry:
    """The shape of a cache, keys and values in the dtype that the layers make.

    Raises:
      UserError: every layer is local.
    """
    local = sum(layer.local for layer in self.layers)
    if local == len(self.layers):
      raise UserError("adapter: every layer sees only a window, there is nothing to retrieve from")

    def first(model: Adapted, tokens: Array) -> Projected:
      layer = next(layer for layer in model.layers if not layer.local)
      return layer.project(model.ends.embed(tokens))

    q, k, _ = jax.eval_shape(first, self, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return Geometry(
      batch=batch,
      layers=len(self.layers) - local,
      heads=q.shape[2],
      kv_heads=k.shape[2],
      head_dim=k.shape[3],
      prompt=prompt,
      new=new,
      dtype=k.dtype,
      local_layers=local,
      window=self.window,
    )

  def way(self, layer: Layer, method: Method) -> tuple[Method, Rope]:
    """What keeps a layer's cache, and its rotary embedding."""
    if not layer.local:
      return method, make_rope(self.rope)
    assert self.local_rope is not None
    return Sliding(window=self.window), make_rope(self.local_rope)


@partial(jax.jit, donate_argnames=("state", "x"))
def _over_prompt(
  layer: Layer,
  keeper: Method,
  rope: Rope,
  state: State,
  x: Float[Array, "B T E"],
  lengths: Int[Array, "B"],
  number: Int[Array, ""],
) -> tuple[Float[Array, "B T E"], State]:
  """One layer over a whole prompt; one program serves every layer of a kind."""
  return prefill_by_chunks(
    keeper,
    state,
    x,
    project=layer.project,
    finish=layer.finish,
    lengths=lengths,
    rope=rope,
    layer=number,
  )


@jax.jit
def _last_logits(
  ends: Ends, x: Float[Array, "B T E"], lengths: Int[Array, "B"]
) -> Float[Array, "B V"]:
  return ends.logits(jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1))[:, 0]


@jax.jit
def _embed(ends: Ends, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
  return ends.embed(tokens)


def prefill(
  model: Adapted,
  method: Method,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
) -> tuple[Float[Array, "B V"], State]:
  """Run prompts through the model, layer by layer over their whole length.

  Args:
    tokens: padded on the right. lengths: tokens of each row, at least 1.
    new: tokens the state must have room for after the prompt.

  Returns:
    Logits after each row's last token, and the state.
  """
  geometry = model.geometry(batch=len(tokens), prompt=tokens.shape[1], new=new)
  rows = jnp.asarray(lengths)
  x, state = _embed(model.ends, jnp.asarray(tokens)), caches.init(method, geometry)
  x, (far, near) = committed((x, caches.split(state)))
  for layer, number in model.numbered():
    keeper, rope = model.way(layer, method)
    state, index = near if layer.local else far, jnp.asarray(number, jnp.int32)
    x, state = _over_prompt(layer, keeper, rope, state, x, rows, index)
    far, near = (far, state) if layer.local else (state, near)
  return _last_logits(model.ends, x, rows), caches.join(far, near)


@jax.jit
def _step(
  layer: Layer,
  keeper: Method,
  rope: Rope,
  state: State,
  x: Float[Array, "B S E"],
  positions: Int[Array, "B S"],
  number: Int[Array, ""],
) -> tuple[Float[Array, "B S E"], State, Any]:
  """A program of its own, so that the layers of a kind are traced once."""
  q, k, v = layer.project(x)
  out, state, stats = keeper.attend(state, q, k, v, positions=positions, rope=rope, layer=number)
  return layer.finish(x, out), state, stats


@partial(jax.jit, donate_argnames="state")
def decode_step(
  model: Adapted,
  method: Method,
  state: State,
  tokens: Int[Array, "B S"],
  positions: Int[Array, "B S"],
) -> tuple[Float[Array, "B S V"], State, Any]:
  """Append S tokens to every row and return the logits after each.

  Args:
    state: used up. It has room for as many tokens as its prefill was told; later ones are lost.
    positions: of the tokens, each row's going up by one; -1 for a row or place that takes none.

  Returns:
    Logits, the new state, and the method's statistics with a leading axis of global layers.
  """
  x, stats = model.ends.embed(tokens), []
  far, near = caches.split(state)
  for layer, number in model.numbered():
    keeper, rope = model.way(layer, method)
    index = jnp.asarray(number, jnp.int32)
    if layer.local:
      x, near, _ = _step(layer, keeper, rope, near, x, positions, index)
    else:
      x, far, one = _step(layer, keeper, rope, far, x, positions, index)
      stats.append(one)
  stats = jax.tree.map(lambda *layers: jnp.stack(layers), *stats)
  return model.ends.logits(x), caches.join(far, near), stats


@partial(jax.jit, static_argnames="sampling", donate_argnames="rows")
def _next(
  model: Adapted,
  method: Method,
  rows: Rows,
  keys: Key[Array, "B"],
  stop: Int[Array, "stops"],
  *,
  sampling: Sampling,
) -> tuple[Int[Array, "B"], Rows]:
  """One more token of every row that is live, -1 of the others."""
  read = jnp.where(rows.live, rows.token, 0)[:, None]
  places = jnp.where(rows.live, rows.position, -1)[:, None]
  logits, state, _ = decode_step(model, method, rows.state, read, places)
  position = rows.position + rows.live.astype(jnp.int32)
  token = sample(logits[:, 0], sampling, jax.vmap(jax.random.fold_in)(keys, position))
  made = jnp.where(rows.live, token, -1)
  live = rows.live & ~jnp.any(token[:, None] == stop[None], axis=1)
  return made, Rows(state=state, token=token, position=position, live=live)


def generate(
  model: Adapted,
  method: Method,
  prompts: Sequence[Sequence[int]],
  *,
  new: int,
  sampling: Sampling = Sampling(),
  stop: Sequence[int] = (),
  seed: int = 0,
  streams: Sequence[int] | None = None,
) -> Int[np.ndarray, "B n"]:
  """Continue prompts of any lengths; draws are those of :func:`a2ats_jax.generate.start`.

  Args:
    new: tokens to make of each row at most.
    stop: tokens that end a row. sampling, seed, streams: as there.

  Returns:
    As many tokens as the longest row has: each row's end with its stop token and are -1 after it.

  Raises:
    UserError: no prompt, an empty one, a token outside the vocabulary, or a number out of range.
  """
  streams = checked_streams(len(prompts), new=new, seed=seed, streams=streams)
  tokens, lengths = padded(prompts, model.vocab)
  logits, state = prefill(model, method, tokens, lengths, new=new)
  draws = {"sampling": sampling, "stop": stop, "seed": seed, "streams": streams}
  first, made = begin(logits, state, lengths, new=new, **draws)
  columns, rows = [jnp.asarray(first.tokens[:, 0])], made.rows
  while len(columns) < new and bool(rows.live.any()):
    column, rows = _next(model, method, rows, made.keys, made.stop, sampling=sampling)
    columns.append(column)
  return np.stack(jax.device_get(columns), axis=1)


@jax.jit
def _projected(layer: Layer, x: Float[Array, "B T E"]) -> Projected:
  return layer.project(x)


def keys_and_queries(
  model: Adapted, tokens: Int[np.ndarray, "B T"]
) -> tuple[Float[np.ndarray, "L N K D"], Float[np.ndarray, "L N H D"]]:
  """What codebooks are trained on (:func:`train_codebooks.train_on_arrays`), of some text.

  Args:
    tokens: B documents of T tokens; N is B T.

  Returns:
    Keys and queries of the global layers before rotary embedding, on the host.
  """
  geometry = model.geometry(batch=len(tokens), prompt=tokens.shape[1], new=0)
  geometry = dataclasses.replace(geometry, layers=1)
  lengths, first = jnp.full(len(tokens), tokens.shape[1], jnp.int32), jnp.asarray(0, jnp.int32)
  x, keys, queries = _embed(model.ends, jnp.asarray(tokens)), [], []
  for layer in model.layers:
    if not layer.local:
      q, k, _ = jax.device_get(_projected(layer, x))
      keys.append(k.reshape(-1, *k.shape[2:]))
      queries.append(q.reshape(-1, *q.shape[2:]))
    keeper, rope = model.way(layer, Full())
    x, _ = _over_prompt(layer, keeper, rope, keeper.init(geometry), x, lengths, first)
  return np.stack(keys), np.stack(queries)
