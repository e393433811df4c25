"""The protocol of a KV method: what a model hands over, and what it gets back.

A model's attention layer computes queries, keys and values BEFORE rotary embedding; everything
after that is the method's. A prompt goes through exact causal attention layer by layer, and the
method absorbs each layer's keys and values once (:meth:`Method.absorb`). After that every call of
:meth:`Method.attend` appends tokens and attends. State is a pytree, in and out; rows of a batch may
have different lengths everywhere, told by their tokens' positions.
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from a2ats_jax.rope import Rope
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
  """

  batch: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  prompt: int
  new: int
  dtype: Any = jnp.float32

  @property
  def capacity(self) -> int:
    """T: slots of a row's cache."""
    return self.prompt + self.new


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys", "rotated", "values", "lengths"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PromptLayer:
  """One layer's keys and values of a whole prompt, position t in slot t.

  Attributes:
    keys: before rotary embedding. rotated: after it. values.
    lengths: tokens of each row; slots from there on are padding and hold anything finite.
  """

  keys: Float[Array, "B T K D"]
  rotated: Float[Array, "B T K D"]
  values: Float[Array, "B T K D"]
  lengths: Int[Array, "B"]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["length", "selected", "read", "tail"],
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
  """

  length: Int[Array, "*L B S"]
  selected: Int[Array, "*L B S K"]
  read: Int[Array, "*L B S K"]
  tail: Float[Array, "*L B S H"]


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
