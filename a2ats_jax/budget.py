"""How many tokens a query head, or a KV head, may read from the far part of its cache."""

import dataclasses
from typing import Literal

import numpy as np

from a2ats_jax.errors import UserError

Per = Literal["query_head", "kv_head"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """A share of the context, or a fixed number of tokens, for each query head or each KV head.

  Either ``ratio`` or ``tokens`` is set. A ratio ``r`` gives ``int(r T)`` tokens, where T counts
  every cached token and the current one (METHODS of A2ATS: top-k = int(ratio T)). Sinks and window
  are read on top. Where fewer tokens are eligible, all of them are read.

  Attributes:
    ratio: share of the context, 0 to 1.
    tokens: number of tokens, 0 or more.
    per: who is granted them. ``query_head`` is the paper's rule, where a KV head reads what any
      query head of its group chose, up to G times as many. ``kv_head`` bounds what is read: the
      group shares one choice (:func:`a2ats_jax.index.kv_head_scores`).
  """

  ratio: float | None = None
  tokens: int | None = None
  per: Per = "query_head"

  def __post_init__(self):
    if (self.ratio is None) == (self.tokens is None):
      raise UserError(f"budget: set either ratio or tokens, got {self.ratio} and {self.tokens}")
    if self.ratio is not None and not 0 <= self.ratio <= 1:
      raise UserError(f"budget: a ratio must lie in [0, 1], got {self.ratio}")
    if self.tokens is not None and self.tokens < 0:
      raise UserError(f"budget: a number of tokens must be 0 or more, got {self.tokens}")
    if self.per not in ("query_head", "kv_head"):
      raise UserError(f"budget: per must be query_head or kv_head, got {self.per!r}")

  @classmethod
  def parse(cls, text: str) -> "Budget":
    """Read a command-line budget.

    Numbers with a point, and the bare ``0`` and ``1``, are ratios; whole numbers from 2 on are
    tokens. So ``0.03`` is 3%, ``1`` the whole context and ``2048`` a fixed 2048 tokens, each for
    every query head; ``2048/kv`` is for every KV head.
    """
    amount, slash, unit = text.strip().partition("/")
    per = "kv_head" if slash else "query_head"
    try:
      if slash and unit != "kv":
        raise ValueError
      if amount.isdigit() and int(amount) > 1:
        return cls(tokens=int(amount), per=per)
      return cls(ratio=float(amount), per=per)
    except UserError:
      raise
    except ValueError:
      raise UserError(
        "budget: expected a ratio in [0, 1] or a whole number of tokens, with /kv after it for a "
        f"KV head, got {text!r}"
      ) from None

  def resolve(self, longest: int) -> np.ndarray:
    """Tokens granted at every context length 0 .. ``longest``, ``[longest + 1]`` int32.

    A table, because lengths are traced values inside a compiled step and ``int(r T)`` must round
    the way Python does: float32 arithmetic on the device is off by one at exact multiples.
    """
    lengths = np.arange(longest + 1)
    if self.ratio is not None:
      return (self.ratio * lengths.astype(np.float64)).astype(np.int32)
    return np.minimum(lengths, min(self.tokens or 0, longest)).astype(np.int32)

  def __str__(self) -> str:
    amount = str(self.tokens) if self.tokens is not None else repr(self.ratio)
    return amount + "/kv" * (self.per == "kv_head")
