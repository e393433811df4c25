"""Calibration and held-out text, and its cut into documents of tokens.

Offline there is the reference text that every CPython ships (``pydoc_data.topics``). It changes
with the Python version, so a run records the hash of what it read.
"""

import dataclasses
import hashlib
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
  """A named text."""

  name: str
  text: str

  @property
  def sha256(self) -> str:
    """Hash of the text in UTF-8."""
    return hashlib.sha256(self.text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Token documents, ready to run a model over.

  Attributes:
    documents: int32 token ids, each document one forward pass from position 0.
    sources: where they came from, for the record: name, sha256 and tokens used of each text.
  """

  documents: tuple[np.ndarray, ...]
  sources: tuple[dict[str, str | int], ...] = ()

  @property
  def tokens(self) -> int:
    """N, over all documents."""
    return sum(len(d) for d in self.documents)

  @property
  def sha256(self) -> str:
    """Hash of the documents' token ids and lengths."""
    digest = hashlib.sha256()
    for document in self.documents:
      digest.update(np.int64(len(document)).tobytes() + document.astype(np.int32).tobytes())
    return digest.hexdigest()


def _pydoc_halves() -> tuple[list[str], list[str]]:
  from pydoc_data.topics import topics  # 700 KB: only when asked for

  names = sorted(topics)
  total, before, cut = sum(len(topics[n]) for n in names), 0, 0
  while before < total / 2:
    before += len(topics[names[cut]])
    cut += 1
  return [topics[n] for n in names[:cut]], [topics[n] for n in names[cut:]]


def _paragraphs(text: str) -> list[str]:
  return text.split("\n\n")


def _bare(paragraph: str) -> str:
  return " ".join(paragraph.split())


def pydoc_calibration() -> Text:
  """The first half of CPython's reference topics in sorted order, cut at a topic boundary."""
  return Text("pydoc calibration", "\n\n".join(_pydoc_halves()[0]))


def pydoc_held_out() -> Text:
  """The other topics, less every paragraph that the calibration half holds too.

  Topics quote each other at length, so a cut between topics alone would not keep the halves apart.
  """
  ours, others = _pydoc_halves()
  seen = {_bare(p) for topic in ours for p in _paragraphs(topic)}
  kept = [p for topic in others for p in _paragraphs(topic) if _bare(p) not in seen]
  return Text("pydoc held out", "\n\n".join(kept))


def random_identifiers(count: int, seed: int) -> Text:
  """``count`` random UUIDs (version 4), comma separated; the same for the same seed."""
  draw = random.Random(seed)
  ids = (str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(count))
  return Text(f"identifiers seed {seed}", ",".join(ids))


def read_text(path: str | Path) -> Text:
  """A user's UTF-8 file.

  Raises:
    UserError: it is missing, unreadable, empty or not UTF-8.
  """
  try:
    text = Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as e:
    raise UserError(f"text {path}: expected UTF-8, byte {e.start} is not") from e
  except OSError as e:
    raise UserError(f"text {path}: cannot be read: {e.strerror}") from e
  if not text.strip():
    raise UserError(f"text {path}: expected some text, the file is empty")
  return Text(Path(path).name, text)


def cut(
  text: Text, tokenizer: Tokenizer, *, tokens: int, document_tokens: int
) -> tuple[list[np.ndarray], dict[str, str | int]]:
  """Up to ``tokens`` tokens of a text as documents, and its record.

  Every document begins with what the tokenizer puts before any text, such as BOS, like a prompt.
  """
  ids = np.asarray(tokenizer.encode(text.text, special=False), np.int32)
  first = tokenizer.encode("", special=True)
  step = document_tokens - len(first)
  if step < 1:
    raise UserError(f"training: document_tokens must be at least 2, got {document_tokens}")
  documents, left, start = [], tokens, 0
  while start < len(ids) and left > len(first):
    body = ids[start : start + min(step, left - len(first))]
    documents.append(np.concatenate([np.asarray(first, np.int32), body]))
    start, left = start + len(body), left - len(documents[-1])
  return documents, {"name": text.name, "sha256": text.sha256, "tokens": tokens - left}


def make_corpus(
  tokenizer: Tokenizer,
  *,
  tokens: int,
  document_tokens: int,
  identifiers: float,
  seed: int,
  text_files: Sequence[str] = (),
) -> Corpus:
  """Prose and identifiers in the proportion asked for, at most ``tokens`` in all.

  When the prose ends early the identifiers shrink with it, so the proportion holds.
  """
  prose = [read_text(p) for p in text_files] or [pydoc_calibration()]
  documents: list[np.ndarray] = []
  sources: list[dict[str, str | int]] = []
  left = wanted = tokens - round(tokens * identifiers)
  for text in prose:
    if left > 0:
      pieces, record = cut(text, tokenizer, tokens=left, document_tokens=document_tokens)
      documents, sources, left = (
        documents + pieces,
        [*sources, record],
        left - sum(map(len, pieces)),
      )
  short = (wanted - left) / wanted if wanted else 1.0
  target = round((tokens - wanted) * short)
  if target:
    count = 16
    while len(tokenizer.encode(random_identifiers(count, seed).text, special=False)) < target:
      count *= 2
    text = random_identifiers(count, seed)
    pieces, record = cut(text, tokenizer, tokens=target, document_tokens=document_tokens)
    documents, sources = documents + pieces, [*sources, record]
  return Corpus(documents=tuple(documents), sources=tuple(sources))
