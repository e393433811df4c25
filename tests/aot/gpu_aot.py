"""Compile every Mosaic GPU kernel, and a whole decode step, for an H100 on a machine without one.

Run it where jax's CUDA plugin is installed (``pip install 'jax[cuda13-local]'``):

  python tests/aot/gpu_aot.py

Each case compiles in a process of its own, because LLVM aborts on an error. One JSON line a case:
seconds to compile, temporary bytes of the program, shared memory, registers and spills of the
kernel. Exit status 1 where a case fails, 2 where the plugin is missing. What compiles here has not
run: a compile says nothing of results, and nothing of whether a GPU reads pages of host memory in
place.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CASE_SECONDS = 300
# What the compiler is told of an H100 SXM with 80 GB; in the form get_topology_desc takes.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Case(NamedTuple):
  """One compile, by default at the shapes of one layer of Llama 3.1 8B, batch 1."""

  kernel: str
  dtype: str
  head_dim: int = 128
  group: int = 4
  kv_heads: int = 8
  page: int = 16
  fetched: int = 128
  codewords: int = 1024
  keys: int = 8192
  layers: int = 4
  pages: int = 8192  # of a row and KV head: 128K tokens
  tail: bool = False  # in the same softmax
  refused: bool = False  # a wrong program, that the checks must refuse

  @property
  def kernels(self) -> tuple[str, ...]:
    """Names of the kernels that the program has to call, as often as they are here."""
    # One token is coded without a kernel: a block of vq_encode is 64 keys.
    if self.kernel == "open_store":
      return ()
    if (
      self.kernel == "a2ats_step"
    ):  # near tokens with the tail; pages by stages and by parts of one
      return ("page_fetch", "paged_decode") * 2 + ("paged_decode",)
    return ("page_fetch", "paged_decode") if self.kernel == "decode_step" else (self.kernel,)

  @property
  def name(self) -> str:
    name = f"{self.kernel}-{self.dtype}-H{self.group * self.kv_heads}-D{self.head_dim}"
    if self.kernel == "a2ats_step":
      name = f"{name}-T{self.pages * self.page}"
    name = f"{name}-C{self.codewords}" if self.tail else name
    return f"{name}-whole-copy" if self.refused else name


CASES = {
  case.name: case
  for case in (
    Case("page_fetch", "bfloat16"),
    Case("page_fetch", "float32"),
    Case("page_fetch", "bfloat16", refused=True),
    Case("paged_decode", "bfloat16"),
    Case("paged_decode", "float32"),
    Case("paged_decode", "bfloat16", head_dim=64, group=3),
    Case("paged_decode", "bfloat16", head_dim=256, group=8),
    Case("paged_decode", "float32", head_dim=256, group=8),
    Case("paged_decode", "bfloat16", tail=True),
    Case("paged_decode", "bfloat16", head_dim=64, group=3, tail=True),
    Case("paged_decode", "bfloat16", head_dim=256, group=8, tail=True, codewords=1000),
    Case("paged_decode", "float32", head_dim=256, group=8, tail=True),
    Case("paged_decode", "float32", tail=True, codewords=1),
    Case("decode_step", "bfloat16"),
    Case("a2ats_step", "bfloat16", pages=512),
    Case("a2ats_step", "bfloat16"),
    Case("open_store", "bfloat16"),
    Case("open_store", "bfloat16", refused=True),
    Case("vq_encode", "bfloat16"),
    Case("vq_encode", "float32"),
    Case("vq_encode", "float32", head_dim=256),
  )
}


def plugin() -> bool:
  """Whether jax can compile for CUDA here."""
  return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def compile_case(case: Case) -> dict[str, Any]:
  """Compile a case in this process and check the program."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import SingleDeviceSharding

  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.config.update("jax_numpy_rank_promotion", "raise")
  topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
  device = SingleDeviceSharding(topology.devices[0])
  host = SingleDeviceSharding(topology.devices[0], memory_kind="pinned_host")
  _keep_host_memory(host)

  def array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

  dtype, d = jnp.dtype(case.dtype), case.head_dim
  itemsize = dtype.itemsize
  stored = case.layers * case.kv_heads * case.pages * 2 * case.page * d * itemsize
  moved = case.kv_heads * case.fetched * 2 * case.page * d * itemsize
  block = (1, case.kv_heads, case.fetched, case.page)
  q = array((1, 1, case.kv_heads * case.group, d), dtype)
  if case.kernel in ("page_fetch", "decode_step"):
    shape = (case.layers, 1, case.kv_heads, case.pages, 2 * case.page * d)
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=host, _memory_space=jax.memory.Space.Host)
    if case.kernel == "page_fetch":
      function, args = _fetches(case), (pages, array((case.kv_heads * case.fetched,), jnp.int32))
    else:
      ids, mask = array(block[:3], jnp.int32), array(block, jnp.bool_)
      function, args = _steps(case), (pages, ids, q, mask)
    bound = moved + 2**20
  elif case.kernel == "paged_decode":
    from a2ats_jax.ops.paged_decode.gpu import paged_decode

    kv = array((*block, d), dtype)
    args, function, bound = (q, kv, kv, array(block, jnp.bool_)), paged_decode, moved
    if case.tail:
      from a2ats_jax.attention import Tail

      h = (1, 1, case.kv_heads * case.group)
      tail = Tail(
        weights=array((*h, case.codewords), jnp.float32),
        sums=array((1, case.kv_heads, case.codewords, d), jnp.float32),
        peak=array(h, jnp.float32),
        total=array(h, jnp.float32),
      )
      args += (tail,)

      def function(q, keys, values, mask, tail):
        return paged_decode(q, keys, values, mask, tail=tail)
  elif case.kernel == "open_store":
    function, args, bound = _opens(case), (q,), 2**27
  else:
    from a2ats_jax.ops.vq_encode.gpu import vq_encode

    args = (
      array((case.keys, case.kv_heads, d), dtype),
      array((case.kv_heads, d, d), jnp.float32),
      array((case.kv_heads, case.codewords, d), jnp.float32),
      array((case.kv_heads, case.codewords), jnp.float32),
    )
    function, bound = vq_encode, case.keys * case.kv_heads * case.codewords * 4

  how: dict[str, Any] = {}
  if case.kernel == "a2ats_step":
    function, args = _whole(case, device, host)
    stored = args[0].size * itemsize
    bound = 3 * moved  # at either size of the store
    how = {"donate_argnums": (0, 1), "out_shardings": (host, device)}

  if case.kernel == "open_store":
    how = {"out_shardings": (host, device)}

  begun = time.perf_counter()
  program = jax.jit(function, **how).lower(*args).compile()
  seconds = time.perf_counter() - begun
  memory, text = program.memory_analysis(), program.as_text()
  calls, wanted = len(re.findall(r'custom_call_target="mosaic_gpu', text)), len(case.kernels)
  if calls != wanted:
    raise AssertionError(f"{calls} Mosaic GPU calls in the program: expected {wanted}")
  if memory.temp_size_in_bytes >= bound:
    raise AssertionError(f"{memory.temp_size_in_bytes} temporary bytes: expected below {bound}")
  if "page_fetch" in case.kernels:
    if memory.host_argument_size_in_bytes != stored:
      raise AssertionError(
        f"{memory.host_argument_size_in_bytes} bytes in host memory: expected {stored}"
      )
    if "S(5)" not in text:
      raise AssertionError("no array of the program is in host memory")
  row = {
    "case": case.name,
    "compile_s": round(seconds, 2),
    "temp_bytes": memory.temp_size_in_bytes,
    "host_bytes": memory.host_argument_size_in_bytes,
  }
  if case.kernel == "a2ats_step":
    row["alias_bytes"] = memory.host_alias_size_in_bytes + memory.alias_size_in_bytes
    if row["alias_bytes"] < stored:
      raise AssertionError(f"{row['alias_bytes']} bytes kept in place: expected {stored} or more")
  return row


