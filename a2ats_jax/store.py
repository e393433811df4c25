"""Pages of keys and values, in host or device memory. The only file that names a memory kind.

A page holds the keys and then the values of P tokens of one KV head, side by side, so that one copy
brings both. All layers lie in one array, so that a scan over layers never takes a layer out of it.
Data moves by whole pages: blocks are written, rows are gathered, nothing is scattered.

Pages are floats, or on a TPU, which copies a page by a number it computes only as whole tiles of
bytes, ``int8`` in the order of :class:`a2ats_jax.ops.tiles.PageFormat`. What is fetched is the same
bit for bit. With fewer than 16 bits a store quantises what is written and moves that much less.
"""

import dataclasses
import math
import warnings
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from a2ats_jax import quantise
from a2ats_jax.errors import UserError
from a2ats_jax.ops.page_fetch import page_fetch
from a2ats_jax.ops.page_write import page_write, page_zeros
from a2ats_jax.ops.pages import BytePages, FloatPages, Pages
from a2ats_jax.ops.tiles import LANES, PageFormat
from a2ats_jax.typing import Array, Float, Int, Shaped

Placement = Literal["auto", "host", "device"]
_BLOCK_BYTES = 64 << 20
"""Of zeros on the device, while a store in host memory is opened."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised:
  """How a store of packed integers keeps a key or a value: codes, then scales, then floors.

  Attributes:
    bits: of a number: 2, 4 or 8.
    dim: D.
    dtype: of the numbers that are written and fetched.
  """

  bits: int
  dim: int
  dtype: jnp.dtype

  @property
  def group(self) -> int:
    """Channels of a token that share a scale and a floor: 32, or all where D is no multiple."""
    return 32 if self.dim % 32 == 0 else self.dim

  @property
  def bytes(self) -> int:
    """Of a key or a value."""
    return quantise.bytes_of(self.dim, bits=self.bits, group=self.group, itemsize=0)

  def pack(self, x: Float[Array, "*lead D"]) -> Shaped[Array, "*lead bytes"]:
    """Numbers as ``uint8``."""
    packed = quantise.encode(x, bits=self.bits, group=self.group)
    floats = jnp.concatenate([packed.scale, packed.low], axis=-1)
    raw = jax.lax.bitcast_convert_type(floats, jnp.uint8).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([packed.words, raw], axis=-1)

  def unpack(self, raw: Shaped[Array, "*lead bytes"]) -> Float[Array, "*lead D"]:
    """The numbers that packed ones stand for."""
    words, floats = jnp.split(raw, [self.dim * self.bits // 8], axis=-1)
    floats = jax.lax.bitcast_convert_type(floats.reshape(*floats.shape[:-1], -1, 2), jnp.float16)
    scale, low = jnp.split(floats, 2, axis=-1)
    return quantise.decode(quantise.Packed(words, scale, low, self.bits), self.dtype)


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["pages"],
  meta_fields=["page", "host", "form", "quantised"],
)
@dataclasses.dataclass(frozen=True)
class KVStore:
  """Pages of every layer, row and KV head.

  Attributes:
    pages: ``2 P D`` numbers a page, P keys and then P values, or ``R 128`` bytes, or the bytes of
      as many quantised keys and values.
    page: P, tokens a page.
    host: whether the pages lie in host memory.
    form: what the bytes of a page are on a TPU; none elsewhere.
    quantised: how a key or a value is packed; none where it is kept as it is.
  """

  pages: Shaped[Array, "L B K N *page_numbers"]
  page: int
  host: bool
  form: PageFormat | None = None
  quantised: Quantised | None = None

  @property
  def page_bytes(self) -> int:
    """Bytes of a page, keys and values."""
    return math.prod(self.pages.shape[4:]) * self.pages.dtype.itemsize


def host_memory() -> bool:
  """Whether the default backend has a host memory that its programs can address."""
  kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
  return memory_kind(True) in kinds


def page_format(*, page: int, dim: int, dtype: DTypeLike) -> PageFormat | None:
  """What the bytes of a page are, where the default backend's kernels take bytes; none elsewhere.

  Raises:
    UserError: such pages are no whole tiles.
  """
  if jax.default_backend() != "tpu":
    return None
  return PageFormat(page=page, dim=dim, dtype=jnp.dtype(dtype))


def open_store(
  *,
  layers: int,
  batch: int,
  kv_heads: int,
  head_dim: int,
  slots: int,
  page: int,
  dtype: DTypeLike,
  placement: Placement = "auto",
  bits: int = 16,
) -> KVStore:
  """An empty store.

  Args:
    slots: tokens of each row and KV head, a multiple of ``page``.
    placement: ``auto`` is host memory where the backend has it, device memory with a warning
      elsewhere; the store says which in ``host``.
    bits: of a stored number: 2, 4 or 8, or 16 for numbers as they are.

  Raises:
    UserError: host memory was asked for and there is none, slots are no whole pages, bits cannot be
      packed, or, on a TPU, pages are no whole tiles or quantised.
  """
  backend = jax.default_backend()
  if slots % page:
    raise UserError(f"store: {slots} slots are not a whole number of pages of {page}")
  quantised = None
  if bits != 16:
    if backend == "tpu":
      raise UserError(f"store: on a TPU pages cannot be quantised yet, got {bits} bits")
    quantised = Quantised(bits=bits, dim=head_dim, dtype=jnp.dtype(dtype))
    quantise.check(bits, quantised.group)
  form = None if quantised else page_format(page=page, dim=head_dim, dtype=dtype)
  if placement == "host" and not host_memory():
    raise UserError(f"store: backend {backend!r} has no host memory kind")
  host = host_memory() if placement == "auto" else placement == "host"
  if placement == "auto" and not host:
    warnings.warn(
      f"backend {backend!r} has no host memory kind: pages stay in device memory", stacklevel=2
    )
  shape = (layers, batch, kv_heads, slots // page)
  if form:
    pages = page_zeros(math.prod(shape), form.rows, host).reshape(*shape, form.rows, LANES)
  elif quantised:
    pages = _zeros((*shape, 2 * page * quantised.bytes), jnp.dtype(jnp.uint8), host)
  else:
    pages = _zeros((*shape, 2 * page * head_dim), jnp.dtype(dtype), host)
  return KVStore(pages, page, host, form, quantised)


def memory_kind(host: bool) -> str | None:
  """The name of host memory, or none for the device's own."""
  return "pinned_host" if host else None


