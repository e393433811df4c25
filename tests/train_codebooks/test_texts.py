"""Calibration and held-out text, and its cut into documents."""

import uuid

import numpy as np
import pytest

from a2ats_jax.errors import UserError
from tests.train_codebooks.cases import byte_tokenizer
from train_codebooks.texts import (
  Corpus,
  Text,
  cut,
  make_corpus,
  pydoc_calibration,
  pydoc_held_out,
  random_identifiers,
  read_text,
)


def test_halves_are_large_stable_and_apart():
  ours, held_out = pydoc_calibration(), pydoc_held_out()
  assert len(ours.text) > 150_000
  assert len(held_out.text) > 100_000
  assert ours == pydoc_calibration()
  assert ours.sha256 != held_out.sha256

  def paragraphs(text):
    return {" ".join(p.split()) for p in text.split("\n\n")} - {""}

  assert not paragraphs(ours.text) & paragraphs(held_out.text)


def test_identifiers_are_uuids_and_follow_the_seed():
  text = random_identifiers(20, 5)
  ids = text.text.split(",")
  assert len(set(ids)) == 20
  assert all(uuid.UUID(i).version == 4 and str(uuid.UUID(i)) == i for i in ids)
  assert text == random_identifiers(20, 5)
  assert random_identifiers(30, 5).text.startswith(text.text)
  assert text.text != random_identifiers(20, 6).text


def test_hash_is_of_the_text():
  assert Text("a", "x").sha256 == Text("b", "x").sha256 != Text("a", "y").sha256


def test_files_that_cannot_be_used(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    read_text(tmp_path / "none")
  with pytest.raises(UserError, match="cannot be read"):
    read_text(tmp_path)
  (tmp_path / "empty").write_text(" \n")
  with pytest.raises(UserError, match="empty"):
    read_text(tmp_path / "empty")
  (tmp_path / "latin").write_bytes(b"caf\xe9")
  with pytest.raises(UserError, match="UTF-8, byte 3"):
    read_text(tmp_path / "latin")


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_cut_fills_documents_and_keeps_to_the_budget(bos):
  tokenizer = byte_tokenizer(bos)
  text = Text("t", "abcdefghij" * 10)
  documents, record = cut(text, tokenizer, tokens=50, document_tokens=16)
  assert [len(d) for d in documents] == [16, 16, 16, 2]
  assert record == {"name": "t", "sha256": text.sha256, "tokens": 50}
  if bos:
    assert {int(d[0]) for d in documents} == {tokenizer.bos_id}
  body = np.concatenate([d[1 if bos else 0 :] for d in documents])
  assert text.text.startswith(tokenizer.decode(body.tolist()))
  documents, record = cut(Text("s", "abc"), tokenizer, tokens=50, document_tokens=16)
  assert record["tokens"] == sum(map(len, documents)) == (4 if bos else 3)


def test_a_first_token_needs_room():
  with pytest.raises(UserError, match="at least 2"):
    cut(Text("t", "abc"), byte_tokenizer("<s>"), tokens=9, document_tokens=1)


def corpus(tmp_path, characters, **options):
  path = tmp_path / "text"
  path.write_text("z" * characters)
  given = {"tokens": 400, "document_tokens": 64, "identifiers": 0.25, "seed": 0}
  return make_corpus(byte_tokenizer(), text_files=(str(path),), **given | options)


def test_shares_of_prose_and_identifiers(tmp_path):
  full = corpus(tmp_path, 1000)
  assert full.tokens == 400
  assert [s["tokens"] for s in full.sources] == [300, 100]
  short = corpus(tmp_path, 150)
  assert [s["tokens"] for s in short.sources] == [150, 50]
  assert [s["tokens"] for s in corpus(tmp_path, 1000, identifiers=0.0).sources] == [400]
  only = corpus(tmp_path, 1000, identifiers=1.0)
  assert [s["name"] for s in only.sources] == ["identifiers seed 0"]
  assert only.tokens == 400


def test_corpus_hash_sees_tokens_and_cuts():
  a, b = np.arange(4, dtype=np.int32), np.arange(8, dtype=np.int32)
  assert Corpus(documents=(a, a)).sha256 == Corpus(documents=(a.copy(), a)).sha256
  assert Corpus(documents=(b,)).sha256 != Corpus(documents=(b[:4], b[4:])).sha256
  assert Corpus(documents=(a, b)).sha256 != Corpus(documents=(b, a)).sha256
