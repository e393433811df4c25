"""How many pages are fetched at once."""

import pytest

from a2ats_jax.methods.paging import stage_of


@pytest.mark.parametrize(
  ("granted", "per", "most", "want"),
  [
    (2048, "kv_head", 999, 64),  # half of the 128 pages that they fill
    (2048, "query_head", 999, 128),
    (2049, "query_head", 999, 129),
    (100, "kv_head", 999, 8),  # not fewer than eight
    (100, "query_head", 5, 5),  # nor more than there are
    (0, "query_head", 0, 1),
  ],
)
def test_a_stage_is_a_third_of_what_is_needed(granted, per, most, want):
  assert stage_of(granted, per, page=16, most=most) == want
