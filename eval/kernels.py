"""Every op at the shapes of a decode step: its inputs, its kernel by tile sizes, its check.

The kernels of one family (``tpu`` or ``gpu``) run on a device of it, or on the CPU under their
interpreters. A check compares with the op's reference, within the rounding of float32 sums in
another order, as ``tests/ops`` does.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax import store
from a2ats_jax.attention import Part, Tail
from a2ats_jax.errors import UserError
from a2ats_jax.ops import lookup, page_fetch, paged_decode, stored_tiles, vq_encode
from a2ats_jax.ops.pages import BytePages, FloatPages
from a2ats_jax.ops.tiles import DecodeTiles, EncodeTiles, FetchTiles, LookupTiles, PageFormat
from a2ats_jax.typing import Array

Family = Literal["tpu", "gpu"]
SUMS = 2e-5  # of up to some thousand products of size one, in two orders
ROUNDED = 2.0**-8  # weights in bfloat16, against a running peak here and the last one there
NEAR_TIE = 1e-5  # how far below the best a code may score, in parts of |k L| |c L|


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCase:
  """One attention layer in one decode step.

  Attributes:
    heads: H. kv_heads: K. head_dim: D. codewords: C. page: P, tokens a page. batch: B.
    pages: N, of a row and KV head.
    blocks: W, fetched at once, each of one row and KV head; the quarters of a stage that a step
      may end with take the choice by shape. fetched: F, pages of a block.
    near: pages of sinks and ring, of ``near_page`` tokens, attended with the tail.
    cells: of a KV head under eight segments, and looked up for so many ``edges``, the places of the
      prompt's pages.
    keys: encoded at once.
    dtype: of keys, values and queries.
  """

  heads: int
  kv_heads: int
  head_dim: int
  codewords: int
  page: int
  batch: int
  pages: int
  blocks: int
  fetched: int
  near: int
  near_page: int
  cells: int
  edges: int
  keys: int
  dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
  """An op with its arguments.

  Attributes:
    op: its name. note: what sets this case apart from the op's others.
    args: of the op.
    varied: which argument a repeated call is made to depend on, so that none is left out.
    shape: what stored tiles are looked up by.
    public: the op; takes the arguments and ``implementation``.
    kernel: of the family; takes the arguments and ``tiles``.
    chosen: tiles by shape. grid: values to try for each size.
    traffic: bytes to read and write at least, on the memory or link of the yardstick.
    yardstick: the plain copy to compare with.
    problem: takes a result and says where it is not the reference's.
  """

  op: str
  note: str
  args: tuple[Any, ...]
  varied: int
  shape: stored_tiles.Shape
  public: Callable[..., Any]
  kernel: Callable[..., Any]
  chosen: Any
  grid: Mapping[str, Sequence[int]]
  traffic: int
  yardstick: Literal["host to device", "device to device"]
  problem: Callable[[Any], str | None]

  def candidates(self) -> list[Any]:
    """The choice by shape, then every other combination that the class of sizes allows."""
    found = [self.chosen]
    for sizes in itertools.product(*self.grid.values()):
      try:
        tiles = dataclasses.replace(self.chosen, **dict(zip(self.grid, sizes)))
      except UserError:
        continue
      if tiles not in found:
        found.append(tiles)
    return found

  def repeated(self, run: Callable[..., Any], count: int) -> Callable[[], Any]:
    """A program that runs the op ``count`` times on the device, one after the other."""
    given, inside = jax.tree.flatten(self.args)
    outside: list[Any] = []

    def leaves_of(*args: Any) -> list[Array]:
      leaves, structure = jax.tree.flatten(run(*args))
      outside.append(structure)
      return leaves

    # Of leaves, because lowering puts what are no arrays into the fields of a dataclass.
    def program(given: list[Array]) -> list[Array]:
      args = jax.tree.unflatten(inside, given)

      def step(_: Array, before: list[Array]) -> list[Array]:
        live = list(args)
        live[self.varied], _ = jax.lax.optimization_barrier((args[self.varied], before))
        return leaves_of(*live)

      shapes = jax.eval_shape(lambda: leaves_of(*args))
      return jax.lax.fori_loop(0, count, step, [jnp.zeros(x.shape, x.dtype) for x in shapes])

    compiled = jax.jit(program).lower(given).compile()
    return lambda: jax.tree.unflatten(outside[0], compiled(given))

  def attempt(self, run: Callable[..., Any], count: int) -> Callable[[], Any] | str:
    """The repeated program; or what is wrong where it does not run, or not as the reference."""
    try:
      program = self.repeated(run, count)
      problem = self.problem(program())
    except Exception as error:  # whatever a compiler or a device says is the result
      return said(error)
    return program if problem is None else problem


def cases(layer: LayerCase, family: Family, *, interpret: bool = False) -> list[KernelCase]:
  """Every op that has a kernel in the family.

  Args:
    interpret: run kernels on the CPU.

  Raises:
    UserError: the family has no pages of this shape.
  """
  how: dict[str, Any] = {}
  if interpret:
    how = {"interpret": True if family == "tpu" else plgpu.InterpretGPUParams()}
  found = [_fetch(layer, family, how, host=False)]
  found += [_decode(layer, family, how, near) for near in (False, True)]
  found.append(_encode(layer, family, how, layer.keys))
  if family == "tpu":
    found.append(_encode(layer, family, how, layer.batch))  # on a GPU a step has too few
    found += [  # not on a GPU
      _lookup(layer, how, layer.batch * layer.kv_heads, layer.edges),
      _lookup(layer, how, layer.blocks, layer.fetched * layer.page),
    ]
  if family == "tpu" or not interpret:  # the GPU interpreter takes no array of host memory
    found.append(_fetch(layer, family, how, host=True))
  return found


def said(error: Exception) -> str:
  """The first line of what a compiler or a device says."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _around(chosen: int, *, most: int, steps: int = 2) -> list[int]:
  """Sizes a factor of two apart, up to so many steps either way."""
  sizes = {chosen >> step for step in range(1, steps + 1)}
  sizes |= {chosen << step for step in range(steps + 1)}
  return sorted({max(1, min(most, size)) for size in sizes})


