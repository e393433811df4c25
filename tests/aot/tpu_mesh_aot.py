"""Compile a decode step of Llama-3.1-8B over meshes of TPU chips, on a machine without any.

All 32 layers in bfloat16, one row a part of the batch, pages in host memory, as
:func:`a2ats_jax.generate.decode_step` runs them: for 4 chips of v5e with the KV heads over all, and
for 8 of v5p with the batch over 2 and the KV heads over 4; each at 8K and at 128K tokens.

Prints one JSON line per step, what ``a2ats plan`` says of a device in it: ``plan_bytes`` beside
``argument_bytes`` and ``collective_bytes`` by kind. Exit code 0: all compiled, with every kernel,
pages written in place, the collectives those of the plan at either length, and memory within 5% of
the plan; 1: something was not; 2: there is no compiler here. Usage::

    python tests/aot/tpu_mesh_aot.py
"""

import dataclasses
import json
import sys
import time
from typing import Any

from tests.aot.tpu_aot import calls_of  # isort: skip  first: it looks for the compiler and sets it up

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from a2ats_jax import plan
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import geometry_of
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.plan_known import MODELS
from a2ats_jax.plan_mesh import Cut
from a2ats_jax.sharding import BATCH, HEADS
from tests.lowered import collectives, lower_step

TOPOLOGIES = {"v5e:2x2": Cut(1, 4), "v5p:2x2x2": Cut(2, 4)}
TOKENS = (8 << 10, 128 << 10)
KERNELS = ("page_fetch", "paged_decode") * 2 + ("page_write", "paged_decode", "vq_encode", "lookup")
METHOD = plan.Paged(
  budget=Budget(tokens=2048, per="kv_head"),
  codewords=1024,
  far=FarPosition.segments(8),
  tail="centroid",
)
_MEMORY = (("argument_bytes", "temp_bytes"), ("plan_bytes", "plan_temp_bytes"))
CONFIG = MODELS["llama-3.1-8b"]


def _inspect(cut: Cut, devices: list[Any], tokens: int) -> dict[str, Any]:
  """Compile a step; ``problem`` where it is not what was asked for."""
  case = plan.Case(config=CONFIG, batch=cut.batch, prompt=tokens, new=256)
  mesh = Mesh(np.array(devices).reshape(cut.batch, cut.heads), (BATCH, HEADS))
  lead = (CONFIG.layers, CONFIG.kv_heads)
  numbers = jax.ShapeDtypeStruct((*lead, METHOD.codewords, CONFIG.head_dim), jnp.float32)
  eye = jax.ShapeDtypeStruct((*lead, CONFIG.head_dim, CONFIG.head_dim), jnp.float32)
  method = A2ATS(
    codebook=jax.eval_shape(make_codebook, numbers, eye),
    budget=METHOD.budget,
    far=METHOD.far,
    tail=METHOD.tail,
  )
  shape = geometry_of(CONFIG, batch=case.batch, prompt=tokens, new=case.new)
  shape = dataclasses.replace(shape, dtype=jnp.bfloat16)
  start = time.perf_counter()
  step, host = lower_step(CONFIG, method, shape, mesh, dtype=jnp.bfloat16)
  compiled = step.compile()
  memory, text, of = (
    compiled.memory_analysis(),
    compiled.as_text(),
    plan.estimate(cut.part(case), METHOD),
  )
  row = {
    "compile_s": round(time.perf_counter() - start, 1),
    "calls": calls_of(text),
    "collective_bytes": collectives(text, layers=CONFIG.layers),
    "argument_bytes": memory.argument_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "host_argument_bytes": memory.host_argument_size_in_bytes,
    "plan_bytes": sum(of.device.values()),
    "plan_temp_bytes": of.temporary,
    "plan_parts": of.device,
  }
  held, planned = (row[name] + row[temporary] for name, temporary in _MEMORY)
  missing = [name for name in set(KERNELS) if row["calls"].get(name, 0) < KERNELS.count(name)]
  if missing:
    row["problem"] = f"no call of {', '.join(missing)}"
  elif row["collective_bytes"] != {"all-reduce": cut.collective_bytes(case)}:
    row["problem"] = f"expected all-reduce of {cut.collective_bytes(case)} bytes"
  elif not host == of.host == memory.host_argument_size_in_bytes == memory.host_alias_size_in_bytes:
    row["problem"] = f"expected {of.host} bytes of pages, written in place"
  elif memory.host_temp_size_in_bytes:
    row["problem"] = f"{memory.host_temp_size_in_bytes} temporary bytes of host memory"
  elif abs(held - planned) > 0.05 * held:
    row["problem"] = f"{held} bytes on a device, {planned} planned"
  return row


def main() -> int:
  """Compile all, print what came of it, and say how many went wrong."""
  jax.default_backend = lambda: "tpu"  # what the library asks when it picks a kernel
  wrong = 0
  for name, cut in TOPOLOGIES.items():
    for tokens in TOKENS:
      row: dict[str, Any] = {"program": "decode step", "chips": name, "mesh": str(cut), "T": tokens}
      try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        row |= _inspect(cut, topology.devices, tokens)
      except Exception as error:  # whatever the compiler raises is the result
        row["problem"] = f"{type(error).__name__}: {error}"[:300]
      wrong += "problem" in row
      print(json.dumps(row), flush=True)
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
