"""Windows of a text: disjoint, seeded, the same predictions for every length."""

from pathlib import Path

import numpy as np
import pytest

from a2ats_jax.errors import UserError
from eval.texts import gather, gather_kinds, prompt_of, windows
from tests.eval import tiny
from train_codebooks.texts import pydoc_held_out, random_identifiers


def _windows(**changes):
  given = {"longest": 50, "after": 6, "limit": 5, "seed": 0}
  return windows(tiny.prose(), tiny.model().tokenizer, **(given | changes))


def test_windows_are_disjoint_runs_of_the_text():
  text = tiny.prose().text
  found = ["".join(map(chr, row)) for row in _windows()]
  starts = [text.replace("\n", "\n").index(piece) for piece in found]
  assert all(len(piece) == 56 for piece in found)
  assert all(start % 56 == 0 for start in starts)
  assert starts == sorted(set(starts))


def test_the_seed_decides_which():
  np.testing.assert_array_equal(_windows(), _windows())
  assert (_windows() != _windows(seed=1)).any()
  np.testing.assert_array_equal(_windows(limit=3, seed=4), _windows(limit=3, seed=4))


def test_a_shorter_prompt_ends_at_the_same_token_and_makes_room_for_bos():
  window = np.arange(56, dtype=np.int32)
  assert prompt_of(window, 50, 6, []) == list(range(50))
  assert prompt_of(window, 20, 6, []) == list(range(30, 50))
  assert prompt_of(window, 20, 6, [99]) == [99, *range(31, 50)]


def test_files_are_named_by_their_stems(tmp_path: Path):
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "novel.txt").write_text("Words.")
  assert [t.name for t in gather([tmp_path / "a" / "novel.txt"])] == ["novel"]
  with pytest.raises(UserError, match="two files are named 'novel'"):
    gather([tmp_path / "a" / "novel.txt", tmp_path / "b" / "novel.txt"])
  with pytest.raises(UserError, match="cannot be read"):
    gather([tmp_path / "none.txt"])


def test_pythons_own_prose_is_the_default():
  (text,) = gather([])
  assert len(text.text) > 100_000


def test_kinds_of_text_stand_in_the_order_asked_for():
  found = gather_kinds(["identifiers", "code", "text"], [], tokens=80, seed=0)
  assert [kind.name for kind in found] == ["identifiers", "code", pydoc_held_out().name]
  first, code, _ = (kind.text for kind in found)
  assert len(first.split(",")) == 11
  assert "class ArgumentParser" in code
  assert "class TarFile" in code
  # Calibration with any small seed drew others.
  drawn = [set(random_identifiers(11, seed).text.split(",")) for seed in range(100)]
  assert not any(set(first.split(",")) & ids for ids in drawn)
  assert gather_kinds(["identifiers"], [], tokens=80, seed=1)[0].text != first


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["prose"], "kinds: expected each of text, code, identifiers at most once, got prose"),
    (["code", "code"], "at most once, got code,code"),
    ([""], "kinds: expected"),
  ],
)
def test_unknown_kinds_are_refused(names, message):
  with pytest.raises(UserError, match=message):
    gather_kinds(names, [], tokens=8, seed=0)


def test_files_must_be_a_kind_and_not_named_like_another(tmp_path):
  path = tmp_path / "code.txt"
  path.write_text("some words")
  with pytest.raises(UserError, match="text: has no meaning without the kind text, got kinds code"):
    gather_kinds(["code"], [path], tokens=8, seed=0)
  with pytest.raises(UserError, match="text: a file is named like another kind"):
    gather_kinds(["text", "code"], [path], tokens=8, seed=0)
