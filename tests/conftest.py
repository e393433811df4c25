"""Settings every test runs under: eight virtual CPU devices, strict promotion of dtype and rank."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Under CI the drawn examples are the same every time; elsewhere they are new, and find more.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
  settings.load_profile("ci")


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_module():
  """Forget compiled programs after every file: each takes memory maps, of which there are 65530.

  Beyond that XLA's compiler crashes.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def quick_to_compile():
  """For files whose programs run for milliseconds and would be compiled for minutes."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
