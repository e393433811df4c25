"""What this machine's accelerator does with the kernels: card, plain copies, results and rates.

The whole steps of a model are :mod:`eval.device_step`.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import store
from a2ats_jax.ops import lookup, page_fetch, page_write, paged_decode, stored_tiles, vq_encode
from eval.kernels import KernelCase, LayerCase, cases, said
from eval.options import Progress
from eval.results import Row
from eval.timing import interleaved, summary

WARMUP = 2  # rounds left out
_DRIVER = Path("/proc/driver/nvidia/version")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu")
_OPS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
  {
    "page_fetch": page_fetch.IMPLEMENTATIONS,
    "paged_decode": paged_decode.IMPLEMENTATIONS,
    "vq_encode": vq_encode.IMPLEMENTATIONS,
    "lookup": lookup.IMPLEMENTATIONS,
  }
)


def versions() -> dict[str, str]:
  """Of the packages that times depend on, those that are installed."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def card() -> Row:
  """The device, its memory, its driver, versions, and the file of tiles in use."""
  device = jax.devices()[0]
  driver = _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else None
  tiles = stored_tiles.path_of(device.device_kind)
  return {
    "benchmark": "device",
    "what": "card",
    "device": device.device_kind,
    "backend": jax.default_backend(),
    "devices": len(jax.devices()),
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "host_memory": store.host_memory(),
    "driver": driver,
    "platform": " ".join(device.client.platform_version.split()),
    "versions": versions(),
    "tiles": str(tiles) if tiles.exists() else None,
  }


def copies(size: int, *, rounds: int) -> list[Row]:
  """Plain copies, the yardstick: bytes moved over the link, or read and written, a second.

  Args:
    size: bytes of the array that is copied.
  """
  numbers = np.ones(size // 4, np.float32)
  programs, traffic = {}, {}
  here = store.put(numbers, host=False)
  programs["device to device"] = _compiled(jnp.copy, here)
  traffic["device to device"] = 2 * here.nbytes
  if store.host_memory():
    there = store.put(numbers, host=True)
    programs["host to device"] = _compiled(
      lambda x: jax.device_put(x, jax.memory.Space.Device), there
    )
    traffic["host to device"] = there.nbytes
  times = interleaved(programs, rounds=rounds, warmup=WARMUP)
  return [
    {"benchmark": "device", "what": "copy", "copy": name}
    | _rate(times[name], traffic[name])
    | {"bytes": here.nbytes}
    for name in programs
  ]


def _compiled(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
  program = jax.jit(run).lower(*args).compile()
  return lambda: program(*args)


def _rate(times: np.ndarray, traffic: int) -> Row:
  figures = summary(times)
  return figures | {"gb_per_s": traffic / figures["ms"] / 1e6}


def kernels(
  layer: LayerCase,
  yardsticks: Sequence[Row],
  *,
  rounds: int,
  repeat: int,
  progress: Progress | None = None,
) -> list[Row]:
  """Every op as a decode step calls it: the kernel where this backend has one, and the reference.

  Args:
    yardsticks: of :func:`copies`.
    rounds: timed, all programs in turn.
    repeat: calls in one run, one after the other on the device.

  Returns:
    A row an op and implementation: ``problem`` where it does not run or is not the reference, and
    of a kernel ``ok`` where it does and is; ``ms`` of a call, ``gb_per_s`` of what it has to read
    and write at least, and the ``share`` that is of the plain copy's.
  """
  backend = jax.default_backend()
  family = "tpu" if backend == "tpu" else "gpu"  # pages are laid out for one or the other
  rates = {row["copy"]: row["gb_per_s"] for row in yardsticks}
  rows: list[Row] = []
  found = cases(layer, family)
  for done, case in enumerate(found):
    rows += _run(case, family, backend, rates, rounds, repeat)
    if progress is not None:
      progress("kernels", done + 1, len(found))
  return rows + ([_written(layer)] if backend == "tpu" else [])


def _run(
  case: KernelCase,
  family: str,
  backend: str,
  rates: Mapping[str, float],
  rounds: int,
  repeat: int,
) -> list[Row]:
  names = ["reference"]
  if not _OPS[case.op][family].hindrances(backend, *case.args):
    names.insert(0, family)
  if case.yardstick not in rates:
    return []
  programs, rows = {}, []
  for name in names:
    row: Row = {
      "benchmark": "device",
      "what": "kernel",
      "op": case.op,
      "note": case.note,
      "implementation": name,
      "shape": dict(case.shape),
      "of": case.yardstick,
    }
    rows.append(row)
    got = case.attempt(lambda *args, name=name: case.public(*args, implementation=name), repeat)
    if isinstance(got, str):
      row["problem"] = got
    else:
      programs[name] = got
    if name != "reference":
      row["ok"] = name in programs
  times = interleaved(programs, rounds=rounds, warmup=WARMUP)
  for row in rows:
    if (name := row["implementation"]) in times:
      row |= _rate(times[name] / repeat, case.traffic)
      row["share"] = row["gb_per_s"] / rates[case.yardstick]
  return rows


def _written(layer: LayerCase) -> Row:
  """Pages of bytes written in place; checked and not timed, as a step does it once in P tokens."""
  count, n = 8, 3
  rng = np.random.default_rng(3)
  each = 2 * layer.page * layer.head_dim * jnp.dtype(layer.dtype).itemsize
  pages, new = (rng.integers(-128, 128, (k, each // 128, 128), np.int8) for k in (count, n))
  ids = jnp.asarray([5, -1, 0], jnp.int32)
  row: Row = {"benchmark": "device", "what": "kernel", "op": "page_write", "note": "in place"}
  row |= {"implementation": "tpu"}
  try:
    run = jax.jit(
      lambda *args: page_write.page_write(*args, implementation="tpu"), donate_argnums=0
    )
    got = np.asarray(run(store.put(pages, host=True), ids, jnp.asarray(new)))
    pages[[5, 0]] = new[[0, 2]]
    wrong = int((got != pages).sum())
    problem = f"{wrong} of {got.size} bytes differ" if wrong else None
  except Exception as error:
    problem = said(error)
  return row | {"ok": problem is None} | ({} if problem is None else {"problem": problem})
