"""Lists of words to count: the most common of a numbered list, and of coded text."""

import math
import random
import string
from collections.abc import Sequence

from eval.ruler.question import Place, Question, Source

_CWE = (
  "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
  "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
  "above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10  # words asked for
_SHORT = 4096  # tokens; prompts below it have smaller lists

_FWE = (
  "Read the following coded text and track the frequency of each coded word. Find the three most "
  "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
  "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
  "text?"
)
_FWE_PREFIX = (
  " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_LETTERS = 6  # of a coded word
_DOTS = "..."  # the most frequent "word", which is not asked for
_ZETA = math.pi**2 / 6  # zeta(2), for RULER's exponent of 2


def common_words(place: Place) -> Source:
  """RULER's ``cwe``: ten words many times, others a few times, after a solved example.

  A unit is a word of the list, however often it appears.
  """
  rng, words = place.draws(), list(place.material.words.all)
  rng.shuffle(words)
  if place.T < _SHORT:
    example, example_counts, counts = words[:20], (3, 1), (6, 1)
  else:
    example, example_counts, counts = words[:40], (10, 3), (30, 3)
  others, order = words[len(example) :], rng.random()
  solved = (
    f"{_CWE.format(context=_listed(example, *example_counts, rng))}{_CWE_PREFIX}"
    f"{_numbered(example[:COMMON])}\n"
  )

  def make(units: int) -> Question:
    context = _listed(others[:units], *counts, random.Random(order))
    return Question(
      text=solved + _CWE.format(context=context),
      prefix=_CWE_PREFIX,
      answers=tuple(others[:COMMON]),
    )

  return Source(make=make, least=COMMON + 1, most=len(others))


def _listed(words: Sequence[str], often: int, seldom: int, rng: random.Random) -> str:
  """The first ten words often, the others seldom, in a drawn order and numbered."""
  places = [*words[:COMMON]] * often + [*words[COMMON:]] * seldom
  rng.shuffle(places)
  return _numbered(places)


def _numbered(words: Sequence[str]) -> str:
  return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(place: Place) -> Source:
  """RULER's ``fwe``: drawn words whose counts follow a zeta distribution.

  The word of rank k appears n k^-2 / zeta(2) times, rounded down, in a text of n units. The first
  rank is dots, ranks 2 to 4 are asked for.
  """
  rng = place.draws()
  codes: dict[str, None] = {}
  while len(codes) < place.T // 50:
    codes["".join(rng.choices(string.ascii_lowercase, k=_LETTERS))] = None
  vocabulary, order = [_DOTS, *list(codes)[1:]], rng.random()

  def make(units: int) -> Question:
    text = [
      word for rank, word in enumerate(vocabulary, 1) for _ in range(int(_share(rank) * units))
    ]
    random.Random(order).shuffle(text)
    return Question(
      text=_FWE.format(context=" ".join(text)),
      prefix=_FWE_PREFIX,
      answers=tuple(vocabulary[1:4]),
    )

  # From here on the third word asked for is sure to appear more often than the fourth does.
  least = math.ceil(1 / (_share(4) - _share(5)))
  return Source(make=make, least=least, most=max(place.T, least))


def _share(rank: int) -> float:
  return rank**-2 / _ZETA
