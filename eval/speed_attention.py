"""Decode attention of one layer, timed: every method beside plain attention over the same tokens.

The keys are drawn (:mod:`eval.speed_inputs`), taken in by each method as a prompt's are, and one
token after the other follows. A step appends the token and attends; its state is donated, so that
nothing is copied that a model's loop would not copy.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from a2ats_jax import attention
from a2ats_jax.methods import dense
from a2ats_jax.methods.base import Geometry, Method, PromptLayer, State, Stats
from a2ats_jax.methods.full import Full
from a2ats_jax.rope import Rope, make_rope, rotate
from a2ats_jax.typing import Array, Float, Int
from eval.lanes import REPEATS, Lane, Program, Step, Variant
from eval.options import Case
from eval.speed_inputs import Drawn, LayerShape

DOT_PRODUCT = "dot_product_attention"


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DotProduct:
  """:func:`jax.nn.dot_product_attention` over the prompt, with no mask and nothing to append.

  What plain JAX can do at best: a token that follows the prompt is not stored.
  """

  @property
  def name(self) -> str:
    return DOT_PRODUCT

  def init(self, geometry: Geometry) -> dense.DenseCache:
    g = geometry
    none = jnp.zeros((g.batch, g.prompt, g.kv_heads, g.head_dim), g.dtype)
    return dense.DenseCache(none[None], none[None])

  def absorb(
    self, state: dense.DenseCache, prompt: PromptLayer, *, layer: int | Array
  ) -> dense.DenseCache:
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return dense.DenseCache(
      put(state.k, prompt.rotated.astype(state.k.dtype)),
      put(state.v, prompt.values.astype(state.v.dtype)),
    )

  def attend(
    self,
    state: dense.DenseCache,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], dense.DenseCache, Stats]:
    keys, values = state.k[layer], state.v[layer]
    with jax.numpy_dtype_promotion("standard"):  # it promotes bfloat16 by itself
      out = jax.nn.dot_product_attention(rotate(q, positions, rope), keys, values)
    read = jnp.full_like(positions, keys.shape[1] - 1)
    return out, state, dense.dense_stats(read, q.shape[2], k.shape[2], keys)


def geometry_of(shape: LayerShape, *, batch: int, T: int, new: int, dtype: Any) -> Geometry:
  """The cache of one layer."""
  return Geometry(
    batch=batch,
    layers=1,
    heads=shape.heads,
    kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    prompt=T,
    new=new,
    dtype=dtype,
  )


@partial(jax.jit, static_argnames="geometry")
def absorb(
  method: Method,
  keys: Float[Array, "B T K D"],
  values: Float[Array, "B T K D"],
  rope: Rope,
  *,
  geometry: Geometry,
) -> State:
  """The state after the prompt."""
  b, t, _, _ = keys.shape
  positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
  prompt = PromptLayer(keys, rotate(keys, positions, rope), values, jnp.full((b,), t, jnp.int32))
  return method.absorb(method.init(geometry), prompt, layer=0)


@partial(jax.jit, donate_argnames="state")
def attend(
  method: Method,
  state: State,
  q: Float[Array, "B 1 H D"],
  k: Float[Array, "B 1 K D"],
  v: Float[Array, "B 1 K D"],
  positions: Int[Array, "B 1"],
  rope: Rope,
) -> tuple[Float[Array, "B 1 H D"], State, Any]:
  """One token; the step that is timed."""
  return method.attend(state, q, k, v, positions=positions, rope=rope, layer=0)


def _append(rope: Rope, cache: dense.DenseCache, token: tuple[Array, ...]) -> dense.DenseCache:
  """The first half of full attention's step."""
  _, k, v, positions = token
  return dense.DenseCache(
    dense.append(cache.k, rotate(k, positions, rope), positions, 0),
    dense.append(cache.v, v, positions, 0),
  )


def _attend_all(
  rope: Rope, cache: dense.DenseCache, token: tuple[Array, ...]
) -> tuple[Float[Array, "B 1 H D"], Stats]:
  """The second half."""
  q, k, _, positions = token
  mask = dense.visible(positions, cache.k.shape[3])[:, :, None]
  part = dense.attend_masked(rotate(q, positions, rope), cache.k[0], cache.v[0], mask)
  stats = dense.dense_stats(positions, q.shape[2], k.shape[2], cache.k)
  return attention.finish(part).astype(q.dtype), stats


