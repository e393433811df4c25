"""Variable tracking: a value handed on from variable to variable (RULER's ``vt``)."""

import random
import string

from eval.ruler.fitting import largest
from eval.ruler.haystack import NOISE
from eval.ruler.question import Place, Question, Source

HOPS = 4  # after the first assignment
NEW = 30  # tokens to generate
_TEXT = (
  "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
  " Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
  "are assgined the value {value}, they are: "
)
_EXAMPLE_T = 500  # tokens of the example and of an answer to it
_EXAMPLE_STEP = 5  # lines of noise


def source(place: Place) -> Source:
  """One chain after a solved example; a unit is a line of noise."""
  rng = place.draws()
  solved, asked = (str(value) for value in rng.sample(range(10000, 100000), 2))
  example = _example(place, solved, rng)
  chain, positions = _chain(rng, letters=5, value=asked), rng.random()

  def make(units: int) -> Question:
    question = _question(chain, units, random.Random(positions))
    text = f" {example}\n\n\n\n{question.text}"
    return Question(text=text, prefix=question.prefix, answers=question.answers)

  return Source(make=make, least=1, most=place.T)


def _example(place: Place, value: str, rng: random.Random) -> str:
  """A solved question about variables of three letters."""
  chain, positions = _chain(rng, letters=3, value=value), rng.random()

  def text(steps: int) -> str:
    question = _question(chain, _EXAMPLE_STEP * steps, random.Random(positions))
    return " ".join(question.text.split()) + question.prefix

  def tokens(steps: int) -> int:
    return len(place.tokenizer.encode(text(steps), special=False))

  steps = largest(tokens, least=1, most=_EXAMPLE_T, room=_EXAMPLE_T - NEW) or 1
  return f"{text(steps)} {' '.join(variable for variable, _ in chain)}"


def _chain(rng: random.Random, *, letters: int, value: str) -> list[tuple[str, str]]:
  """Different variables, each with what it is assigned."""
  names: dict[str, None] = {}
  while len(names) <= HOPS:
    names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
  return list(zip(names, [value, *(f"VAR {name} " for name in names)]))


def _question(chain: list[tuple[str, str]], noises: int, rng: random.Random) -> Question:
  """The assignments in their order among so many lines of noise."""
  pieces = [f"{NOISE}\n"] * noises
  if noises <= len(chain):
    # Too few lines: the assignments go between sentences.
    parts = [part for piece in pieces for part in piece.split(".")]
    pieces = [f"{part}." if part.strip() else part for part in parts]
  positions = sorted(rng.sample(range(len(pieces)), len(chain)), reverse=True)
  for position, (variable, assigned) in zip(positions, reversed(chain)):
    pieces.insert(position, f"VAR {variable} = {assigned}")
  context = " ".join(pieces).replace(". \n", ".\n")
  value = chain[0][1]
  return Question(
    text=_TEXT.format(context=context, value=value),
    prefix=_PREFIX.format(count=len(chain), value=value),
    answers=tuple(variable for variable, _ in chain),
  )
