"""Compile every TPU kernel for real chips, on a machine without any.

libtpu's compiler is the one that a TPU host runs, so what passes here passes Mosaic and XLA and
fits the chip's memories. It says nothing of speed or of numbers.

Prints one JSON line per kernel and chip, and one per control: programs that the compiler has to
refuse, which show that a pass means something. Exit code 0: all compiled and all controls were
refused; 1: something did not; 2: there is no compiler here. Usage::

    python tests/aot/tpu_aot.py [--chips v5e:1x1,v6e:1x1]

Shapes are Llama-3.1-8B's: 32 query heads on 8 KV heads of size 128, bfloat16 pages of 16 tokens,
1024 codewords, and a stage of 128 pages a KV head.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
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
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from a2ats_jax import attention
from a2ats_jax.ops.page_fetch import tpu as page_fetch
from a2ats_jax.ops.paged_decode import tpu as paged_decode
from a2ats_jax.ops.tiles import DecodeTiles, PageFormat
from a2ats_jax.ops.vq_encode import tpu as vq_encode

CHIPS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

B, H, K, D, P, C, F = 1, 32, 8, 128, 16, 1024, 128
N = (128 << 10) // P  # pages a KV head of a context of 128K tokens
L = 2
LLAMA = PageFormat(page=P, dim=D, dtype=BF16)


class Input(NamedTuple):
  """Shape, dtype, and whether it lies in host memory."""

  shape: tuple[int, ...]
  dtype: Any
  host: bool = False


class Program(NamedTuple):
  """What to compile, and the kernels whose calls have to be in it.

  Attributes:
    temp: bytes beside arguments and outputs that it may take at most, if that matters.
    in_place: whether it returns its first input, in host memory, and may not copy it.
  """

  run: Callable[..., Any]
  inputs: tuple[Input, ...]
  kernels: tuple[str, ...]
  temp: int | None = None
  in_place: bool = False


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


def _stages(pages: jax.Array, q: jax.Array, ids: jax.Array, mask: jax.Array, count: jax.Array):
  """As a decode step does it: as many stages as needed, from one flat array of all layers."""
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
  }


def _controls() -> dict[str, Program]:
  """Programs that no chip can run."""
  return {
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
  if program.in_place:
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    how = {"donate_argnums": 0, "out_shardings": host}
  return jax.jit(program.run, **how).lower(*(shape(x) for x in program.inputs)).compile()


def _calls(text: str) -> dict[str, int]:
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
  calls = _calls(compiled.as_text())
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
    "bytes_accessed": cost.get("bytes accessed"),
  }
  missing = [name for name in program.kernels if not calls.get(name)]
  taken = max(row["temp_bytes"], row["beside_bytes"])
  if program.in_place and memory.host_alias_size_in_bytes != memory.host_argument_size_in_bytes:
    row["problem"] = "the store is not written in place"
  elif missing:
    row["problem"] = f"no call of {', '.join(missing)}"
  elif row["host_temp_bytes"]:
    row["problem"] = f"{row['host_temp_bytes']} temporary bytes of host memory"
  elif program.temp is not None and taken > program.temp:
    row["problem"] = f"{taken} temporary bytes, at most {program.temp} expected"
  return row


def main() -> int:
  """Compile all, print what came of it, and say how many went wrong."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--chips", default=",".join(CHIPS), help="topologies, separated by commas")
  chips = parser.parse_args().chips.split(",")
  start, wrong, done = time.perf_counter(), 0, 0
  for chip in chips:
    try:
      device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    except Exception as error:  # a chip that this libtpu does not know
      wrong += 1
      problem = f"{type(error).__name__}: {error}"[:300]
      print(json.dumps({"chip": chip, "problem": problem}), flush=True)
      continue
    for name, program in (_programs() | _controls()).items():
      row: dict[str, Any] = {"program": name, "chip": chip}
      control = name.startswith("control")
      try:
        row |= _inspect(program, device)
        if control:
          row["problem"] = "compiled, and no chip can run it"
      except Exception as error:  # whatever the compiler raises is the result
        row["refused" if control else "problem"] = f"{type(error).__name__}: {error}"[:300]
      wrong += "problem" in row
      done += 1
      print(json.dumps(row), flush=True)
  total = {"programs": done, "wrong": wrong, "seconds": round(time.perf_counter() - start, 1)}
  print(json.dumps(total | {"jax": jax.__version__}), flush=True)
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
