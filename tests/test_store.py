"""Pages: what is written is what is fetched, and fetching costs what is fetched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import store as paged
from a2ats_jax.errors import UserError

SIZES = {"layers": 3, "batch": 2, "kv_heads": 2, "head_dim": 4, "page": 4, "dtype": jnp.float32}


def filled(placement: str, slots: int = 16):
  """A store whose layer 1 holds a prompt, and the prompt."""
  rng = np.random.default_rng(0)
  k, v = (jnp.asarray(rng.normal(size=(2, 2, slots, 4)), jnp.float32) for _ in range(2))

  @jax.jit
  def make():
    store = paged.open_store(slots=slots + 8, placement=placement, **SIZES)
    return paged.write_prompt(store, k, v, layer=1)

  return make(), k, v


@pytest.mark.parametrize("placement", ["host", "device"])
def test_fetch_gives_what_was_written(placement):
  store, k, v = filled(placement)
  ids = jnp.asarray([[[3, 0], [1, 1]], [[2, 3], [0, 2]]], jnp.int32)
  got_k, got_v = jax.jit(lambda s, i: paged.fetch(s, i, layer=1))(store, ids)
  for row, head in np.ndindex(2, 2):
    tokens = np.concatenate([np.arange(4) + 4 * page for page in ids[row, head]])
    np.testing.assert_array_equal(got_k[row, head].reshape(-1, 4), k[row, head, tokens])
    np.testing.assert_array_equal(got_v[row, head].reshape(-1, 4), v[row, head, tokens])
  other = jax.jit(lambda s, i: paged.fetch(s, i, layer=2))(store, ids)
  assert not np.any(other[0])


@pytest.mark.parametrize("placement", ["host", "device"])
def test_a_page_is_written_where_each_row_stands(placement):
  store, k, _ = filled(placement)
  block = jnp.full((2, 2, 4, 4), 7.0)
  write = jax.jit(lambda s, p: paged.write_page(s, block, -block, p, layer=1))
  store = write(store, jnp.asarray([5, -1], jnp.int32))
  every = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None, None], (2, 2, 6))
  got_k, got_v = jax.jit(lambda s, i: paged.fetch(s, i, layer=1))(store, every)
  got_k, got_v = (x.reshape(2, 2, 24, 4) for x in (got_k, got_v))
  np.testing.assert_array_equal(got_k[:, :, :16], k)
  np.testing.assert_array_equal(got_k[0, :, 20:], 7.0)
  np.testing.assert_array_equal(got_v[0, :, 20:], -7.0)
  assert not np.any(got_k[1, :, 16:])


@pytest.mark.parametrize("placement", ["host", "device"])
def test_temporary_memory_is_that_of_the_pages_fetched(placement):
  """Compiled: eight times the store, the same temporary bytes, far below the store's."""
  ids = jnp.zeros((2, 2, 2), jnp.int32)
  temporary = []
  for slots in (1024, 8192):
    store, _, _ = filled(placement, slots)

    def loop(store, ids):
      def body(total, layer):
        k, v = paged.fetch(store, ids, layer=layer)
        return total + k.sum() + v.sum(), None

      return jax.lax.scan(body, jnp.zeros(()), jnp.arange(3, dtype=jnp.int32))[0]

    pages = store.pages
    compiled = (
      jax.jit(lambda p, i, s=store: loop(paged.KVStore(p, s.page, s.host), i))
      .lower(pages, ids)
      .compile()
    )
    temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[-1] < pages.nbytes / 10
  assert temporary[0] == temporary[1]


def test_writing_a_donated_store_copies_nothing():
  """In a loop over layers, as a decode step does: the store is updated in place."""
  store, _, _ = filled("host", 4096)
  block = jnp.ones((2, 2, 4, 4))
  page = jnp.asarray([3, 5], jnp.int32)

  def loop(pages):
    def body(carry, layer):
      pages, total = carry
      here = paged.write_page(paged.KVStore(pages, 4, True), block, block, page, layer=layer)
      k, _ = paged.fetch(here, jnp.zeros((2, 2, 2), jnp.int32), layer=layer)
      return (here.pages, total + k.sum()), None

    return jax.lax.scan(body, (pages, jnp.zeros(())), jnp.arange(3, dtype=jnp.int32))[0]

  compiled = jax.jit(loop, donate_argnums=0).lower(store.pages).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= store.pages.nbytes
  assert memory.temp_size_in_bytes < store.pages.nbytes / 10


def test_slots_that_are_no_whole_pages_are_refused():
  with pytest.raises(UserError, match="10 slots are not a whole number of pages of 4"):
    paged.open_store(slots=10, **SIZES)


def test_no_host_memory_says_so(monkeypatch):
  """Device memory on its own, an error where host memory was asked for."""
  monkeypatch.setattr(paged, "host_memory", lambda: False)
  with pytest.warns(UserWarning, match="'cpu' has no host memory kind: pages stay in device"):
    assert not paged.open_store(slots=8, placement="auto", **SIZES).host
  with pytest.raises(UserError, match="no host memory"):
    paged.open_store(slots=8, placement="host", **SIZES)


def test_pages_are_whole_tiles_on_a_tpu(monkeypatch):
  """4 tokens of 4 float32 keys and values are 128 bytes; 16 of 32 are 4096."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  with pytest.raises(UserError, match="multiple of 4096 bytes, got 128"):
    paged.open_store(slots=8, placement="device", **SIZES)
  whole = SIZES | {"page": 16, "head_dim": 32}
  assert paged.open_store(slots=32, placement="device", **whole).page_bytes == 4096
