"""Budgets: parsing, and rounding that equals Python's at every length."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError

# Products that are whole numbers on paper and just below or above them in floating point.
EXACT = [0.03, 0.01, 0.29, 0.57, 0.58, 0.07, 0.1, 0.3, 0.7, 1 / 3, 0.0, 1.0]


@given(ratio=st.floats(0, 1))
@example(ratio=0.29)
@example(ratio=0.57)
@example(ratio=5e-324)
def test_ratio_rounds_like_python(ratio):
  got = Budget(ratio=ratio).resolve(300)
  assert got.dtype == np.int32
  assert got.tolist() == [int(ratio * length) for length in range(301)]


@pytest.mark.parametrize("ratio", EXACT)
def test_ratio_rounds_like_python_at_long_contexts(ratio):
  got = Budget(ratio=ratio).resolve(131072)
  assert got.tolist() == [int(ratio * length) for length in range(131073)]


def test_exact_multiples_are_where_float32_would_differ():
  """The case the table exists for: 0.57 * 100 is 56.99 in float64 and 57 in float32."""
  assert int(np.float32(0.57) * np.float32(100)) == 57
  assert Budget(ratio=0.57).resolve(100)[100] == 56


@given(tokens=st.integers(0, 500), longest=st.integers(0, 300))
def test_tokens_never_exceed_the_context(tokens, longest):
  assert Budget(tokens=tokens).resolve(longest).tolist() == [
    min(tokens, length) for length in range(longest + 1)
  ]


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("0.03", Budget(ratio=0.03)),
    ("0", Budget(ratio=0.0)),
    ("1", Budget(ratio=1.0)),
    ("1.0", Budget(ratio=1.0)),
    ("2", Budget(tokens=2)),
    (" 2048 ", Budget(tokens=2048)),
    ("1e-2", Budget(ratio=0.01)),
    ("0.06/kv", Budget(ratio=0.06, per="kv_head")),
    ("2048/kv", Budget(tokens=2048, per="kv_head")),
  ],
)
def test_parse(text, want):
  assert Budget.parse(text) == want


@pytest.mark.parametrize(
  "text", ["", "x", "3%", "1.5", "-1", "-0.1", "nan", "inf", "2.0", "²", "9/q", "/kv"]
)
def test_parse_refuses(text):
  with pytest.raises(UserError, match="budget"):
    Budget.parse(text)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"ratio": 0.5, "tokens": 3},
    {"ratio": -0.1},
    {"ratio": 1.1},
    {"ratio": float("nan")},
    {"tokens": -1},
  ],
  ids=str,
)
def test_impossible_budgets_are_refused(fields):
  with pytest.raises(UserError, match="budget"):
    Budget(**fields)


PER = st.sampled_from(["query_head", "kv_head"])


@given(
  budget=st.one_of(
    st.builds(Budget, ratio=st.floats(0, 1), per=PER),
    st.builds(Budget, tokens=st.integers(2, 10**6), per=PER),
  )
)
def test_text_reads_back_as_the_same_budget(budget):
  """What a table prints can be typed again."""
  assert Budget.parse(str(budget)) == budget
