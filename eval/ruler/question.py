"""What a task asks, and what it can make questions of."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from a2ats_jax.models.tokenizer import Tokenizer
from eval.ruler.documents import Documents
from eval.ruler.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A question with everything that has to be read for it.

  Attributes:
    text: what a user says.
    prefix: the beginning of the answer, which is given; it follows a chat template.
    answers: what the answer should hold.
  """

  text: str
  prefix: str
  answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """The questions of one prompt in every size; the draws are the same for all sizes.

  Attributes:
    make: a question of so many units of haystack.
    least: fewest units that make a question.
    most: units there are.
    refused: why a prompt may not be shorter than was asked for when the units run out; empty where
      it may.
  """

  make: Callable[[int], Question]
  least: int
  most: int
  refused: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
  """What prompts are made of.

  Attributes:
    sentences: of the prose, with single blanks for white space.
    words: English words.
    squad, hotpotqa: documents with questions, or None where the user gave none.
    hashes: SHA-256 of everything by its name, for the record.
  """

  sentences: tuple[str, ...]
  words: Vocabulary
  squad: Documents | None = None
  hotpotqa: Documents | None = None
  hashes: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """Which prompt: everything its draws depend on, and what it is made of.

  Attributes:
    T: tokens of the prompt and of its answer.
    index: of the task and length.
  """

  seed: int
  task: str
  T: int
  index: int
  material: Material
  tokenizer: Tokenizer

  def draws(self) -> random.Random:
    """The prompt's own generator, from its beginning."""
    return random.Random(f"{self.seed} {self.task} {self.T} {self.index}")

  def draws_of_task(self) -> random.Random:
    """One that all lengths and prompts of a task share."""
    return random.Random(f"{self.seed} {self.task}")
