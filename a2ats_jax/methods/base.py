"""The protocol of a KV method: what a model hands over, and what it gets back.

A model's attention layer computes queries, keys and values BEFORE rotary embedding; everything
after that is the method's. A prompt goes through exact causal attention layer by layer, and the
method absorbs each layer's keys and values once (:meth:`Method.absorb`). After that every call of
:meth:`Method.attend` appends tokens and attends. State is a pytree, in and out; rows of a batch may
have different lengths everywhere, told by their tokens' positions.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from a2ats_jax.rope import Rope
from a2ats_jax.split import Split
from a2ats_jax.typing import Array, Float, Int

State = Any  # a pytree that only its own method looks into


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
  """The shape of a cache, known before anything is traced.

  Attributes:
    batch: B. layers: L. heads: H. kv_heads: K. head_dim: D.
    prompt: slots for prompt tokens, the longest row's (padded) length.
    new: tokens that may be appended to each row after its prompt.
    dtype: of cached keys and values.
    local_layers: layers beside these L that see a window only and are not the method's.
    window: tokens that those see.
  """

  batch: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  prompt: int
  new: int
  dtype: Any = jnp.float32
  local_layers: int = 0
  window: int = 0

  @property
  def capacity(self) -> int:
    """T: slots of a row's cache."""
    return self.prompt + self.new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
  """What a method asks of a prompt's exact attention, beside keys and values.

  Attributes:
    queries: W, how many of each row's last queries.
    sums: whether to add up the attention that every token receives.
  """

  queries: int = 0
  sums: bool = False

  def __or__(self, other: "Needs") -> "Needs":
    """What serves both."""
    return Needs(queries=max(self.queries, other.queries), sums=self.sums or other.sums)


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "rotated", "values", "lengths", "queries", "sums"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PromptLayer:
  """One layer's keys and values of a whole prompt, position t in slot t.

  Attributes:
    keys: before rotary embedding. rotated: after it. values.
    lengths: tokens of each row; slots from there on are padding and hold anything finite.
    queries: rotated, of each row's last W tokens: place i holds that of position
      ``length - W + i``, zeros where it is negative. None unless asked for (:class:`Needs`).
    sums: attention that each token received from all queries of its row, per query head; 0 for
      padding. None unless asked for.
  """

  keys: Float[Array, "B T K D"]
  rotated: Float[Array, "B T K D"]
  values: Float[Array, "B T K D"]
  lengths: Int[Array, "B"]
  queries: Float[Array, "B W H D"] | None = None
  sums: Float[Array, "B H T"] | None = None


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["length", "selected", "read", "tail", "read_bytes", "moved"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Stats:
  """What one step read, per query of the step; a leading axis L where layers are stacked.

  Attributes:
    length: cached tokens including the query's own, T; 0 for padding.
    selected: tokens chosen, after the union over the group; all where nothing is chosen.
    read: tokens whose key and value were attended exactly: chosen, sinks and window.
    tail: estimated share of attention that was not read exactly; 0 where nothing is estimated.
    read_bytes: bytes of cache that the step's attention and selection read: keys and values as they
      are stored, and whatever index, codes, bounds or landmarks were looked at to choose them. The
      positions of slots, by which a cache is masked, are not counted.
    moved: bytes copied out of a store of pages, which lies in host memory where there is one; 0 for
      a method whose cache lies on the device.
  """

  length: Int[Array, "*L B S"]
  selected: Int[Array, "*L B S K"]
  read: Int[Array, "*L B S K"]
  tail: Float[Array, "*L B S H"]
  read_bytes: Float[Array, "*L B S K"]
  moved: Float[Array, "*L B S K"]


@runtime_checkable
class Method(Protocol):
  """A way to keep and read a KV cache; a pytree, its options static and its arrays leaves."""

  @property
  def name(self) -> str:
    """The registry's name."""
    ...

  def init(self, geometry: Geometry) -> State:
    """An empty cache."""
    ...

  def absorb(self, state: State, prompt: PromptLayer, *, layer: int | Array) -> State:
    """Take in one layer of a prompt, after exact attention went over it."""
    ...

  def attend(
    self,
    state: State,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], State, Any]:
    """Append S tokens to one layer of the cache, then attend each with its own selection.

    Every query sees the tokens up to its own, so S tokens at once give what S calls with one
    token give.

    Args:
      q, k, v: before rotary embedding.
      positions: of the new tokens; -1 marks padding, which is neither stored nor attended and whose
        output is zero.
      layer: index of the layer, may be traced.

    Returns:
      The attention output, the new state, and the step's statistics: a pytree of arrays,
      :class:`Stats` unless the method says otherwise.
    """
    ...


@runtime_checkable
class Observer(Protocol):
  """A method that asks more of a prompt than its keys and values."""

  @property
  def needs(self) -> Needs:
    """What :meth:`Method.absorb` is to be given."""
    ...


@runtime_checkable
class Splittable(Protocol):
  """A method whose cache can lie on several devices, by slots; see :mod:`a2ats_jax.sequence`."""

  @property
  def split(self) -> Split:
    """How it lies; an option of the method."""
    ...

  def own(self, state: State) -> list[Array]:
    """The arrays of a state that differ between devices, split along their fourth axis."""
    ...


@runtime_checkable
class AcrossHeads(Protocol):
  """A method whose KV heads know of each other, so that no device can hold some of them alone."""

  @property
  def across_heads(self) -> str:
    """What they share, as the end of a sentence."""
    ...


def needs_of(method: Method) -> Needs:
  """What a method asks of a prompt; nothing unless it says so."""
  return method.needs if isinstance(method, Observer) else Needs()


def token_by_token(
  step: Callable[..., tuple[Array, State, Any]],
  state: State,
  q: Float[Array, "B S H D"],
  k: Float[Array, "B S K D"],
  v: Float[Array, "B S K D"],
  positions: Int[Array, "B S"],
) -> tuple[Float[Array, "B S H D"], State, Any]:
  """S tokens, each by a step of its own: for methods whose state depends on every query.

  Args:
    step: ``(state, q, k, v, positions)``, each with S = 1, to output, state and statistics.
  """
  if q.shape[1] == 1:
    return step(state, q, k, v, positions)

  def one(state: State, token: tuple[Array, ...]) -> tuple[State, tuple[Array, Any]]:
    out, state, stats = step(state, *(x[:, None] for x in token))
    return state, (out, stats)

  def together(x: Array) -> Array:
    return jnp.swapaxes(x[:, :, 0], 0, 1)  # [S, B, 1, ...] to [B, S, ...]

  tokens = tuple(jnp.swapaxes(x, 0, 1) for x in (q, k, v, positions))
  state, (out, stats) = jax.lax.scan(one, state, tokens)
  return together(out), state, jax.tree.map(together, stats)