def _form(layer: LayerCase) -> PageFormat:
  return PageFormat(page=layer.page, dim=layer.head_dim, dtype=jnp.dtype(layer.dtype))


def _fetch(layer: LayerCase, family: Family, how: dict[str, Any], *, host: bool) -> KernelCase:
  rng = np.random.default_rng(0)
  dtype, width = jnp.dtype(layer.dtype), layer.page * layer.head_dim
  count, each = layer.batch * layer.kv_heads * layer.pages, 2 * width * dtype.itemsize
  n = layer.blocks * layer.fetched
  raw = rng.integers(0, 256, count * each, dtype=np.uint8)
  if family == "tpu":
    pages = raw.view(np.int8).reshape(count, _form(layer).rows, 128)
    chosen: Any = FetchTiles.of(pages=n, page_bytes=each, host=host)
    grid = {"depth": _around(chosen.depth, most=min(64, n))}
  else:
    pages = raw.view(dtype).reshape(count, 2, width)
    chosen = page_fetch.gpu.Tiles.of(width=width, itemsize=dtype.itemsize)
    grid = {"piece": [128 << i for i in range(8) if width % (128 << i) == 0]}

  def kernel(pages: Array, ids: Array, tiles: Any) -> tuple[Array, ...]:
    if family == "tpu":
      return (page_fetch.tpu.page_fetch(pages, ids, tiles=tiles, **how),)
    return page_fetch.gpu.page_fetch(pages, ids, tiles=tiles, **how)

  def problem(got: tuple[Array, ...]) -> str | None:
    # Not by the reference: XLA may have no gather for pages in host memory.
    whole = np.concatenate([np.asarray(x).reshape(n, -1).view(np.uint8) for x in got], axis=1)
    wrong = int((whole != raw.reshape(count, each)[ids]).sum())
    return f"{wrong} of {whole.size} bytes differ" if wrong else None

  ids = rng.integers(0, count, n)
  args = (store.put(pages, host=host), jnp.asarray(ids, jnp.int32))
  return KernelCase(
    op="page_fetch",
    note="from host memory" if host else "from device memory",
    args=args,
    varied=1,
    shape=page_fetch.shape_of(*args),
    public=page_fetch.page_fetch,
    kernel=kernel,
    chosen=chosen,
    grid=grid,
    traffic=n * each * (1 if host else 2),
    yardstick="host to device" if host else "device to device",
    problem=problem,
  )


