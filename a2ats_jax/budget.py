"""How many tokens a query head may read from the far part of its cache."""

import dataclasses

import numpy as np

from a2ats_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """A share of the context, or a fixed number of tokens, for each query head.

  Exactly one field is set. A ratio ``r`` gives ``int(r T)`` tokens, where T counts every cached
  token and the current one (METHODS of A2ATS: top-k = int(ratio T)). Sinks and window are read on
  top. Where fewer tokens are eligible, all of them are read.

  Attributes:
    ratio: share of the context, 0 to 1.
    tokens: number of tokens, 0 or more.
  """

  ratio: float | None = None
  tokens: int | None = None

  def __post_init__(self):
    if (self.ratio is None) == (self.tokens is None):
      raise UserError(f"budget: set either ratio or tokens, got {self.ratio} and {self.tokens}")
    if self.ratio is not None and not 0 <= self.ratio <= 1:
      raise UserError(f"budget: a ratio must lie in [0, 1], got {self.ratio}")
    if self.tokens is not None and self.tokens < 0:
      raise UserError(f"budget: a number of tokens must be 0 or more, got {self.tokens}")

  @classmethod
  def parse(cls, text: str) -> "Budget":
    """Read a command-line budget.

    Numbers with a point, and the bare ``0`` and ``1``, are ratios; whole numbers from 2 on are
    tokens. So ``0.03`` is 3%, ``1`` the whole context and ``2048`` a fixed 2048 tokens.
    """
    try:
      if text.strip().isdigit() and int(text) > 1:
        return cls(tokens=int(text))
      return cls(ratio=float(text))
    except UserError:
      raise
    except ValueError:
      raise UserError(
        f"budget: expected a ratio in [0, 1] or a whole number of tokens, got {text!r}"
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
    return str(self.tokens) if self.tokens is not None else repr(self.ratio)
