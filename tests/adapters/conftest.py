"""The zoos promote dtypes and ranks as JAX does by default, which the other tests forbid."""

import jax
import pytest

NAMES = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")


@pytest.fixture(autouse=True, scope="module")
def _as_the_zoos_expect():
  before = [jax.config.values[name] for name in NAMES]
  for name, value in zip(NAMES, ("standard", "allow")):
    jax.config.update(name, value)
  yield
  for name, value in zip(NAMES, before):
    jax.config.update(name, value)
