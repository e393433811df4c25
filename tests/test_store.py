"""Pages: what is written is what is fetched, and fetching costs what is fetched."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import quantise
from a2ats_jax import store as paged
from a2ats_jax.errors import UserError
from a2ats_jax.ops.page_fetch import tpu
from a2ats_jax.ops.pages import BytePages, FloatPages
from a2ats_jax.ops.tiles import PageFormat

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
  heads = jnp.asarray([2, 0, 2], jnp.int32)  # row 1's first KV head twice, and row 0's
  blocks = paged.fetch_blocks(store, heads, ids.reshape(4, 2)[heads], layer=1)
  for block, every in zip(blocks, (got_k, got_v), strict=True):
    np.testing.assert_array_equal(block[:, 0], every.reshape(4, *every.shape[2:])[heads])
  other = jax.jit(lambda s, i: paged.fetch(s, i, layer=2))(store, ids)
  assert not np.any(other[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("placement", ["host", "device"])
def test_a_quantised_store_gives_what_the_quantiser_gives(bits, placement):
  """A prompt and a later page, groups of 32 channels, in as many bytes as the bits need."""
  rng = np.random.default_rng(bits)
  k, v = (jnp.asarray(rng.normal(size=(2, 2, 16, 64)), jnp.float32) for _ in range(2))
  late = jnp.asarray(rng.normal(size=(2, 2, 4, 64)), jnp.float32)
  ids = jnp.asarray([[[3, 4], [1, 4]], [[4, 3], [4, 2]]], jnp.int32)

  @jax.jit
  def made():
    store = paged.open_store(slots=24, placement=placement, bits=bits, **SIZES | {"head_dim": 64})
    store = paged.write_prompt(store, k, v, layer=1)
    store = paged.write_page(store, late, -late, jnp.asarray([4, -1], jnp.int32), layer=1)
    return store, paged.fetch(store, ids, layer=1)

  def told(x: jax.Array) -> np.ndarray:
    x = quantise.decode(quantise.encode(x, bits=bits, group=32))
    return np.asarray(x).reshape(2, 2, -1, 4, 64)

  store, got = made()
  assert store.page_bytes == 2 * 4 * (64 * bits // 8 + 2 * 4)
  assert store.pages.dtype == jnp.uint8
  none = jnp.where(jnp.arange(2)[:, None, None, None] == 0, late, 0.0)  # row 1 wrote no page
  for pages, prompt, page in ((got.keys, k, none), (got.values, v, -none)):
    every = np.concatenate([told(prompt), told(page)], axis=2)
    for row, head in np.ndindex(2, 2):
      want = every[row, head, ids[row, head]]
      np.testing.assert_allclose(pages[row, head], want, rtol=0, atol=1e-6)
  with pytest.raises(UserError, match="bits: expected one of"):
    paged.open_store(slots=24, bits=3, **SIZES)


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


def test_pages_are_copied_by_pages():
  """Compiled: what gathers makes rows of P D numbers, not of D; a CPU is slower at the latter."""
  store, _, _ = filled("device")
  q = jnp.ones((2, 2, 4))

  @jax.jit
  def scores(pages, q, ids):
    keys, values = paged.fetch(paged.KVStore(pages, store.page, store.host), ids, layer=1)
    return jnp.einsum("bkd,bkfpd->bkfp", q, keys), values.sum(axis=(2, 3))

  text = scores.lower(store.pages, q, jnp.zeros((2, 2, 3), jnp.int32)).compile().as_text()
  shapes = re.findall(r"%gather\S* = f32\[(\S+?)\]\S* fusion\(", text)
  assert shapes == ["12,16"] * 2


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


def test_pages_are_whole_tiles_of_bytes_on_a_tpu(monkeypatch):
  """4 tokens of 64 float32 keys and values are half a tile of 4096 bytes."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  with pytest.raises(UserError, match="head size must be one of 64, 128, 256, got 4"):
    paged.open_store(slots=8, placement="device", **SIZES)
  with pytest.raises(UserError, match="multiple of 8 for float32 and head size 64, got 4"):
    paged.open_store(slots=8, placement="device", **SIZES | {"head_dim": 64})
  monkeypatch.setattr(paged, "page_zeros", partial(tpu.page_zeros, interpret=True))
  store = paged.open_store(slots=32, placement="device", **SIZES | {"page": 8, "head_dim": 64})
  assert store.page_bytes == 4096
  assert store.pages.dtype == jnp.int8
  assert store.form == PageFormat(page=8, dim=64, dtype=jnp.dtype(jnp.float32))


