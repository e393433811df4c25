"""Ranges of positions, by hand."""

import pytest

from a2ats_jax.errors import UserError
from eval.buckets import Buckets


@pytest.mark.parametrize(
  ("text", "begin", "end", "spans"),
  [
    ("1", 5, 9, ((5, 9),)),
    ("2", 10, 16, ((10, 13), (13, 16))),
    ("3", 0, 8, ((0, 2), (2, 5), (5, 8))),  # what does not divide differs by one
    ("4,8,16", 4, 16, ((4, 8), (8, 16))),
    ("4,8,16", 6, 12, ((6, 8), (8, 12))),  # cut to what is fed
    ("4,8,16", 8, 20, ((8, 16),)),  # the first holds nothing; 16 to 19 are in none
  ],
)
def test_spans_by_hand(text, begin, end, spans):
  assert Buckets.parse(text).spans(begin, end) == spans
  assert str(Buckets.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1.5", "4,", "8,4", "4,4", "0,0"])
def test_what_is_no_bucket_is_refused(text):
  with pytest.raises(UserError, match=r"^buckets: expected a number of equal parts"):
    Buckets.parse(text)


def test_empty_buckets_are_refused():
  with pytest.raises(UserError, match="buckets: 5 parts of 4 tokens"):
    Buckets(parts=5).spans(0, 4)
  with pytest.raises(UserError, match="buckets: 4,8 holds none of the positions from 8 to 11"):
    Buckets(edges=(4, 8)).spans(8, 12)