def _decode(layer: LayerCase, family: Family, how: dict[str, Any], near: bool) -> KernelCase:
  """Attention over fetched pages, or over near tokens with a tail."""
  rng = np.random.default_rng(1)
  dtype, d = jnp.dtype(layer.dtype), layer.head_dim
  count, page = (layer.near, layer.near_page) if near else (layer.fetched, layer.page)
  group = layer.heads // layer.kv_heads
  b, kv_heads = (layer.batch, layer.kv_heads) if near else (layer.blocks, 1)
  lead = (b, kv_heads, count, page)
  q = jnp.asarray(rng.normal(size=(b, 1, kv_heads * group, d)), dtype)
  keys, values = (jnp.asarray(rng.normal(size=(*lead, d)), dtype) for _ in range(2))
  mask = jnp.asarray(rng.random(lead) < 0.5)
  codewords = layer.codewords if near else 0
  tail = _tail(layer, rng) if near else None
  each = 2 * page * d * dtype.itemsize
  pages: BytePages | FloatPages = FloatPages(keys, values)
  rounding = 0.0
  if family == "tpu":
    if not near:
      pages = BytePages(_form(layer).pack(keys, values), _form(layer))
    chosen: Any = DecodeTiles.of(pages=count, page_bytes=each)
    grid: dict[str, Sequence[int]] = {"pages": _around(chosen.pages, most=count)}
    rounding = ROUNDED if dtype == jnp.bfloat16 else 0.0
  else:
    tokens, heads, size = count * page, b * kv_heads, dtype.itemsize
    chosen = paged_decode.gpu.Tiles.of(
      heads=heads, group=group, tokens=tokens, head_dim=d, itemsize=size, codewords=codewords
    )
    splits = _around(chosen.splits, most=4 * chosen.splits, steps=1)
    grid = {"steps": (2, 4, 8), "stages": (2, 4, 6), "splits": splits}

  def kernel(q: Array, pages: Any, mask: Array, tail: Tail | None, tiles: Any) -> Part:
    options: dict[str, Any] = {"tail": tail, "tiles": tiles, **how}
    if isinstance(pages, BytePages):
      return paged_decode.tpu.packed_decode(q, pages.data, mask, form=pages.form, **options)
    if family == "tpu":
      return paged_decode.tpu.paged_decode(q, pages.keys, pages.values, mask, **options)
    return paged_decode.gpu.paged_decode(q, pages.keys, pages.values, mask, **options)

  def problem(got: Part) -> str | None:
    exact = paged_decode.reference.paged_decode
    x, k, v = (x.astype(jnp.float32) for x in (q, keys, values))
    sizes = dataclasses.replace(tail, sums=jnp.abs(tail.sums)) if tail else None
    want, terms = exact(x, k, v, mask, tail=tail), exact(x, k, jnp.abs(v), mask, tail=sizes).out
    return _far_off(got, want, np.asarray(terms) * (rounding + SUMS))

  args = (q, pages, mask, tail)
  note = f"{count * page} near tokens and a tail of {codewords} codewords"
  return KernelCase(
    op="paged_decode",
    note=note if near else f"{b} blocks of {count} pages",
    args=args,
    varied=0,
    shape=paged_decode.shape_of(*args),
    public=paged_decode.paged_decode,
    kernel=kernel,
    chosen=chosen,
    grid=grid,
    traffic=math.prod(lead[:3]) * each + sum(x.nbytes for x in jax.tree.leaves(tail)),
    yardstick="device to device",
    problem=problem,
  )


def _tail(layer: LayerCase, rng: np.random.Generator) -> Tail:
  """Sums of values of every codeword, with weights as of keys like those in pages."""
  heads = (layer.batch, 1, layer.heads)
  sums = (layer.batch, layer.kv_heads, layer.codewords, layer.head_dim)
  weights = jnp.asarray(rng.random((*heads, layer.codewords)), jnp.float32)
  return Tail(
    weights=weights,
    sums=jnp.asarray(rng.normal(size=sums), jnp.float32),
    peak=jnp.asarray(rng.normal(size=heads), jnp.float32),
    total=jnp.sum(weights, axis=-1),
  )


def _far_off(got: Part, want: Part, bound: np.ndarray) -> str | None:
  """Where attention is not the exact one, within a bound of each output."""
  for name, allowed in (
    ("peak", SUMS * (1 + np.abs(np.asarray(want.peak)))),
    ("total", SUMS * np.asarray(want.total)),
    ("out", bound),
  ):
    off = np.abs(np.asarray(getattr(got, name)) - np.asarray(getattr(want, name)))
    if not (off <= allowed + SUMS).all():
      return f"{name} is off by {np.nanmax(off):.3g}"
  return None


