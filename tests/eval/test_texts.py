"""Windows of a text: disjoint, seeded, the same predictions for every length."""

from pathlib import Path

import numpy as np
import pytest

from a2ats_jax.errors import UserError
from eval.texts import gather, prompt_of, windows
from tests.eval import tiny


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