def _keep_host_memory(host: Any) -> None:
  """Let a host-memory sharding of a compile-only device reach the compiler.

  Such devices report no memories, so jax lowers ``pinned_host`` as if it had not been written, and
  a program that copies the whole array would pass for one that reads it in place. Both names are
  private, hence here and not in the library.
  """
  from jax._src.interpreters import mlir, pxla

  kind = mlir._get_mem_kind

  def memory_kind(sharding: Any) -> str | None:
    if sharding is host:
      return "pinned_host"
    return kind(sharding) or (None if sharding is None else "device")

  mlir._get_mem_kind = memory_kind
  pxla.are_all_shardings_default_mem_kind = lambda shardings: False


def _opens(case: Case) -> Any:
  """An empty store in host memory; the input is there to say on which device."""
  import jax
  import jax.numpy as jnp

  from a2ats_jax import store

  def function(x: Any) -> tuple[Any, Any]:
    opened = store.open_store(
      layers=case.layers,
      batch=1,
      kv_heads=case.kv_heads,
      head_dim=case.head_dim,
      slots=case.pages * case.page,
      page=case.page,
      dtype=case.dtype,
      placement="host",
    )
    if case.refused:
      whole = jnp.zeros(opened.pages.shape, opened.pages.dtype)
      return jax.device_put(whole, jax.memory.Space.Host), x
    return opened.pages, x

  return function