def _encode(layer: LayerCase, family: Family, how: dict[str, Any], n: int) -> KernelCase:
  rng = np.random.default_rng(2)
  kv_heads, d, size = layer.kv_heads, layer.head_dim, layer.codewords
  keys = jnp.asarray(rng.normal(size=(n, kv_heads, d)), layer.dtype)
  whitener = np.tril(rng.normal(size=(kv_heads, d, d))).astype(np.float32)
  whitened = (rng.normal(size=(kv_heads, size, d)) @ whitener).astype(np.float32)
  if family == "tpu":
    chosen: Any = EncodeTiles.of(keys=n, codewords=size)
    grid = {
      "keys": [x for x in (128, 256, 512, 1024) if x < n] or [n],
      "codewords": [x for x in (256, 512, 1024) if x <= size] or [size],
    }
  else:
    chosen = vq_encode.gpu.Tiles.of(codewords=size, head_dim=d)
    grid = {"codewords": (32, 64, 128), "stages": (1, 2, 3)}

  # The TPU kernel takes no offsets.
  op, taken = (vq_encode.tpu, 3) if family == "tpu" else (vq_encode.gpu, 4)

  def kernel(*args: Array, tiles: Any) -> Array:
    return op.vq_encode(*args[:taken], tiles=tiles, **how)

  reference = jax.jit(vq_encode.reference.vq_encode)
  words = jnp.asarray(whitened)
  args = (keys, jnp.asarray(whitener), words, vq_encode.offsets_of(words))
  return KernelCase(
    op="vq_encode",
    note="1 key" if n == 1 else f"{n} keys",
    args=args,
    varied=1,
    shape=vq_encode.shape_of(*args),
    public=vq_encode.vq_encode,
    kernel=kernel,
    chosen=chosen,
    grid=grid,
    traffic=sum(x.nbytes for x in args[:taken]) + 2 * n * kv_heads,
    yardstick="device to device",
    problem=lambda got: _worse(args, np.asarray(got), np.asarray(reference(*args))),
  )


def _lookup(layer: LayerCase, how: dict[str, Any], heads: int, count: int) -> KernelCase:
  """What is taken of the cells of so many pages or tokens, which rise in eight runs."""
  rng = np.random.default_rng(3)
  numbers = layer.cells
  tables = rng.integers(0, 1 << 20, (heads, numbers), dtype=np.int32)
  places = rng.integers(0, numbers, (heads, count), dtype=np.int32)
  places = np.concatenate([np.sort(x) for x in np.array_split(places, 8, axis=-1)], axis=-1)
  chosen = LookupTiles.of(numbers=numbers)

  def kernel(tables: Array, places: Array, tiles: Any) -> Array:
    return lookup.tpu.lookup(tables, places, tiles=tiles, **how)

  def problem(got: Array) -> str | None:
    wrong = int((np.asarray(got) != np.take_along_axis(tables, places, axis=-1)).sum())
    return f"{wrong} of {places.size} numbers differ" if wrong else None

  args = (jnp.asarray(tables), jnp.asarray(places))
  return KernelCase(
    op="lookup",
    note=f"{count} of {numbers} numbers",
    args=args,
    varied=1,
    shape=lookup.shape_of(*args),
    public=lookup.lookup,
    kernel=kernel,
    chosen=chosen,
    grid={"rows": (1, 2, 4, 8, 16)},
    traffic=tables.nbytes + 2 * places.nbytes,
    yardstick="device to device",
    problem=problem,
  )


def _worse(args: tuple[Array, ...], got: np.ndarray, want: np.ndarray) -> str | None:
  """Codes that differ from the reference's, and are not as near within rounding."""
  row, head = np.nonzero(got != want)
  if not row.size:
    return None
  keys, whitener, whitened = (np.asarray(x.astype(jnp.float32), np.float64) for x in args[:3])
  if got.max() >= whitened.shape[1]:
    return f"code {got.max()} of {whitened.shape[1]}"
  z = np.einsum("pd,pde->pe", keys[row, head], whitener[head])
  words = [whitened[head, codes[row, head]] for codes in (want, got)]
  best, mine = (np.sum(z * c - 0.5 * c**2, axis=1) for c in words)
  norms = np.linalg.norm(z, axis=1) * np.linalg.norm(whitened, axis=-1).max()
  lost = float(np.max((best - mine) / norms))
  if lost <= NEAR_TIE:
    return None
  return f"{row.size} of {got.size} codes differ, one by {lost:.3g} of the norms"
