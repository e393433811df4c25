"""One of the processes of a mesh that spans two, each with two CPU devices, on one machine.

Writes the tokens that it generated. Usage::

    python -m tests.two_processes PROCESS PORT OUT.npy
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import numpy as np


def main(process: int, port: int, out: str) -> None:
  """Generate over a mesh of both."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_disable_most_optimizations", True)
  jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)

  # Only now: what these import may ask for devices.
  from a2ats_jax.methods.sharded import shard_method
  from a2ats_jax.models.sharded import shard_decoder
  from a2ats_jax.sharding import make_mesh
  from tests import tiny
  from tests.test_sharding import QUANTISED, built, made

  assert (jax.process_count(), jax.device_count(), len(jax.local_devices())) == (2, 4, 2)
  own, other = jax.devices()[:2], jax.devices()[2:]
  # The KV heads of a row lie in different processes.
  mesh = make_mesh(batch=2, heads=2, devices=[own[0], other[0], own[1], other[1]])
  decoder, method = tiny.tiny_model(), built(QUANTISED)
  np.save(out, made(shard_decoder(decoder, mesh), shard_method(method, mesh)))


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
