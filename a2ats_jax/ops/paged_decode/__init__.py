"""Attention of one decode step over pages, and a tail in the same softmax."""

from types import MappingProxyType

from a2ats_jax.attention import Part, Tail
from a2ats_jax.ops import dispatch, stored_tiles
from a2ats_jax.ops.paged_decode import gpu, reference, tpu
from a2ats_jax.ops.pages import BytePages, Pages
from a2ats_jax.ops.tiles import DecodeTiles
from a2ats_jax.typing import Array, Bool, Float


def shape_of(q: Array, pages: Pages, mask: Array, tail: Tail | None = None) -> stored_tiles.Shape:
  """What stored tiles are looked up by."""
  b, kv_heads, fetched, page = mask.shape
  packed = isinstance(pages, BytePages)
  shape: dict[str, int | str | bool] = {
    "heads": b * kv_heads,
    "group": q.shape[2] // kv_heads,
    "fetched": fetched,
    "page": page,
    "dim": q.shape[3],
    "dtype": str(pages.form.dtype if packed else pages.keys.dtype),
    "bytes": packed,
  }
  return shape if tail is None else shape | {"codewords": tail.sums.shape[2]}


def _on_tpu(q: Array, pages: Pages, mask: Array, tail: Tail | None = None) -> Part:
  tiles = stored_tiles.find("paged_decode", DecodeTiles, shape_of(q, pages, mask, tail))
  if isinstance(pages, BytePages):
    return tpu.packed_decode(q, pages.data, mask, form=pages.form, tail=tail, tiles=tiles)
  return tpu.paged_decode(q, pages.keys, pages.values, mask, tail=tail, tiles=tiles)


def _not_on_tpu(
  backend: str, q: Array, pages: Pages, mask: Array, tail: Tail | None = None
) -> list[str]:
  del tail
  if isinstance(pages, BytePages):  # whose format was checked when it was made
    return tpu.backend_hindrances(backend)
  return tpu.hindrances(backend, q, pages.keys, pages.values, mask)


def _on_gpu(q: Array, pages: Pages, mask: Array, tail: Tail | None = None) -> Part:
  tiles = stored_tiles.find("paged_decode", gpu.Tiles, shape_of(q, pages, mask, tail))
  return gpu.paged_decode(q, pages.keys, pages.values, mask, tail=tail, tiles=tiles)


def _not_on_gpu(
  backend: str, q: Array, pages: Pages, mask: Array, tail: Tail | None = None
) -> list[str]:
  del tail
  reasons = gpu.hindrances(backend, q, pages.keys, pages.values, mask)
  return reasons + ["pages must be floats, got bytes"] * isinstance(pages, BytePages)


def _anywhere(q: Array, pages: Pages, mask: Array, tail: Tail | None = None) -> Part:
  return reference.paged_decode(q, pages.keys, pages.values, mask, tail=tail)


IMPLEMENTATIONS = MappingProxyType(
  {
    "tpu": dispatch.Implementation(run=_on_tpu, hindrances=_not_on_tpu),
    "gpu": dispatch.Implementation(run=_on_gpu, hindrances=_not_on_gpu),
    dispatch.REFERENCE: dispatch.Implementation(run=_anywhere),
  }
)


def paged_decode(
  q: Float[Array, "B 1 H D"],
  pages: Pages,
  mask: Bool[Array, "B K F P"],
  tail: Tail | None = None,
  *,
  implementation: str = dispatch.AUTO,
) -> Part:
  """Softmax attention over the tokens of the mask: output, maximum and sum, not yet normalised.

  Args:
    q: rotated, any float dtype; scaled by ``1/sqrt(D)`` here.
    pages: F pages of P tokens for every row and KV head, keys rotated, as
      :func:`a2ats_jax.store.fetch` and ``fetch_blocks`` bring them.
    mask: tokens that count; none at all is allowed. The others' keys and values must be finite.
    tail: an estimate of other keys, which joins the same softmax; finite sums and weights.
    implementation: by name, or ``auto``.
  """
  return dispatch.call("paged_decode", IMPLEMENTATIONS, implementation, q, pages, mask, tail)
