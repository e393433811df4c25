"""The longest question that leaves room for its answer."""

import dataclasses
import math
from collections.abc import Callable

from a2ats_jax.errors import UserError
from eval.ruler.question import Place, Source

_GUESSES = 12  # after them intervals are halved


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A question as tokens.

  Attributes:
    ids: tokens; with those to generate no more than were asked for.
    text: what they spell.
    answers: what the answer should hold.
  """

  ids: tuple[int, ...]
  text: str
  answers: tuple[str, ...]


def largest(count: Callable[[int], int], *, least: int, most: int, room: int) -> int | None:
  """The most units that fit, or None where not even the least do.

  Sizes grow all but evenly with units, so the next number to try is where the straight line
  through two known ones meets the room: a few counts where halving needs one for every bit.

  Args:
    count: the size of so many units.

  Returns:
    Units that fit while one more does not, or ``most``.
  """
  low, size = least, count(least)
  if size > room:
    return None
  high, (end, end_size) = most + 1, (low, size)
  guess, tries = 2 * low + 30, 0
  while high - low > 1:
    guess, tries = min(max(guess, low + 1), high - 1), tries + 1
    found = count(guess)
    if found <= room:
      low, size = guess, found
    else:
      high, (end, end_size) = guess, (guess, found)
    slope = (end_size - size) / (end - low)
    if slope > 0 and tries < _GUESSES:
      guess = low + math.floor((room - size) / slope)
    else:
      guess = (low + high) // 2
  return low


def fit(source: Source, place: Place, *, new: int, chat: bool) -> Prompt:
  """The longest prompt that with ``new`` tokens to generate has at most T.

  Args:
    chat: put the question in the model's chat template; the answer's beginning follows it.

  Raises:
    UserError: T is too short for the task, or there is too little to make it of.
  """

  def build(units: int) -> Prompt:
    question = source.make(units)
    text = question.text
    if chat:
      text = place.tokenizer.render_chat([{"role": "user", "content": text}])
    text += question.prefix
    ids = place.tokenizer.encode(text, special=not chat)
    return Prompt(ids=tuple(ids), text=text, answers=question.answers)

  built: dict[int, Prompt] = {}

  def count(units: int) -> int:
    built[units] = build(units)
    return len(built[units].ids)

  who = f"ruler: {place.task}"
  room = place.T - new
  units = largest(count, least=source.least, most=source.most, room=room)
  if units is None:
    raise UserError(
      f"{who} needs at least {len(built[source.least].ids) + new} tokens, T is {place.T}; "
      "ask for longer prompts or leave the task out"
    )
  if units == source.most and source.refused:
    raise UserError(
      f"{who}: all there is makes {len(built[units].ids) + new} tokens, T is {place.T}; "
      f"{source.refused}"
    )
  return built[units]
