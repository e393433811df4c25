"""Texts to evaluate on, and the windows cut out of them."""

import dataclasses
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.typing import Int
from train_codebooks.texts import Text, pydoc_held_out, random_identifiers, read_text


def gather(files: Sequence[Path]) -> tuple[Text, ...]:
  """The given files by their stems, or CPython's held-out reference prose where there are none.

  Raises:
    UserError: a file cannot be read, or two have the same name.
  """
  if not files:
    return (pydoc_held_out(),)
  texts = tuple(Text(path.stem, read_text(path).text) for path in files)
  names = [text.name for text in texts]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"text: two files are named {name!r}; rename one, the name is the task")
  return texts


KINDS = ("text", "code", "identifiers")
# Modules that are one file each in every CPython from 3.12 on, 0.9 MB together.
_MODULES = (
  *("argparse", "difflib", "doctest", "enum", "inspect", "mailbox", "pickle", "statistics"),
  *("subprocess", "tarfile", "typing"),
)
_DRAW = 7919  # added to the seed: calibration draws its identifiers with the seed itself


def code() -> Text:
  """Source of CPython's standard library; it changes with the Python version.

  Raises:
    UserError: this Python ships without its sources.
  """
  folder = Path(sysconfig.get_path("stdlib"))
  sources = [read_text(folder / f"{name}.py").text for name in _MODULES]
  return Text("code", "\n\n".join(sources))


def gather_kinds(
  names: Sequence[str], files: Sequence[Path], *, tokens: int, seed: int
) -> tuple[Text, ...]:
  """Texts of several kinds: ``text`` (see :func:`gather`), ``code`` and ``identifiers``.

  Args:
    tokens: how many the identifiers have to make at least.
    seed: of the identifiers, which are others than those of a calibration with the same seed.

  Raises:
    UserError: an unknown kind, one twice, files without the kind ``text``, or as :func:`gather`.
  """
  if not names or set(names) - set(KINDS) or len(set(names)) < len(names):
    given = ",".join(names) or "none"
    raise UserError(f"kinds: expected each of {', '.join(KINDS)} at most once, got {given}")
  if files and "text" not in names:
    raise UserError(f"text: has no meaning without the kind text, got kinds {','.join(names)}")
  kinds: list[Text] = []
  for name in names:
    if name == "text":
      kinds += gather(files)
    elif name == "code":
      kinds.append(code())
    else:
      # A UUID is 36 characters and a comma: more than eight tokens in any vocabulary we know of.
      drawn = random_identifiers(tokens // 8 + 1, seed + _DRAW)
      kinds.append(dataclasses.replace(drawn, name=name))
  called = [kind.name for kind in kinds]
  if len(set(called)) < len(called):
    raise UserError(f"text: a file is named like another kind, got {', '.join(called)}; rename it")
  return tuple(kinds)


def windows(
  text: Text, tokenizer: Tokenizer, *, longest: int, after: int, limit: int, seed: int
) -> Int[np.ndarray, "n T"]:
  """``limit`` disjoint runs of ``longest + after`` tokens.

  They start at multiples of that length; the seed says which of them. A shorter prompt takes the
  last tokens before the same ``after`` tokens, so lengths are compared on the same predictions.

  Raises:
    UserError: the text is too short.
  """
  ids = tokenizer.encode(text.text, special=False)
  size = longest + after
  if len(ids) < limit * size:
    raise UserError(
      f"text {text.name}: {limit} texts of {size} tokens need {limit * size}, it has {len(ids)}"
    )
  there = np.asarray(ids[: len(ids) // size * size], np.int32).reshape(-1, size)
  picked = np.random.default_rng(seed).permutation(len(there))[:limit]
  return there[np.sort(picked)]


def windows_of(
  kinds: Sequence[Text],
  tokenizer: Tokenizer,
  *,
  longest: int,
  after: int,
  limit: int,
  seed: int,
) -> dict[str, Int[np.ndarray, "n T"]]:
  """The windows of every kind by its name, see :func:`windows`."""
  if not kinds:
    raise UserError("text: expected at least one, got none")
  size = {"longest": longest, "after": after, "limit": limit, "seed": seed}
  return {kind.name: windows(kind, tokenizer, **size) for kind in kinds}


def prompt_of(window: Int[np.ndarray, "T"], T: int, after: int, prefix: Sequence[int]) -> list[int]:
  """The T tokens before the last ``after``; the first ones give way to what a model expects there.

  Args:
    prefix: what the tokenizer puts before any text, such as BOS.
  """
  prompt = window[len(window) - after - T : len(window) - after].tolist()
  return [*prefix, *prompt[len(prefix) :]]
