"""Pages of keys and values, in host or device memory. The only file that names a memory kind.

A page holds the keys and then the values of P tokens of one KV head, side by side, so that one copy
brings both. All layers lie in one array, so that a scan over layers never takes a layer out of it.
Data moves by whole pages: blocks are written, rows are gathered, nothing is scattered.
"""

import dataclasses
import warnings
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from a2ats_jax.errors import UserError
from a2ats_jax.ops.page_fetch import page_fetch
from a2ats_jax.typing import Array, Float, Int

Placement = Literal["auto", "host", "device"]

TILE = 4096  # bytes: a TPU copies a page whose number it computes in whole tiles of [32, 128] bytes


@partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["page", "host"])
@dataclasses.dataclass(frozen=True)
class KVStore:
  """Pages of every layer, row and KV head.

  Attributes:
    pages: ``2 P D`` numbers a page: P keys, then P values.
    page: P, tokens a page.
    host: whether the pages lie in host memory.
  """

  pages: Float[Array, "L B K N page_numbers"]
  page: int
  host: bool

  @property
  def page_bytes(self) -> int:
    """Bytes of a page, keys and values."""
    return self.pages.shape[-1] * self.pages.dtype.itemsize


def host_memory() -> bool:
  """Whether the default backend has a host memory that its programs can address."""
  kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
  return "pinned_host" in kinds


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
) -> KVStore:
  """An empty store.

  Args:
    slots: tokens of each row and KV head, a multiple of ``page``.
    placement: ``auto`` is host memory where the backend has it, device memory with a warning
      elsewhere; the store says which in ``host``.

  Raises:
    UserError: host memory was asked for and there is none, slots are no whole pages, or, on a TPU,
      pages are no whole tiles.
  """
  backend = jax.default_backend()
  if slots % page:
    raise UserError(f"store: {slots} slots are not a whole number of pages of {page}")
  size = 2 * page * head_dim * jnp.dtype(dtype).itemsize
  if backend == "tpu" and size % TILE:
    raise UserError(
      f"store: on a TPU a page must be a multiple of {TILE} bytes, got {size}: {page} tokens of "
      f"{head_dim} {jnp.dtype(dtype).name} keys and values; choose another page"
    )
  if placement == "host" and not host_memory():
    raise UserError(f"store: backend {backend!r} has no host memory kind")
  host = host_memory() if placement == "auto" else placement == "host"
  if placement == "auto" and not host:
    warnings.warn(
      f"backend {backend!r} has no host memory kind: pages stay in device memory", stacklevel=2
    )
  pages = jnp.zeros((layers, batch, kv_heads, slots // page, 2 * page * head_dim), dtype)
  return KVStore(_to(pages, host), page, host)


def _to(x: Array, host: bool) -> Array:
  return jax.device_put(x, jax.memory.Space.Host if host else jax.memory.Space.Device)


def _paged(
  k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], page: int
) -> Float[Array, "B K N page_numbers"]:
  b, kv_heads, t, d = k.shape
  both = jnp.stack([x.reshape(b, kv_heads, t // page, page, d) for x in (k, v)], axis=3)
  return both.reshape(b, kv_heads, t // page, 2 * page * d)


def write_prompt(
  store: KVStore, k: Float[Array, "B K T D"], v: Float[Array, "B K T D"], *, layer: int | Array
) -> KVStore:
  """Write the first pages of a layer, T tokens of every row and KV head, as one block.

  Args:
    k, v: in the order of their slots; T a multiple of the page.
  """
  block = _paged(k, v, store.page).astype(store.pages.dtype)[None]
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

  A row at a time: rows may stand at different pages, and a block is a copy where a scatter on host
  memory would not compile.
  """
  pages = store.pages
  blocks = _paged(k, v, store.page).astype(pages.dtype)
  for row in range(k.shape[0]):
    at = (layer, row, 0, jnp.maximum(page[row], 0), 0)
    old = _to(jax.lax.dynamic_slice(pages, at, (1, 1, *blocks.shape[1:])), False)
    new = jnp.where(page[row] < 0, old, blocks[row][None, None])
    pages = jax.lax.dynamic_update_slice(pages, _to(new, store.host), at)
  return dataclasses.replace(store, pages=pages)


def fetch(
  store: KVStore, ids: Int[Array, "B K F"], *, layer: int | Array
) -> tuple[Float[Array, "B K F P D"], Float[Array, "B K F P D"]]:
  """Keys and values of F pages for every row and KV head, on the device.

  Temporary memory is that of the pages fetched, whatever the store holds.

  Args:
    ids: 0 .. N - 1.
  """
  layers, b, kv_heads, pages, numbers = store.pages.shape
  f, half = ids.shape[2], numbers // 2
  rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
  heads = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
  flat = ((layer * b + rows) * kv_heads + heads) * pages + ids
  table = store.pages.reshape(layers * b * kv_heads * pages, 2, half)
  both = page_fetch(table, _to(flat.reshape(-1), store.host))
  shape = (b, kv_heads, f, store.page, half // store.page)
  keys, values = (_to(x, False).reshape(shape) for x in both)
  return keys, values