def _in_turn(of: Callable[[Any], Any], two: tuple[Any, Any]) -> Any:
  """A function of two arguments in turn, :data:`eval.lanes.REPEATS` times; the second's result."""
  both = jax.tree.map(lambda *x: jnp.stack(x), *two)

  def turn(i: Array) -> Any:
    return of(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i % 2, keepdims=False), both))

  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, two[1]))
  return jax.lax.fori_loop(0, REPEATS, lambda i, _: turn(i), nothing)


@jax.jit
def _score(
  method: Any, state: State, queries: tuple[Array, Array], positions: Array, rope: Rope
) -> Array:
  return _in_turn(lambda q: method.score(state, q, positions, rope, 0), queries)


@jax.jit
def _choose(method: Any, state: State, tables: tuple[Array, Array], positions: Array) -> Any:
  counts = dense.read(state.index.counts, 0)
  return _in_turn(lambda table: method.choose(state, counts, table, positions[:, 0], 0), tables)


def tokens_of(drawn: Drawn) -> list[tuple[Array, ...]]:
  """What :func:`attend` takes of each token after the prompt."""
  batch, t = drawn.keys.shape[:2]
  return [
    (
      *(x[:, i : i + 1] for x in (drawn.q, drawn.k, drawn.v)),
      jnp.full((batch, 1), t + i, jnp.int32),
    )
    for i in range(drawn.q.shape[1])
  ]


def variants_of(
  cases: Iterable[Case], drawn: Drawn, shape: LayerShape, *, dtype: Any
) -> list[Variant]:
  """One method at several budgets, compiled for a state that they share.

  Args:
    cases: of one method and its options.
    drawn: with as many tokens after the prompt as all cases make steps.
  """
  cases, rope = list(cases), make_rope(shape.rope)
  batch, t = drawn.keys.shape[:2]
  geometry = geometry_of(shape, batch=batch, T=t, new=drawn.q.shape[1], dtype=dtype)
  state = absorb(cases[0].method, drawn.keys, drawn.values, rope, geometry=geometry)
  lane = Lane(state, tokens_of(drawn))
  return [_variant(case, lane, rope) for case in cases]


def _variant(case: Case, lane: Lane, rope: Rope) -> Variant:
  method: Any = case.method
  parts: dict[str, Callable[[], Any]] = {}
  if isinstance(method, Full):
    step, temp = _full(lane, rope)
  else:
    step = Program(_attend, (method, rope), lane.state, lane.token)
    temp = step.temp_bytes
  if hasattr(method, "score") and hasattr(method, "choose"):
    parts = _parts(method, lane, rope)
  return Variant(case, lane, step, parts=parts, temp_bytes=temp)


def _attend(
  fixed: tuple[Method, Rope], state: State, token: tuple[Array, ...]
) -> tuple[Array, State, Any]:
  return attend(fixed[0], state, *token, fixed[1])


def _parts(method: Any, lane: Lane, rope: Rope) -> dict[str, Callable[[], Any]]:
  """The score table of the next token, and the choice from the last table made.

  Each takes the one before too, in turn, so that no two in a row are of the same numbers.
  """
  queries = [lane.token[0]] * 2
  tables = [_score(method, lane.state, (queries[0], queries[1]), lane.token[3], rope)] * 2

  def score() -> Array:
    q, _, _, positions = lane.token
    queries[:] = queries[1], q
    new = _score(method, lane.state, (queries[0], queries[1]), positions, rope)
    tables[:] = tables[1], new
    return new

  def choose() -> Any:
    return _choose(method, lane.state, (tables[0], tables[1]), lane.token[3])

  return {"score": score, "selection": choose}


def _full(lane: Lane, rope: Rope) -> tuple[Step, int | None]:
  """Full attention in two programs, one that appends and one that attends.

  As one program of one layer, XLA's CPU backend copies the cache several times around the write,
  ten times the time at 8K tokens, and a baseline must not pay for that.
  """
  write = Program(_append, rope, lane.state, lane.token)
  read = Program(_attend_all, rope, lane.state, lane.token, donate=False)

  def step(state: State, token: tuple[Array, ...]) -> tuple[Array, State, Any]:
    state = write(state, token)
    out, stats = read(state, token)
    return out, state, stats

  sizes = [size for size in (write.temp_bytes, read.temp_bytes) if size is not None]
  return step, max(sizes, default=None)
