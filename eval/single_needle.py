"""Single-needle prompts in the wording of RULER (2404.06654, NVIDIA/RULER, niah_single_1 and _2).

Same as RULER: the sentences of the noise, one needle "One of the special magic numbers for KEY is:
VALUE." with a 7-digit value, question and answer prefix in the singular, one line of noise a
haystack unit, prose by whole sentences joined with blanks. Differs: the target length counts the
prompt alone (RULER adds the tokens to be generated); depths are given, not drawn; keys come from
our own words; prose starts at a drawn sentence and is whatever text the user has, and a text that
is too short is refused, not repeated.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from a2ats_jax.errors import UserError
from a2ats_jax.models.tokenizer import Tokenizer
from eval.ruler import haystack
from eval.ruler.haystack import NOISE
from eval.ruler.needles import NEEDLE
from train_codebooks.texts import Text

PROMPT = (
  "A special magic number is hidden within the following text. Make sure to memorize it. I will "
  "quiz you about the number afterwards.\n{context}\nWhat is the special magic number for {key} "
  "mentioned in the provided text?"
)
PREFIX = " The special magic number for {key} mentioned in the provided text is"

# fmt: off
_FIRST = (
  "amber", "brave", "calm", "damp", "eager", "faint", "gentle", "hollow", "icy", "jolly", "keen",
  "lively", "mellow", "narrow", "odd", "plain", "quiet", "rapid", "silent", "tidy", "upper",
  "vivid", "warm", "young",
)
# fmt: on
# fmt: off
_SECOND = (
  "anchor", "basket", "candle", "dragon", "engine", "feather", "garden", "hammer", "island",
  "jacket", "kettle", "lantern", "meadow", "needle", "orchard", "pencil", "quarry", "ribbon",
  "saddle", "teapot", "umbrella", "violin", "window", "yard",
)
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedlePrompt:
  """A prompt and what it should be answered with.

  Attributes:
    ids: tokens, no more than the target length.
    depth: where in the haystack the needle is, 0 to 1, by haystack units.
    text: the prompt as text.
    answer: the value.
  """

  ids: tuple[int, ...]
  depth: float
  text: str
  answer: str


def noise_haystack() -> Callable[[int, str, float], str]:
  """Context of n lines of noise with a needle between them."""

  def context(units: int, needle: str, depth: float) -> str:
    lines = [NOISE] * units
    lines.insert(round(depth * units), needle)
    return "\n".join(lines)

  return context


def sentences_of(text: Text) -> list[str]:
  """Sentences, see :func:`eval.ruler.haystack.sentences_of`."""
  return haystack.sentences_of(text.text)


def first_sentence(
  sentences: Sequence[str], tokenizer: Tokenizer, T: int, rng: random.Random
) -> int:
  """A sentence with at least T tokens of text from it on, drawn among those; 0 if there is none."""
  sizes = [len(tokenizer.encode(f" {sentence}", special=False)) for sentence in sentences]
  rest = sum(sizes)
  count = 0
  while count < len(sizes) and rest >= T:
    rest -= sizes[count]
    count += 1
  return rng.randrange(max(count, 1))


def prose_haystack(sentences: Sequence[str], first: int) -> Callable[[int, str, float], str]:
  """Context of n sentences from sentence ``first`` on, with a needle between two of them."""

  def context(units: int, needle: str, depth: float) -> str:
    lines = list(sentences[first : first + units])
    lines.insert(round(depth * units), needle)
    return " ".join(lines)

  return context


def fit(
  context: Callable[[int, str, float], str],
  tokenizer: Tokenizer,
  rng: random.Random,
  *,
  T: int,
  depth: float,
  chat: bool,
  most: int,
) -> NeedlePrompt:
  """The longest prompt of at most T tokens.

  Args:
    context: builds a haystack of so many units.
    rng: draws key and value.
    chat: wrap the question in the model's chat template; the answer prefix follows it, as in RULER.
    most: units there are.

  Raises:
    UserError: T does not even hold the question, or the haystack's text is too short for T.
  """
  key = f"{rng.choice(_FIRST)}-{rng.choice(_SECOND)}"
  value = str(rng.randint(10**6, 10**7 - 1))
  needle = NEEDLE.format(kind="numbers", key=key, value=value)

  def build(units: int) -> tuple[str, list[int]]:
    text = PROMPT.format(context=context(units, needle, depth), key=key)
    if chat:
      text = tokenizer.render_chat([{"role": "user", "content": text}])
    text += PREFIX.format(key=key)
    return text, tokenizer.encode(text, special=not chat)

  low, high = 0, min(most, T) + 1  # a unit is at least a token
  while high - low > 1:
    middle = (low + high) // 2
    if len(build(middle)[1]) <= T:
      low = middle
    else:
      high = middle
  text, ids = build(low)
  if len(ids) > T:
    raise UserError(f"needle: the question alone takes {len(ids)} tokens, T is {T}")
  if low == most and low < T:
    raise UserError(
      f"needle: the text fills {len(ids)} tokens from its first to last unit, T is {T}"
    )
  return NeedlePrompt(ids=tuple(ids), depth=depth, text=text, answer=value)
