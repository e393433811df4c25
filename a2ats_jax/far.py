"""Where a far token is taken to stand when it is scored by its codeword.

The published rule puts every far token at one constant distance ``b``. Segments put it at the
distance of its segment's representative position instead: the prompt's far part is cut into
ranges of absolute position that grow with the distance from its end, and what is written later
into ranges of equal length. A token's segment never changes, so one static codebook still serves;
only the query is rotated, once per segment.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Array, Int

MOST_SEGMENTS = 4096  # of a prompt: each is a table of scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class FarPosition:
  """Use :meth:`constant` or :meth:`segments`.

  Attributes:
    distance: the constant ``b``; None with segments.
    prompt_segments: ranges the far part of the prompt is cut into.
    span: tokens of each range of what is written after the prompt.
  """

  distance: int | None = None
  prompt_segments: int = 1
  span: int = 0

  @classmethod
  def constant(cls, distance: int = 2048) -> "FarPosition":
    """Every far token at distance b (A2ATS, Eq. 12; b = 2048 as published)."""
    if distance < 0:
      raise UserError(f"far position: the constant distance must be 0 or more, got {distance}")
    return cls(distance=distance)

  @classmethod
  def segments(cls, count: int, span: int = 64) -> "FarPosition":
    """``count`` ranges for the prompt, then one for every ``span`` tokens written after it.

    Ours, not the paper's. The ranges of the prompt are log-spaced by distance from its end; the
    last ``window`` tokens of the prompt already belong to the first later range.
    """
    if not 1 <= count <= MOST_SEGMENTS or span < 1:
      raise UserError(
        f"far position: expected 1 to {MOST_SEGMENTS} segments and a span of at least 1 token, got "
        f"{count} and {span}"
      )
    return cls(prompt_segments=count, span=span)

  def count(self, window: int, new: int) -> int:
    """Z: segments needed when at most ``new`` tokens follow the prompt."""
    if self.distance is not None:
      return 1
    return self.prompt_segments + -(-(new + window) // self.span)

  def items(self, window: int, new: int) -> int:
    """M: places for tokens after the prompt's far part, each a cell of its own; 0 without segments.

    Such a token stands where its segment does, but few share a segment and a codeword: scored one
    by one they cost what M codewords cost, where ``M / span`` segments would cost as many tables.
    """
    return (self.count(window, new) - self.prompt_segments) * self.span

  def cells(self, window: int, new: int, size: int) -> int:
    """Cells of a KV head: (segment, codeword) pairs of the prompt, then M tokens.

    Args:
      size: C, codewords.
    """
    return self.prompt_segments * size + self.items(window, new)

  def cells_of(
    self,
    positions: Int[Array, "B T"],
    codes: Int[Array, "B K T"],
    starts: Int[Array, "B cuts"],
    size: int,
  ) -> Int[Array, "B K T"]:
    """The cell of each token; a later token's is its place among the later ones.

    Args:
      positions: absolute.
      codes: of the tokens.
      size: C.
    """
    if self.distance is not None:
      return codes
    old = self.segment_of(positions, starts)[:, None] * size + codes
    since = (positions - starts[:, -1:])[:, None]
    return jnp.where(since >= 0, self.prompt_segments * size + since, old)

  def starts(self, prompt: Int[Array, "B"], window: int, longest: int) -> Int[Array, "B cuts"]:
    """Where the prompt's segments start, oldest first, and then where what comes later starts.

    The cuts are rounded in float64 on the host, for every length once: on a device they would
    differ by a token at some lengths, and not at the same ones on every backend.

    Args:
      prompt: tokens of each row's prompt, T0.
      window: ``w``, at least 1.
      longest: no prompt is longer; static.
    """
    if self.distance is not None:
      return jnp.zeros((prompt.shape[0], 1), jnp.int32)
    lengths = np.arange(longest + 1)[:, None]
    far = np.maximum(lengths, window)
    power = np.arange(self.prompt_segments, -1, -1)[None, :] / self.prompt_segments
    distance = np.round(window * (far / window) ** power)
    return jnp.asarray((lengths - distance).astype(np.int32))[prompt]

  def segment_of(
    self, positions: Int[Array, "B T"], starts: Int[Array, "B cuts"]
  ) -> Int[Array, "B T"]:
    """The segment of each absolute position, oldest first."""
    if self.distance is not None:
      return jnp.zeros_like(positions)
    old = jnp.sum(positions[:, :, None] >= starts[:, None, 1:-1], axis=-1, dtype=jnp.int32)
    since = positions - starts[:, -1:]
    return jnp.where(since >= 0, self.prompt_segments + since // self.span, old)

  def distances(
    self, query: Int[Array, "B S"], starts: Int[Array, "B cuts"], count: int
  ) -> Int[Array, "B S Z"]:
    """The distance at which a query scores the tokens of each of ``count`` segments.

    For segments it is ``i - p_z`` with ``p_z`` the middle of segment z's range, fixed for ever; it
    may be negative for a segment that is still to be written, which then holds no token.
    """
    if self.distance is not None:
      return jnp.full((*query.shape, 1), self.distance, query.dtype)
    old = (starts[:, :-1] + starts[:, 1:] - 1) // 2
    later = jnp.arange(count - self.prompt_segments, dtype=jnp.int32) * self.span
    later = starts[:, -1:] + (later + (self.span - 1) // 2)[None, :]
    middle = jnp.concatenate([old, later], axis=1)
    return query[:, :, None] - middle[:, None, :]

  def __str__(self) -> str:
    if self.distance is not None:
      return f"constant({self.distance})"
    return f"segments({self.prompt_segments},{self.span})"