def _fetches(case: Case) -> Any:
  """Fetches in a scan over layers, from the one array that holds all of them."""
  import jax
  import jax.numpy as jnp

  from a2ats_jax.ops.page_fetch.gpu import page_fetch

  def function(pages: Any, ids: Any) -> Any:
    pages = jax.device_put(pages, jax.memory.Space.Host)
    if case.refused:
      pages = jax.device_put(pages, jax.memory.Space.Device)

    def layer(total: Any, index: Any) -> tuple[Any, None]:
      table = pages.reshape(-1, 2, case.page * case.head_dim)
      keys, values = page_fetch(table, index * (case.kv_heads * case.pages) + ids)
      return total + jnp.sum(keys * values, axis=1, dtype=jnp.float32), None

    start = jnp.zeros(ids.shape, jnp.float32)
    total, _ = jax.lax.scan(layer, start, jnp.arange(case.layers, dtype=jnp.int32))
    return total

  return function


def _steps(case: Case) -> Any:
  """Attention over fetched pages in a scan over layers, fetched through the store itself."""
  import jax
  import jax.numpy as jnp

  from a2ats_jax import attention, store
  from a2ats_jax.ops.page_fetch import gpu
  from a2ats_jax.ops.paged_decode.gpu import paged_decode

  store.page_fetch = gpu.page_fetch  # the dispatcher sees a CPU here

  def function(pages: Any, ids: Any, q: Any, mask: Any) -> Any:
    held = store.KVStore(jax.device_put(pages, jax.memory.Space.Host), case.page, True)

    def layer(x: Any, index: Any) -> tuple[Any, None]:
      keys, values = store.fetch(held, ids, layer=index)
      return attention.finish(paged_decode(x.astype(q.dtype), keys, values, mask)), None

    layers = jnp.arange(case.layers, dtype=jnp.int32)
    return jax.lax.scan(layer, q.astype(jnp.float32), layers)[0]

  return function


