"""Needles: sentences that tell a key's value, hidden among others (RULER's ``niah`` tasks)."""

import dataclasses
import random
import uuid
from collections.abc import Sequence
from typing import Literal

from eval.ruler.haystack import NOISE, first_words
from eval.ruler.question import Place, Question, Source
from eval.ruler.vocabulary import Vocabulary

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
  "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will "
  "quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} "
  "mentioned in the provided text?",
  " The special magic {kind} for {query} mentioned in the provided text is",
)
_SEVERAL = (
  "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
  "will quiz you about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} "
  "for {query} mentioned in the provided text?",
  " The special magic {kind} for {query} mentioned in the provided text are",
)
# Where a needle may lie in prose, percent of its sentences.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))

Kind = Literal["numbers", "words", "uuids"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
  """One of the needle tasks.

  Attributes:
    haystack: ``needles`` are needles with other keys.
    key, value: what both are.
    keys: different ones hidden.
    values: of each key.
    queries: keys asked for.
  """

  haystack: Literal["noise", "prose", "needles"]
  key: Kind = "words"
  value: Kind = "numbers"
  keys: int = 1
  values: int = 1
  queries: int = 1

  def source(self, place: Place) -> Source:
    """A unit is a line of the haystack, or a word of its prose."""
    prose = self.haystack == "prose"
    return Source(
      make=lambda units: self._question(place, units),
      least=1 if prose else self.keys * self.values,
      most=sum(len(s.split(" ")) for s in place.material.sentences) if prose else place.T,
      refused="the text is too short, give a longer one with --text" if prose else "",
    )

  def _question(self, place: Place, units: int) -> Question:
    rng, words = place.draws(), place.material.words
    taken: set[str] = set()

    def draw(kind: Kind) -> str:
      while (drawn := _DRAWS[kind](rng, words)) in taken:
        pass
      taken.add(drawn)
      return drawn

    def needle(key: str, value: str) -> str:
      return NEEDLE.format(kind=self.value, key=key, value=value)

    hidden = {
      key: [draw(self.value) for _ in range(self.values)]
      for key in [draw(self.key) for _ in range(self.keys)]
    }
    asked = rng.sample(list(hidden), self.queries)
    needles = [needle(key, value) for key, values in hidden.items() for value in values]
    rng.shuffle(needles)
    if self.haystack == "prose":
      sentences = place.material.sentences
      lines = first_words(sentences, rng.randrange(len(sentences)), units)
      depths = rng.sample(DEPTHS, len(needles))
      context = " ".join(_insert(needles, lines, [len(lines) * d // 100 for d in depths]))
    else:
      positions = random.Random(rng.random()).sample(range(units), len(needles))
      if self.haystack == "noise":
        lines = [NOISE] * units
      else:
        lines = [needle(draw(self.key), draw(self.value)) for _ in range(units)]
      context = "\n".join(_insert(needles, lines, positions))
    answers = tuple(value for key in asked for value in hidden[key])
    text, prefix = _ONE if len(answers) == 1 else _SEVERAL
    kind = self.value.removesuffix("s") if len(answers) == 1 else self.value
    query = ", and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
    return Question(
      text=text.format(kind=kind, context=context, query=query),
      prefix=prefix.format(kind=kind, query=query),
      answers=answers,
    )


def _insert(needles: Sequence[str], lines: list[str], positions: Sequence[int]) -> list[str]:
  """The lines with the needles in their order, each before the line that had a position."""
  for position, needle in reversed(list(zip(sorted(positions), needles))):
    lines.insert(position, needle)
  return lines


def _number(rng: random.Random, words: Vocabulary) -> str:
  return str(rng.randint(10**6, 10**7 - 1))


def _word(rng: random.Random, words: Vocabulary) -> str:
  return f"{rng.choice(words.adjectives)}-{rng.choice(words.nouns)}"


def _uuid(rng: random.Random, words: Vocabulary) -> str:
  return str(uuid.UUID(int=rng.getrandbits(128), version=4))


_DRAWS = {"numbers": _number, "words": _word, "uuids": _uuid}
