"""How the next token is drawn from a model's logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Array, Float, Int, Key

COLDEST = 1e-6  # the lowest temperature; below it float32 has nothing left to tell apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """Which tokens may be drawn, and how evenly. Static: every value is its own program.

  The three apply in this order. Tokens of equal logits are ranked by their id, the lower first, so
  every setting keeps a definite set of tokens; those that are kept are drawn by probability.

  Attributes:
    temperature: what logits are divided by, 1e-6 or more; 0 is greedy, the likeliest token.
    top_k: how many of the likeliest tokens are kept; 0 keeps all.
    top_p: the smallest set of the likeliest tokens is kept whose probability reaches this, above 0
      and at most 1; 1 keeps all. Probabilities are those after temperature and top_k, in float32.

  Raises:
    UserError: a value out of its range, or top_k or top_p without a temperature.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
      raise UserError(
        f"temperature: expected 0 (greedy) or a number from {COLDEST:g} on, got {self.temperature}"
      )
    if self.top_k < 0:
      raise UserError(f"top_k: expected 0 (all) or a number of tokens, got {self.top_k}")
    if not 0 < self.top_p <= 1:
      raise UserError(f"top_p: expected a probability above 0 and at most 1, got {self.top_p}")
    if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
      raise UserError(
        f"temperature: 0 is greedy, where top_k and top_p have no effect; expected a temperature "
        f"above 0, or neither of them, got top_k {self.top_k} and top_p {self.top_p}"
      )


def sample(
  logits: Float[Array, "B V"], sampling: Sampling, keys: Key[Array, "B"]
) -> Int[Array, "B"]:
  """One token for each row, a function of that row's logits and key alone.

  Args:
    logits: unnormalised log probabilities.
    keys: one for each row and draw; greedy leaves them unused.

  Returns:
    Token ids, int32.
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  peak = jnp.max(logits, axis=-1, keepdims=True)
  scaled = (logits - peak) / sampling.temperature  # the peak off first: nothing overflows
  draw = jax.vmap(jax.random.categorical)
  if sampling.top_k == 0 and sampling.top_p == 1:
    return draw(keys, scaled).astype(jnp.int32)
  vocab = logits.shape[1]
  ranked, ids = jax.lax.top_k(scaled, min(sampling.top_k or vocab, vocab))
  if sampling.top_p < 1:
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share  # of the tokens ranked above; 0 for the first
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
  rank = draw(keys, ranked)
  return jnp.take_along_axis(ids, rank[:, None], axis=1)[:, 0].astype(jnp.int32)
