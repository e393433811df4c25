"""Ranges of positions over which figures are averaged."""

import dataclasses
import itertools
import re

from a2ats_jax.errors import UserError

Span = tuple[int, int]  # the first position and the one after the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buckets:
  """Equal parts of a range, or edges between buckets.

  Attributes:
    parts: how many equal parts; 0 where edges are given.
    edges: rising positions; a bucket goes from one up to the next. None for equal parts.
  """

  parts: int = 0
  edges: tuple[int, ...] = ()

  def __post_init__(self):
    rising = all(a < b for a, b in itertools.pairwise(self.edges))
    if (self.parts < 1) == (not self.edges) or len(self.edges) == 1 or not rising:
      raise UserError(
        f"buckets: expected a number of equal parts, or at least two rising positions, got {self}"
      )

  @staticmethod
  def parse(text: str) -> "Buckets":
    """``4``: four equal parts; ``1024,2048,4096``: two buckets with these edges.

    Raises:
      UserError: neither, no part, or edges that do not rise.
    """
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
      raise UserError(
        f"buckets: expected a number of equal parts or positions with commas, got {text!r}"
      )
    numbers = tuple(int(part) for part in text.split(","))
    return Buckets(edges=numbers) if len(numbers) > 1 else Buckets(parts=numbers[0])

  def __str__(self) -> str:
    """As a command line spells it."""
    return ",".join(map(str, self.edges)) or str(self.parts)

  def spans(self, begin: int, end: int) -> tuple[Span, ...]:
    """The buckets of positions ``begin`` to ``end - 1``.

    Buckets between edges are cut to that range, and left out where nothing of them is in it;
    positions outside all edges are in no bucket.

    Raises:
      UserError: more parts than positions, or no position between the edges.
    """
    if self.parts > end - begin:
      raise UserError(f"buckets: {self.parts} parts of {end - begin} tokens would be empty ones")
    edges = self.edges
    if not edges:
      edges = tuple(begin + (end - begin) * i // self.parts for i in range(self.parts + 1))
    cut = [(max(a, begin), min(b, end)) for a, b in itertools.pairwise(edges)]
    spans = tuple((a, b) for a, b in cut if a < b)
    if not spans:
      raise UserError(
        f"buckets: {self} holds none of the positions from {begin} to {end - 1} that are fed"
      )
    return spans
