"""A Linen model in parts: its own submodules, applied to their own parameters."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from a2ats_jax.prompt import Projected
from a2ats_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """A module and what is run of it, ``project(module, x)`` and the like.

  Compared by identity: modules whose configuration cannot be hashed are static parts of a program
  too. Layers that share one Part share their programs.
  """

  module: Any
  enter: Callable[..., Any]
  leave: Callable[..., Array]


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["part", "local"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenLayer:
  """A layer whose part projects as it enters and finishes as it leaves."""

  params: Any
  part: Part
  local: bool = False

  def project(self, x: Float[Array, "B S E"]) -> Projected:
    return self.part.module.apply({"params": self.params}, x, method=self.part.enter)

  def finish(
    self, x: Float[Array, "B S E"], attended: Float[Array, "B S H D"]
  ) -> Float[Array, "B S E"]:
    variables = {"params": self.params}
    return self.part.module.apply(variables, x, attended, method=self.part.leave)


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["part"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenEnds:
  """A model whose part embeds as it enters and makes logits as it leaves.

  Attributes:
    params: of the whole model, or of all but its layers.
  """

  params: Any
  part: Part

  def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S E"]:
    return self.part.module.apply({"params": self.params}, tokens, method=self.part.enter)

  def logits(self, x: Float[Array, "B S E"]) -> Float[Array, "B S V"]:
    logits = self.part.module.apply({"params": self.params}, x, method=self.part.leave)
    return logits.astype(jnp.float32)
