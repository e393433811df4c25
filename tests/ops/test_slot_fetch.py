"""The two forms of slot_fetch against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.ops.slot_fetch import reference, slot_fetch, tpu


def _inputs(page: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng((page, rows))
  numbers = rng.integers(-(2**31), 2**31, (2, 3, rows, 128), dtype=np.int32)
  return numbers, rng.integers(0, numbers.size // page, (2, 5), dtype=np.int32)


@pytest.mark.parametrize("page", [1, 2, 8, 16, 64, 128])
@pytest.mark.parametrize("rows", [1, 8])
def test_both_against_numpy(page, rows):
  numbers, pages = _inputs(page, rows)
  want = np.stack([numbers.ravel()[n * page : (n + 1) * page] for n in pages.ravel()])
  for form in (reference, tpu):
    got = form.slot_fetch(jnp.asarray(numbers), jnp.asarray(pages), page)
    np.testing.assert_array_equal(got, want.reshape(2, 5, page), err_msg=form.__name__)


def test_pages_that_do_not_divide_a_row_go_by_the_reference():
  numbers, pages = _inputs(24, 3)
  want = numbers.reshape(-1, 24)[pages]
  numbers, pages = jnp.asarray(numbers), jnp.asarray(pages)
  np.testing.assert_array_equal(slot_fetch(numbers, pages, 24), want)
  assert tpu.hindrances("tpu", numbers, pages, 24) == ["tokens a page must divide 128, got 24"]
  assert tpu.hindrances("tpu", numbers, pages, 256) != []
  assert tpu.hindrances("tpu", numbers, pages, 16) == []
  with pytest.raises(UserError, match="'tpu' cannot run: it is for a TPU, and the backend is cpu"):
    slot_fetch(numbers, pages, 16, implementation="tpu")