# --- pages of bytes, which a TPU's store keeps, against pages of floats -------------------------


class Run(NamedTuple):
  """A store's life, drawn: what is written and what is fetched."""

  form: PageFormat
  placement: paged.Placement
  prompt: tuple[np.ndarray, np.ndarray]  # keys and values, [B, K, T, D]
  pages: np.ndarray  # [writes, B], the page each row writes, or -1
  written: np.ndarray  # [writes, 2, B, K, P, D]
  ids: np.ndarray  # [B, K, F]


class Drawn(NamedTuple):
  """What a run is made of; sizes in pages but for rows and heads."""

  dtype: Any
  dim: int
  tiles: int  # of 4096 bytes, a page
  placement: paged.Placement
  b: int
  kv_heads: int
  prompt: int
  more: int
  writes: int
  fetched: int
  seed: int

  def run(self) -> Run:
    """Random numbers, pages and rows."""
    page = self.tiles * 4096 // (2 * self.dim * jnp.dtype(self.dtype).itemsize)
    form = PageFormat(page=page, dim=self.dim, dtype=jnp.dtype(self.dtype))
    rng, end = np.random.default_rng(self.seed), self.prompt + self.more
    heads = (2, self.b, self.kv_heads)
    return Run(
      form,
      self.placement,
      tuple(rng.normal(size=(*heads, self.prompt * form.page, form.dim)).astype(form.dtype)),
      rng.integers(-1, end, (self.writes, self.b)).astype(np.int32),
      rng.normal(size=(self.writes, *heads, form.page, form.dim)).astype(form.dtype),
      rng.integers(0, end, (*heads[1:], self.fetched)).astype(np.int32),
    )


DRAWN = st.builds(
  Drawn,
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  dim=st.sampled_from([64, 128, 256]),
  tiles=st.integers(1, 2),
  placement=st.sampled_from(["host", "device"]),
  b=st.integers(1, 3),
  kv_heads=st.integers(1, 2),
  prompt=st.integers(1, 3),
  more=st.integers(1, 2),
  writes=st.integers(1, 3),
  fetched=st.integers(1, 4),
  seed=st.integers(0, 2**32 - 1),
)


def lived(run: Run, opened_as) -> paged.Pages:
  """What a store of two layers gives back of the second after all was written, compiled."""
  b, kv_heads, tokens, dim = run.prompt[0].shape
  page = run.form.page

  @jax.jit
  def life(prompt, pages, written, ids, layer):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(paged, "page_format", opened_as)
      store = paged.open_store(
        layers=2,
        batch=b,
        kv_heads=kv_heads,
        head_dim=dim,
        slots=tokens + 2 * page,
        page=page,
        dtype=run.form.dtype,
        placement=run.placement,
      )
    store = paged.write_prompt(store, *prompt, layer=layer)
    store = paged.write_prompt(store, *(-x for x in prompt), layer=0)

    def write(i, store):
      return paged.write_page(store, *written[i], pages[i], layer=layer)

    store = jax.lax.fori_loop(0, len(run.pages), write, store)
    return paged.fetch(store, ids, layer=layer)

  return life(run.prompt, run.pages, run.written, run.ids, jnp.asarray(1, jnp.int32))


def as_floats(**kwargs) -> None:
  return None


def as_bytes(*, page, dim, dtype) -> PageFormat:
  return PageFormat(page=page, dim=dim, dtype=jnp.dtype(dtype))