def _to(x: Array | np.ndarray, host: bool) -> Array:
  return jax.device_put(x, jax.memory.Space.Host if host else jax.memory.Space.Device)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, host: bool) -> Array:
  """Zeros; in host memory a block at a time, since whole they would first lie on the device."""
  if not host or not math.prod(shape):
    return _to(jnp.zeros(shape, dtype), host)
  rows, width = math.prod(shape[:-1]), shape[-1]
  block = max(1, min(rows, _BLOCK_BYTES // (width * dtype.itemsize)))
  none = jnp.zeros((block, width), dtype)

  def write(number: Array, pages: Array) -> Array:
    # The last block reaches back, so that none passes the end.
    return jax.lax.dynamic_update_slice(pages, _to(none, host), (number * block, 0))

  pages = _to(jax.lax.empty((rows, width), dtype), host)
  return jax.lax.fori_loop(0, -(-rows // block), write, pages).reshape(shape)


def _cut(x: Shaped[Array, "B K T D"], page: int) -> Shaped[Array, "B K N P D"]:
  b, kv_heads, t, d = x.shape
  return x.reshape(b, kv_heads, t // page, page, d)


def _paged(
  store: KVStore, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]
) -> Shaped[Array, "B K N page_numbers"]:
  if store.quantised:
    k, v = store.quantised.pack(k), store.quantised.pack(v)
  both = jnp.stack([_cut(x, store.page) for x in (k, v)], axis=3)
  return both.reshape(*both.shape[:3], -1).astype(store.pages.dtype)


def _numbers(store: KVStore, ids: Int[Array, "B K F"], layer: int | Array) -> Int[Array, "B*K*F"]:
  """Where pages lie in the array of all layers, rows and KV heads."""
  _, b, kv_heads, pages = store.pages.shape[:4]
  rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
  return (((layer * b + rows) * kv_heads + heads) * pages + ids).reshape(-1)


def _write_bytes(
  store: KVStore,
  form: PageFormat,
  k: Float[Array, "B K T D"],
  v: Float[Array, "B K T D"],
  ids: Int[Array, "B K N"],
  layer: int | Array,
) -> KVStore:
  k, v = (_cut(x.astype(form.dtype), form.page) for x in (k, v))
  new = form.pack(k, v).reshape(-1, form.rows, LANES)
  table = store.pages.reshape(-1, form.rows, LANES)
  where = jnp.where(ids.reshape(-1) < 0, -1, _numbers(store, ids, layer))
  pages = page_write(table, where, new)
  return dataclasses.replace(store, pages=pages.reshape(store.pages.shape))


def write_prompt(
  store: KVStore, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], *, layer: int | Array
) -> KVStore:
  """Write the first pages of a layer, T tokens of every row and KV head, as one block.

  Args:
    k, v: in the order of their slots; T a multiple of the page.
  """
  if store.form:
    b, kv_heads, t, _ = k.shape
    ids = jnp.arange(t // store.page, dtype=jnp.int32)
    ids = jnp.broadcast_to(ids[None, None], (b, kv_heads, t // store.page))
    return _write_bytes(store, store.form, k, v, ids, layer)
  block = _paged(store, k, v)[None]
  start = (layer, 0, 0, 0, 0)
  return dataclasses.replace(
    store, pages=jax.lax.dynamic_update_slice(store.pages, _to(block, store.host), start)
  )


def write_page(
  store: KVStore,
  k: Float[Array, "B K P D"],
  v: Float[Array, "B K P D"],
  page: Int[Array, "B"],
  *,
  layer: int | Array,
) -> KVStore:
  """Write one page of every row; -1 leaves a row as it is.

  Floats are written a row at a time: rows may stand at different pages, and a block is a copy where
  a scatter on host memory would not compile.
  """
  if store.form:
    ids = jnp.broadcast_to(page[:, None, None], (*k.shape[:2], 1))
    return _write_bytes(store, store.form, k, v, ids, layer)
  pages = store.pages
  blocks = _paged(store, k, v)
  for row in range(k.shape[0]):
    at = (layer, row, 0, jnp.maximum(page[row], 0), 0)
    old = _to(jax.lax.dynamic_slice(pages, at, (1, 1, *blocks.shape[1:])), False)
    new = jnp.where(page[row] < 0, old, blocks[row][None, None])
    pages = jax.lax.dynamic_update_slice(pages, _to(new, store.host), at)
  return dataclasses.replace(store, pages=pages)


def fetch(store: KVStore, ids: Int[Array, "B K F"], *, layer: int | Array) -> Pages:
  """F pages of every row and KV head, on the device.

  ``keys, values = fetch(...)`` gives floats [B, K, F, P, D]; attention takes the pages as they are.
  Temporary memory is that of the pages fetched, whatever the store holds.

  Args:
    ids: 0 .. N - 1.
  """
  return _fetch(store, _numbers(store, ids, layer), ids.shape)


def fetch_blocks(
  store: KVStore, heads: Int[Array, "W"], ids: Int[Array, "W F"], *, layer: int | Array
) -> Pages:
  """F pages of each of W blocks, as :func:`fetch` gives those of W rows with one KV head.

  Args:
    heads: ``row * K + KV head``, in any order and any number of times.
    ids: 0 .. N - 1.
  """
  _, b, kv_heads, pages = store.pages.shape[:4]
  where = ((layer * b * kv_heads + heads) * pages)[:, None] + ids
  return _fetch(store, where.reshape(-1), (heads.shape[0], 1, ids.shape[1]))


def _fetch(store: KVStore, where: Int[Array, "n"], lead: tuple[int, ...]) -> Pages:
  """Pages by their numbers among all, in an array of these leading axes."""
  shape = store.pages.shape[4:]
  if store.form:
    (got,) = page_fetch(store.pages.reshape(-1, *shape), where)
    return BytePages(got.reshape(*lead, *shape), store.form)
  half = shape[0] // 2
  keys, values = page_fetch(store.pages.reshape(-1, 2, half), where)
  shape = (*lead, store.page, half // store.page)
  keys, values = keys.reshape(shape), values.reshape(shape)
  if store.quantised:
    keys, values = store.quantised.unpack(keys), store.quantised.unpack(values)
  return FloatPages(keys, values)


def on_host(state: Any) -> list[bool]:
  """Of every leaf of a method's state, whether it lies in host memory: the pages of some stores."""
  found: list[bool] = []
  for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, KVStore)):
    found.append(isinstance(node, KVStore) and node.host)
  return found


def put(x: np.ndarray, *, host: bool) -> Array:
  """An array in memory of its own, on the host or on the device."""
  return _to(np.array(x), host)
