"""Compile every TPU kernel for real chips, on a machine without any.

libtpu's compiler is the one that a TPU host runs, so what passes here passes Mosaic and XLA and
fits the chip's memories. It says nothing of speed or of numbers.

Besides the kernels it compiles whole decode steps through the library's own code, from the store in
host memory to the output.

Prints one JSON line per program and chip, and one per control: programs that the compiler or the
checks have to refuse, which show that a pass means something. Exit code 0: all compiled and all
controls were refused; 1: something did not; 2: there is no compiler here. Usage::

    python tests/aot/tpu_aot.py [--chips v5e:1x1,v6e:1x1] [--only part] [--schedules]

Shapes are Llama-3.1-8B's: 32 query heads on 8 KV heads of size 128, bfloat16 pages of 16 tokens,
1024 codewords, and 128 pages a KV head fetched at once.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if importlib.util.find_spec("libtpu") is None:
  print("tpu_aot: no libtpu in this Python: pip install libtpu", file=sys.stderr)
  raise SystemExit(2)

# Set before libtpu is loaded: there is no TPU to ask about, and other processes may compile too.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import tpu_parts
import tpu_schedules
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from a2ats_jax import attention, store
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.base import Geometry
from a2ats_jax.ops import paged_decode as decode
from a2ats_jax.ops.lookup import tpu as lookup
from a2ats_jax.ops.page_fetch import tpu as page_fetch
from a2ats_jax.ops.paged_decode import tpu as paged_decode
from a2ats_jax.ops.pages import FloatPages
from a2ats_jax.ops.tiles import DecodeTiles, PageFormat
from a2ats_jax.ops.vq_encode import tpu as vq_encode
from a2ats_jax.rope import RopeConfig, make_rope

CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
BF16, F32, I32 = (jnp.dtype(x) for x in (jnp.bfloat16, jnp.float32, jnp.int32))

B, H, K, D, P, C, F = 1, 32, 8, 128, 16, 1024, 128
N = (128 << 10) // P  # pages a KV head of a context of 128K tokens
L = 2
CELLS = 8 * C + 320  # of eight segments, and of tokens after the prompt
VMEM_BYTES = 16 << 20  # what XLA lets a kernel take on a v5e
KERNELS = ("page_fetch", "page_write", "paged_decode", "vq_encode", "lookup")
LLAMA = PageFormat(page=P, dim=D, dtype=BF16)


class Input(NamedTuple):
  """Shape, dtype, and whether it lies in host memory."""

  shape: tuple[int, ...]
  dtype: Any
  host: bool = False


class Program(NamedTuple):
  """What to compile, and the kernels whose calls have to be in it.

  Attributes:
    inputs: trees of shapes.
    temp: bytes beside arguments and outputs that it may take at most, if that matters.
    in_place: whether it returns its first input, in host memory, and may not copy it.
    state: whether it gives up its second input too, and returns more than the first.
    opens: whether the first of two outputs is in host memory.
  """

  run: Callable[..., Any]
  inputs: tuple[Any, ...]
  kernels: tuple[str, ...]
  temp: int | None = None
  in_place: bool = False
  state: bool = False
  opens: bool = False


def _from_host(run: Callable[..., Any], pages: jax.Array, *args: Any) -> Any:
  # A shape with a host sharding does not carry the space in its type; this does.
  return run(jax.device_put(pages, HOST), *args)


def _decode(form: PageFormat, dtype: jnp.dtype, pages: int, tiles: DecodeTiles | None = None):
  return Program(
    partial(paged_decode.packed_decode, form=form, tiles=tiles),
    (
      Input((B, 1, H, form.dim), dtype),
      Input((B, K, pages, form.rows, 128), jnp.int8),
      Input((B, K, pages, form.page), jnp.bool_),
    ),
    ("paged_decode",),
    temp=2 << 20,  # masks and padded queries: no copy of the pages
  )


def _with_tail(
  dtype: jnp.dtype,
  *,
  dim: int = D,
  codewords: int = C,
  form: PageFormat | None = None,
  page: int = 8,
) -> Program:
  """Attention over the near tokens of a step, or fetched pages, and a tail in one softmax.

  Args:
    form: of fetched pages; without it keys and values of 88 near tokens lie apart.
    page: tokens of a page of near ones.
  """
  tail = attention.Tail(
    weights=Input((B, 1, H, codewords), F32),
    sums=Input((B, K, codewords, dim), F32),
    peak=Input((B, 1, H), F32),
    total=Input((B, 1, H), F32),
  )
  pages = (8 + 64 + P) // page if form is None else F
  mask = Input((B, K, pages, page if form is None else form.page), jnp.bool_)
  q, keys = Input((B, 1, H, dim), dtype), Input((*mask.shape, dim), dtype)

  def near(q, keys, values, mask, tail):  # through the op, which asks whether the kernel can
    return decode.paged_decode(q, FloatPages(keys, values), mask, tail)

  def far(q, pages, mask, tail):
    return paged_decode.packed_decode(q, pages, mask, form=form, tail=tail)

  stored = Input((B, K, pages, form.rows, 128), jnp.int8) if form else keys
  return Program(
    far if form else near,
    (q, stored, mask, tail) if form else (q, keys, keys, mask, tail),
    ("paged_decode",),
    # Sums of 64 dimensions come packed and are spread to tiles of 128; others are not copied.
    temp=(2 << 20) + (8 * B * K * C * dim if dim < 128 else 0),
  )


def _stages(pages: jax.Array, q: jax.Array, ids: jax.Array, mask: jax.Array, count: jax.Array):
  """Fetch and attention as many times as told, from one flat array of all layers."""
  flat = jax.device_put(pages, HOST).reshape(-1, LLAMA.rows, 128)

  def step(i: jax.Array, part: attention.Part) -> attention.Part:
    here = jax.lax.dynamic_slice_in_dim(ids, i * F, F, axis=2)
    seen = jax.lax.dynamic_slice_in_dim(mask, i * F, F, axis=2)
    got = page_fetch.page_fetch(flat, here.reshape(-1)).reshape(B, K, F, LLAMA.rows, 128)
    new = paged_decode.packed_decode(q, got, seen, form=LLAMA)
    return attention.merge([part, new])

  none = jnp.zeros(q.shape[:3], jnp.float32)
  part = attention.Part(jnp.zeros(q.shape, jnp.float32), none - jnp.inf, none)
  return attention.finish(jax.lax.fori_loop(0, count, step, part))


def _sealed(pages: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
  """A page of every KV head, layer by layer, into the store of all layers."""
  pages = jax.device_put(pages, HOST)
  shape = pages.shape

  def write(layer: jax.Array, pages: jax.Array) -> jax.Array:
    head = jnp.arange(B * K, dtype=jnp.int32)
    ids = jnp.where(first < 0, -1, (layer * B * K + head) * N + first)
    flat = page_fetch.page_write(pages.reshape(-1, LLAMA.rows, 128), ids, new[layer])
    return flat.reshape(shape)

  return jax.lax.fori_loop(0, L, write, pages)


def _prompt(pages: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
  """Packs the keys and values of a prompt and writes them."""
  new = LLAMA.pack(k, v).reshape(-1, LLAMA.rows, 128)
  return page_fetch.page_write(jax.device_put(pages, HOST), ids, new)


def _opened(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """An empty store of 128K tokens; the input is there to say on which device."""
  opened = store.open_store(
    layers=L, batch=B, kv_heads=K, head_dim=D, slots=N * P, page=P, dtype=BF16, placement="host"
  )
  return opened.pages, x


def _step(tokens: int, whole: bool = False) -> Program:
  """A decode step of A2ATS in all layers, as the library runs it on a TPU.

  Args:
    tokens: of the prompt.
    whole: wrong: all pages are moved to the device first.
  """
  kept = Geometry(
    batch=B, layers=L, heads=H, kv_heads=K, head_dim=D, prompt=tokens, new=256, dtype=BF16
  )
  eye = jnp.broadcast_to(jnp.eye(D), (L, K, D, D))
  book = jax.eval_shape(make_codebook, jax.ShapeDtypeStruct((L, K, C, D), F32), eye)
  method = A2ATS(
    codebook=book,
    budget=Budget(tokens=2048, per="kv_head"),
    far=FarPosition.segments(8),
    tail="centroid",
  )
  rope = make_rope(RopeConfig(head_dim=D, theta=500000.0))
  state = jax.eval_shape(lambda: method.init(kept))  # opens the store, as on a TPU
  leaves, tree = jax.tree.flatten(state)
  place = next(i for i, x in enumerate(leaves) if x is state.store.pages)

  def run(pages, rest, book, q, k, v, positions):
    pages = jax.device_put(pages, DEVICE if whole else HOST)
    state = jax.tree.unflatten(tree, [*rest[:place], pages, *rest[place:]])
    if whole:
      state = dataclasses.replace(state, store=dataclasses.replace(state.store, host=False))
    here = dataclasses.replace(method, codebook=book)

    def layer(carry, index):
      x, state = carry
      where = {"positions": positions, "rope": rope, "layer": index}
      out, state, stats = here.attend(state, q + x, k, v, **where)
      return (out.astype(BF16), state), stats

    carry = (jnp.zeros_like(q), state)
    (x, state), stats = jax.lax.scan(layer, carry, jnp.arange(L, dtype=jnp.int32))
    rest = jax.tree.leaves(state)
    pages = jax.device_put(rest.pop(place), HOST)
    return pages, (rest, x, stats)

  shapes = jax.tree.map(lambda x: Input(x.shape, x.dtype), (leaves, book))
  pages = shapes[0].pop(place)._replace(host=True)
  heads = [Input((B, 1, n, D), BF16) for n in (H, K, K)]
  return Program(
    run,
    (pages, *shapes, *heads, Input((B, 1), jnp.int32)),
    # Attention to near tokens with the tail; pages fetched and attended to by stages and by parts.
    (*KERNELS, "page_fetch", "paged_decode", "paged_decode"),
    temp=32 << 20,  # whatever the store holds, see _growth
    in_place=True,
    state=True,
  )


def _parts() -> dict[str, Program]:
  kept = Geometry(
    batch=B, layers=1, heads=H, kv_heads=K, head_dim=D, prompt=128 << 10, new=256, dtype=BF16
  )

  def program(run: Callable[..., Any], shapes: Any) -> Program:
    return Program(run, jax.tree.map(lambda x: Input(x.shape, x.dtype), shapes), ())

  return {f"part: {name}": program(*part) for name, part in tpu_parts.parts(kept, C).items()}


STEPS = {"decode step, 8K tokens": 8 << 10, "decode step, 128K tokens": 128 << 10}


def _growth(chip: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """How temporary memory of the step grows with the store: by page edges and marks, 1% of it."""
  small, large = (rows.get(name, {}) for name in STEPS)
  row: dict[str, Any] = {"program": "decode step, growth", "chip": chip}
  if "host_argument_bytes" not in small or "host_argument_bytes" not in large:
    return row | {"problem": "the step did not compile at both sizes"}
  for name in ("beside_bytes", "host_argument_bytes"):
    row[name] = large[name] - small[name]
  if row["beside_bytes"] > row["host_argument_bytes"] // 64:
    row["problem"] = "temporary bytes grow with the pages"
  return row


def _programs() -> dict[str, Program]:
  pages = (L * B * K * N, LLAMA.rows, 128)
  fetched = Input((B * K * F,), jnp.int32)
  stage_bytes = B * K * F * LLAMA.rows * 128
  encode = (Input((K, D, D), F32), Input((K, C, D), F32))
  return {
    "page_fetch from host": Program(
      partial(_from_host, page_fetch.page_fetch),
      (Input(pages, jnp.int8, host=True), fetched),
      ("page_fetch",),
      temp=1 << 20,
    ),
    "page_fetch from device": Program(
      page_fetch.page_fetch,
      (Input((B * K * N, *pages[1:]), jnp.int8), fetched),
      ("page_fetch",),
      temp=1 << 20,
    ),
    "page_fetch, 65536 pages": Program(
      partial(_from_host, page_fetch.page_fetch),
      (Input(pages, jnp.int8, host=True), Input((65536,), jnp.int32)),
      ("page_fetch",),
    ),
    "page_write, a prompt of 8K tokens": Program(
      _prompt,
      (
        Input(pages, jnp.int8, host=True),
        Input((K, 512, P, D), BF16),
        Input((K, 512, P, D), BF16),
        Input((K * 512,), jnp.int32),
      ),
      ("page_write",),
      temp=5 * K * 512 * LLAMA.rows * 128,  # of the pages written, whatever the store holds
      in_place=True,
    ),
    "page_write, a page of every layer": Program(
      _sealed,
      (
        Input((L, B, K, N, *pages[1:]), jnp.int8, host=True),
        Input((L, B * K, *pages[1:]), jnp.int8),
        Input((), jnp.int32),
      ),
      ("page_write",),
      temp=1 << 20,
      in_place=True,
    ),
    "paged_decode": _decode(LLAMA, BF16, F),
    "paged_decode, 127 pages": _decode(LLAMA, BF16, 127),
    "paged_decode, one page": _decode(LLAMA, BF16, 1),
    "paged_decode, float32 query": _decode(LLAMA, F32, F),
    "paged_decode, D=64": _decode(PageFormat(page=16, dim=64, dtype=BF16), BF16, F),
    "paged_decode, D=256": _decode(PageFormat(page=16, dim=256, dtype=BF16), BF16, F),
    "paged_decode, P=8": _decode(PageFormat(page=8, dim=128, dtype=BF16), BF16, F),
    "paged_decode, D=256 P=4": _decode(PageFormat(page=4, dim=256, dtype=BF16), BF16, F),
    "paged_decode, float32 P=4": _decode(PageFormat(page=4, dim=128, dtype=F32), F32, F),
    "paged_decode, float32 D=64 P=8": _decode(PageFormat(page=8, dim=64, dtype=F32), F32, F),
    "paged_decode, float32 D=128 P=8": _decode(PageFormat(page=8, dim=128, dtype=F32), F32, F),
    "paged_decode, float32 D=256 P=24": _decode(PageFormat(page=24, dim=256, dtype=F32), F32, F),
    "paged_decode, keys and values apart": Program(
      paged_decode.paged_decode,
      (
        Input((B, 1, H, D), BF16),
        Input((B, K, F, P, D), BF16),
        Input((B, K, F, P, D), BF16),
        Input((B, K, F, P), jnp.bool_),
      ),
      ("paged_decode",),
    ),
    "paged_decode, near and a tail": _with_tail(BF16),
    "paged_decode, near and a tail of 300": _with_tail(F32, codewords=300),
    "paged_decode, near and a tail, float32 D=64": _with_tail(F32, dim=64),
    "paged_decode, near and a tail, D=64": _with_tail(BF16, dim=64),
    "paged_decode, near and a tail, 7 sinks": _with_tail(BF16, page=1),
    "paged_decode, near and a tail, D=256": _with_tail(BF16, dim=256),
    "paged_decode, near and a tail of 1": _with_tail(BF16, codewords=1),
    "paged_decode, pages and a tail": _with_tail(BF16, form=LLAMA),
    "paged_decode, pages and a tail, D=64": _with_tail(
      BF16, dim=64, form=PageFormat(page=16, dim=64, dtype=BF16)
    ),
    "vq_encode, a prompt's chunk": Program(
      vq_encode.vq_encode, (Input((4096, K, D), BF16), *encode), ("vq_encode",)
    ),
    "vq_encode, one token": Program(
      vq_encode.vq_encode, (Input((1, K, D), BF16), *encode), ("vq_encode",)
    ),
    "vq_encode, odd sizes": Program(
      vq_encode.vq_encode,
      (Input((1001, K, 64), F32), Input((K, 64, 64), F32), Input((K, 1000, 64), F32)),
      ("vq_encode",),
    ),
    "lookup, cells of pages": Program(
      lookup.lookup, (Input((B * K, CELLS), I32), Input((B * K, N), I32)), ("lookup",)
    ),
    "lookup, cells of a stage": Program(
      lookup.lookup, (Input((B, K, CELLS), I32), Input((B, K, F * P), I32)), ("lookup",)
    ),
    "lookup, odd sizes": Program(
      lookup.lookup, (Input((3, 131), I32), Input((3, 1025), I32)), ("lookup",)
    ),
    "lookup, the largest table": Program(
      lookup.lookup, (Input((2, 1 << 20), I32), Input((2, 64), I32)), ("lookup",)
    ),
    "fetch and decode in stages": Program(
      _stages,
      (
        Input((L, B, K, N, *pages[1:]), jnp.int8, host=True),
        Input((B, 1, H, D), BF16),
        Input((B, K, 8 * F), jnp.int32),
        Input((B, K, 8 * F, P), jnp.bool_),
        Input((), jnp.int32),
      ),
      ("page_fetch", "paged_decode"),
      temp=2 * stage_bytes,
    ),
    "open_store, 128K tokens": Program(
      _opened, (Input((1,), jnp.int32),), ("page_zeros",), temp=8 << 20, opens=True
    ),
    **{name: _step(tokens) for name, tokens in STEPS.items()},
    **_parts(),
  }


def _controls() -> dict[str, Program]:
  """Programs that no chip can run, and one that copies its store."""
  return {
    "control: a step that copies its store": _step(128 << 10, whole=True),
    "control: a block larger than VMEM": _decode(LLAMA, BF16, 32768, DecodeTiles(pages=32768)),
    "control: half a tile a page": Program(
      partial(_from_host, page_fetch.page_fetch),
      (Input((1024, 16, 128), jnp.int8, host=True), Input((8,), jnp.int32)),
      ("page_fetch",),
    ),
  }


def _compile(program: Program, device: Any):
  def shape(x: Input) -> jax.ShapeDtypeStruct:
    sharding = SingleDeviceSharding(device, memory_kind="pinned_host" if x.host else None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  how: dict[str, Any] = {}
  host = SingleDeviceSharding(device, memory_kind="pinned_host")
  if program.state:
    how = {"donate_argnums": (0, 1), "out_shardings": (host, SingleDeviceSharding(device))}
  elif program.opens:
    how = {"out_shardings": (host, SingleDeviceSharding(device))}
  elif program.in_place:
    how = {"donate_argnums": 0, "out_shardings": host}
  inputs = jax.tree.map(shape, program.inputs, is_leaf=lambda x: isinstance(x, Input))
  return jax.jit(program.run, **how).lower(*inputs).compile()


def calls_of(text: str) -> dict[str, int]:
  """How often each kernel is called in a compiled program."""
  pattern = r'%(\w+?)(?:\.\d+)? = [^\n]*custom-call\([^\n]*custom_call_target="tpu_custom_call"'
  found: dict[str, int] = {}
  for name in re.findall(pattern, text):
    found[name] = found.get(name, 0) + 1
  return found


def _inspect(program: Program, device: Any) -> dict[str, Any]:
  """Compile, and what the compiler says; ``problem`` where it is not what was asked for."""
  start = time.perf_counter()
  compiled = _compile(program, device)
  seconds = time.perf_counter() - start
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  text = compiled.as_text()
  calls = calls_of(text)
  held = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.host_argument_size_in_bytes
    + memory.host_output_size_in_bytes
    - memory.host_alias_size_in_bytes
    - memory.alias_size_in_bytes
  )
  row = {
    "compile_s": round(seconds, 2),
    "calls": calls,
    "temp_bytes": memory.temp_size_in_bytes,
    # libtpu 0.0.52 reports no temporary bytes; the peak holds them, and host arguments too.
    "beside_bytes": max(memory.peak_memory_in_bytes - held, 0),
    "argument_bytes": memory.argument_size_in_bytes,
    "output_bytes": memory.output_size_in_bytes,
    "host_argument_bytes": memory.host_argument_size_in_bytes,
    "host_alias_bytes": memory.host_alias_size_in_bytes,
    "host_temp_bytes": memory.host_temp_size_in_bytes,
    "code_bytes": memory.generated_code_size_in_bytes,
    # Of a kernel these are its own estimate, given back.
    "flops": cost.get("flops"),
    "bytes_accessed": cost.get("bytes accessed"),  # in fast memory too
    # The compiler's own estimate, a loop's body once; below zero where it has none for some part.
    "estimated_us": round(1e6 * cost.get("optimal_seconds", 0.0), 1),
    "fusions": text.count(" fusion("),
    "loops": text.count(" while("),
    "gathers": text.count(" gather(") + text.count(" scatter("),
  }
  wanted = program.kernels
  missing = [name for name in sorted({*wanted}) if calls.get(name, 0) < wanted.count(name)]
  taken = max(row["temp_bytes"], row["beside_bytes"])
  if program.in_place and memory.host_alias_size_in_bytes != memory.host_argument_size_in_bytes:
    row["problem"] = "the store is not written in place"
  elif missing:
    row["problem"] = f"too few calls of {', '.join(missing)}"
  elif row["host_temp_bytes"]:
    row["problem"] = f"{row['host_temp_bytes']} temporary bytes of host memory"
  elif program.temp is not None and taken > program.temp:
    row["problem"] = f"{taken} temporary bytes, at most {program.temp} expected"
  return row


def _scheduled(row: dict[str, Any], program: Program, texts: Path) -> dict[str, Any]:
  """A shorter row with the schedules of the kernels."""
  schedules = tpu_schedules.read(texts, program.kernels)
  row = {key: row[key] for key in ("program", "chip", "problem") if key in row}
  if schedules.keys() != set(program.kernels):
    row["problem"] = f"schedules of {sorted(schedules)}, expected {sorted(program.kernels)}"
  elif max(of["vmem_bytes"] for of in schedules.values()) > VMEM_BYTES:
    row["problem"] = f"a kernel allocates more than {VMEM_BYTES} bytes of VMEM"
  return row | {"schedules": schedules}


def main() -> int:
  """Compile all, print what came of it, and say how many went wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", default=",".join(CHIPS), help="topologies, separated by commas")
  parser.add_argument("--only", default="", help="programs whose name begins like this")
  parser.add_argument(
    "--schedules",
    action="store_true",
    help="kernels by themselves alone, with their bundles, VMEM bytes and spilled registers",
  )
  arguments = parser.parse_args()
  chips, only = arguments.chips.split(","), arguments.only
  texts = Path(tempfile.mkdtemp()) if arguments.schedules else None
  if texts:
    flags = tpu_schedules.FLAGS.format(folder=texts)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
  jax.default_backend = lambda: (
    "tpu"
  )  # what the library asks when it opens a store or picks a kernel
  start, wrong, done = time.perf_counter(), 0, 0
  for chip in chips:
    try:
      device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    except Exception as error:  # a chip that this libtpu does not know
      wrong += 1
      problem = f"{type(error).__name__}: {error}"[:300]
      print(json.dumps({"chip": chip, "problem": problem}), flush=True)
      continue
    rows: dict[str, dict[str, Any]] = {}
    for name, program in (_programs() | _controls()).items():
      if not name.startswith(only) or (texts and not name.startswith(KERNELS)):
        continue
      row: dict[str, Any] = {"program": name, "chip": chip}
      control = name.startswith("control")
      for path in texts.iterdir() if texts else ():  # of the program before
        path.unlink()
      try:
        row |= _inspect(program, device)
        if texts:
          row = _scheduled(row, program, texts)
        if control and "problem" in row:
          row["refused"] = row.pop("problem")
        elif control:
          row["problem"] = "compiled as if nothing were wrong"
      except Exception as error:  # whatever the compiler raises is the result
        row["refused" if control else "problem"] = f"{type(error).__name__}: {error}"[:300]
      rows[name] = row
      wrong += "problem" in row
      done += 1
      print(json.dumps(row), flush=True)
    if only or texts:
      continue
    growth = _growth(chip, rows)
    wrong += "problem" in growth
    print(json.dumps(growth), flush=True)
  if texts:
    shutil.rmtree(texts)
  total = {"programs": done, "wrong": wrong, "seconds": round(time.perf_counter() - start, 1)}
  print(json.dumps(total | {"jax": jax.__version__}), flush=True)
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