def interpreted(patch: pytest.MonkeyPatch) -> None:
  """The store's kernels are those of a TPU."""
  fetching, writing = (partial(x, interpret=True) for x in (tpu.page_fetch, tpu.page_write))
  patch.setattr(paged, "page_fetch", lambda pages, ids: (fetching(pages, ids),))
  patch.setattr(paged, "page_write", writing)
  patch.setattr(paged, "page_zeros", partial(tpu.page_zeros, interpret=True))


def assert_bytes_give_floats(run: Run, kernels: bool) -> None:
  want = lived(run, as_floats)
  assert isinstance(want, FloatPages)
  with pytest.MonkeyPatch.context() as patch:
    if kernels:
      interpreted(patch)
    got = lived(run, as_bytes)
  assert isinstance(got, BytePages)
  assert want.keys.dtype == run.form.dtype
  for name, x, y in zip(("keys", "values"), got, want, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=name)
  np.testing.assert_array_equal(got.keys, want.keys)
  np.testing.assert_array_equal(got.values, want.values)


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "interpreter"])
@settings(max_examples=8, deadline=None)
@given(what=DRAWN)
def test_bytes_give_what_floats_give(kernels, what):
  """Bit for bit, whatever the shape, through prompts, pages of some rows, and fetches."""
  assert_bytes_give_floats(what.run(), kernels)


def high_byte_first(self, k, v):
  """Bytes of a number in the wrong order."""
  return (
    packed(self, k, v)
    .reshape(*k.shape[:-2], -1, self.dtype.itemsize, 128)[..., ::-1, :]
    .reshape(*k.shape[:-2], self.rows, 128)
  )


def values_first(self, k, v):
  return packed(self, v, k)


packed = PageFormat.pack


def one_run() -> Run:
  """Every page looked at, rows left out among those written."""
  run = Drawn(jnp.float32, 64, 1, "host", 2, 2, 2, 2, 2, 4, seed=1).run()
  every = np.broadcast_to(np.arange(4, dtype=np.int32), (2, 2, 4))
  return run._replace(pages=np.asarray([[3, -1], [0, 2]], np.int32), ids=every)


@pytest.mark.parametrize("wrong", [high_byte_first, values_first])
def test_wrong_bytes_are_caught(monkeypatch, wrong):
  assert_bytes_give_floats(one_run(), kernels=False)
  monkeypatch.setattr(PageFormat, "pack", wrong)
  with pytest.raises(AssertionError, match="keys"):
    assert_bytes_give_floats(one_run(), kernels=False)


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "interpreter"])
def test_a_row_that_is_written_in_spite_of_minus_one_is_caught(monkeypatch, kernels):
  numbers = paged._write_bytes

  def wrong(store, form, k, v, ids, layer):
    return numbers(store, form, k, v, jnp.maximum(ids, 0), layer)

  monkeypatch.setattr(paged, "_write_bytes", wrong)
  with pytest.raises(AssertionError, match="keys"):
    assert_bytes_give_floats(one_run(), kernels)


@pytest.mark.parametrize("rows", [1, 7, 30, 99])
def test_host_pages_are_zeroed_block_by_block(rows, monkeypatch):
  """30 pages of 256 bytes in blocks of so many; what a block does not reach would not be zero."""
  monkeypatch.setattr(paged, "_BLOCK_BYTES", rows * 256)
  monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, 7, dtype))
  jax.clear_caches()
  shape = {"layers": 2, "batch": 1, "kv_heads": 3, "head_dim": 8, "page": 4, "dtype": jnp.float32}
  opened = paged.open_store(slots=20, placement="host", **shape)
  empty = paged.open_store(slots=0, placement="host", **shape)
  jax.clear_caches()
  assert opened.pages.shape == (2, 1, 3, 5, 64)
  assert opened.pages.sharding.memory_kind == empty.pages.sharding.memory_kind == "pinned_host"
  assert not np.any(np.asarray(opened.pages))
  assert empty.pages.shape == (2, 1, 3, 0, 64)
