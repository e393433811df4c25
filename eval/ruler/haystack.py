"""What needles are hidden in: lines of noise, or prose."""

import re
from collections.abc import Sequence
from itertools import chain

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def sentences_of(text: str) -> list[str]:
  """Sentences with white space made single blanks; one ends at a full stop, "!" or "?"."""
  return re.split(r"(?<=[.!?]) ", re.sub(r"\s+", " ", text).strip())


def first_words(sentences: Sequence[str], start: int, count: int) -> list[str]:
  """So many words from sentence ``start`` on, as sentences, the last one cut.

  The first sentence follows the last, so that every start has all words before it.
  """
  taken: list[str] = []
  for sentence in chain(sentences[start:], sentences[:start]):
    if count <= 0:
      break
    words = sentence.split(" ")
    taken.append(" ".join(words[:count]))
    count -= len(words)
  return taken
