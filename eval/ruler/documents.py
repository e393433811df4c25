"""Documents with questions about them, from files in the formats of SQuAD 2.0 and HotpotQA."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from a2ats_jax.errors import UserError
from train_codebooks.texts import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """A question that documents answer.

  Attributes:
    answers: each of them is right.
    needed: the documents that belong to it.
    near: others that come before any in filling a prompt: the rest of a Wikipedia article.
  """

  question: str
  answers: tuple[str, ...]
  needed: tuple[str, ...]
  near: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
  """A file's documents and questions.

  Attributes:
    documents: every one once, sorted.
    asked: in the file's order.
    sha256: of the file.
  """

  documents: tuple[str, ...]
  asked: tuple[Asked, ...]
  sha256: str


def read_squad(path: Path) -> Documents:
  """A file such as ``dev-v2.0.json``; questions without an answer are left out.

  Raises:
    UserError: it cannot be read, is no such file, or asks nothing.
  """
  return _read("squad", path, _squad)


def read_hotpotqa(path: Path) -> Documents:
  """A file such as ``hotpot_dev_distractor_v1.json``: each question brings ten documents.

  Raises:
    UserError: it cannot be read, is no such file, or asks nothing.
  """
  return _read("hotpotqa", path, _hotpotqa)


def _read(name: str, path: Path, parse: Any) -> Documents:
  text = read_text(path)
  try:
    asked = tuple(parse(json.loads(text.text)))
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f"{name} {path}: expected a JSON file in its format, got {type(error).__name__}: {error}"
    ) from error
  if not asked:
    raise UserError(f"{name} {path}: expected questions with answers, got none")
  documents = {document for one in asked for document in (*one.needed, *one.near)}
  return Documents(documents=tuple(sorted(documents)), asked=asked, sha256=text.sha256)


def _squad(data: Any) -> Iterator[Asked]:
  for article in data["data"]:
    contexts = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
    for paragraph in article["paragraphs"]:
      context = paragraph["context"]
      for entry in paragraph["qas"]:
        answers = dict.fromkeys(answer["text"] for answer in entry["answers"])
        if answers and not entry.get("is_impossible", False):
          yield Asked(
            question=entry["question"],
            answers=tuple(answers),
            needed=(context,),
            near=tuple(other for other in contexts if other != context),
          )


def _hotpotqa(data: Any) -> Iterator[Asked]:
  for entry in data:
    documents = (f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
    yield Asked(
      question=entry["question"],
      answers=(entry["answer"],),
      needed=tuple(dict.fromkeys(documents)),
    )
