"""English words, from the lists that RULER uses (package ``wonderwords``, MIT)."""

import dataclasses
import functools
import hashlib
import importlib

from a2ats_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """Words by their part of speech, each list sorted and without doubles."""

  nouns: tuple[str, ...]
  adjectives: tuple[str, ...]
  verbs: tuple[str, ...]

  @functools.cached_property
  def all(self) -> tuple[str, ...]:
    """Every word once, sorted."""
    return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))

  @property
  def sha256(self) -> str:
    """Hash of the three lists: a version with other words makes other prompts."""
    lists = (self.nouns, self.adjectives, self.verbs)
    return hashlib.sha256("\n\n".join(map("\n".join, lists)).encode()).hexdigest()


@functools.cache
def english() -> Vocabulary:
  """The lists of ``wonderwords``.

  Raises:
    UserError: it is not installed.
  """
  try:
    package = importlib.import_module("wonderwords")
  except ImportError as error:
    raise UserError(
      "ruler: its words come from a package of the extra, pip install 'a2ats_jax[eval]'"
    ) from error
  source = package.RandomWord(enhanced_prefixes=False)
  nouns, adjectives, verbs = (
    tuple(sorted(set(source.filter(include_categories=[part]))))
    for part in ("noun", "adjective", "verb")
  )
  return Vocabulary(nouns=nouns, adjectives=adjectives, verbs=verbs)