def _whole(case: Case, device: Any, host: Any) -> tuple[Any, tuple[Any, ...]]:
  """A decode step of A2ATS in all layers, as the library runs it on a GPU; and its arguments."""
  import dataclasses

  import jax
  import jax.numpy as jnp

  from a2ats_jax.budget import Budget
  from a2ats_jax.codebook import make_codebook
  from a2ats_jax.far import FarPosition
  from a2ats_jax.methods.a2ats import A2ATS
  from a2ats_jax.methods.base import Geometry
  from a2ats_jax.rope import RopeConfig, make_rope

  jax.default_backend = lambda: "gpu"  # what the library asks when it picks a kernel
  layers, kv_heads, d = case.layers, case.kv_heads, case.head_dim
  heads, dtype = kv_heads * case.group, jnp.dtype(case.dtype)
  kept = Geometry(
    batch=1,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=d,
    prompt=case.pages * case.page,
    new=256,
    dtype=dtype,
  )
  words = jax.ShapeDtypeStruct((layers, kv_heads, case.codewords, d), jnp.float32)
  book = jax.eval_shape(
    make_codebook, words, jnp.broadcast_to(jnp.eye(d), (layers, kv_heads, d, d))
  )
  method = A2ATS(
    codebook=book,
    budget=Budget(tokens=2048, per="kv_head"),
    far=FarPosition.segments(8),
    tail="centroid",
  )
  rope = make_rope(RopeConfig(head_dim=d, theta=500000.0))
  state = jax.eval_shape(lambda: method.init(kept))
  leaves, tree = jax.tree.flatten(state)
  place = next(i for i, x in enumerate(leaves) if x is state.store.pages)

  def function(pages, rest, book, q, k, v, positions):
    pages = jax.device_put(pages, jax.memory.Space.Host)
    state = jax.tree.unflatten(tree, [*rest[:place], pages, *rest[place:]])
    here = dataclasses.replace(method, codebook=book)

    def layer(carry, index):
      x, state = carry
      where = {"positions": positions, "rope": rope, "layer": index}
      out, state, stats = here.attend(state, q + x, k, v, **where)
      return (out.astype(dtype), state), stats

    carry = (jnp.zeros_like(q), state)
    (x, state), stats = jax.lax.scan(layer, carry, jnp.arange(layers, dtype=jnp.int32))
    rest = jax.tree.leaves(state)
    pages = jax.device_put(rest.pop(place), jax.memory.Space.Host)
    return pages, (rest, x, stats)

  def array(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)

  pages = leaves.pop(place)
  pages = jax.ShapeDtypeStruct(
    pages.shape, pages.dtype, sharding=host, _memory_space=jax.memory.Space.Host
  )
  rest, book = jax.tree.map(array, (leaves, book))
  q, k, v = (array(jax.ShapeDtypeStruct((1, 1, n, d), dtype)) for n in (heads, kv_heads, kv_heads))
  positions = array(jax.ShapeDtypeStruct((1, 1), jnp.int32))
  return function, (pages, rest, book, q, k, v, positions)


def run_case(case: Case) -> dict[str, Any]:
  """Compile a case in a process of its own; the row holds ``error`` where it failed."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_RESOURCES": "1",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, str(Path(__file__).resolve()), "--compile", case.name]
  try:
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=CASE_SECONDS, cwd=ROOT
    )
  except subprocess.TimeoutExpired:
    return {"case": case.name, "error": f"not done after {CASE_SECONDS} s"}
  log = done.stdout + done.stderr
  rows = re.findall(r"^(\{.*\})$", done.stdout, re.MULTILINE)
  if case.refused:
    seen = re.search(r"AssertionError: (\d+ temporary bytes.*)", log)
    return {"case": case.name, **({"refused": seen[1]} if seen else {"error": "not refused"})}
  if done.returncode or not rows:
    lines = [line for line in log.splitlines() if line.strip()]
    return {"case": case.name, "error": " | ".join(lines[-3:]) or f"status {done.returncode}"}
  row = json.loads(rows[-1])
  try:
    row |= _resources(case.kernels, log) if case.kernels else {}
  except ValueError as error:
    row["error"] = str(error)
  return row


def _resources(kernels: tuple[str, ...], log: str) -> dict[str, int]:
  """What ptxas and Mosaic say of the kernels of these names; the most of any."""
  for kernel in kernels:
    if not re.search(rf"entry function '{kernel}_mosaic_gpu_kernel' for 'sm_90a'", log):
      raise ValueError(f"ptxas compiled no {kernel} for sm_90a")
  patterns = {
    "shared_bytes": r"smem_scratch_bytes=(\d+)",
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
  }
  found = {key: re.findall(pattern, log) for key, pattern in patterns.items()}
  missing = [key for key, values in found.items() if not values]
  if missing:
    raise ValueError(f"the compiler did not report {', '.join(missing)}")
  return {key: max(int(value) for value in values) for key, values in found.items()}


def main() -> int:
  parser = argparse.ArgumentParser(description="Compile the GPU kernels for an H100.")
  parser.add_argument("--only", help="cases whose name contains this")
  parser.add_argument("--compile", choices=CASES, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if not plugin():
    print("gpu_aot: jax has no CUDA plugin here; pip install 'jax[cuda13-local]'", file=sys.stderr)
    return 2
  if arguments.compile:
    print(json.dumps(compile_case(CASES[arguments.compile])), flush=True)
    return 0
  failed = False
  for case in CASES.values():
    if arguments.only and arguments.only not in case.name:
      continue
    row = run_case(case)
    failed |= "error" in row
    print(json.dumps(row), flush=True)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())
