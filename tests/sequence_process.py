"""One of two processes with two devices each, which runs methods on the mesh of all four.

``python -m tests.sequence_process ADDRESS NUMBER WANTED``: compares A2ATS with what one device
gave, and prints the tokens that a model makes under full attention.
"""

import os
import sys


def main(address: str, number: int, wanted: str) -> None:
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
  import jax
  import numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  jax.config.update("jax_disable_most_optimizations", True)
  jax.distributed.initialize(address, num_processes=2, process_id=number)

  from a2ats_jax.generate import generate
  from a2ats_jax.methods.full import Full
  from a2ats_jax.sequence import OverSequence
  from tests import cases, sequence_cases
  from tests.eval import tiny

  assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 2, 4)
  mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  over = OverSequence(sequence_cases.method_of("a2ats-plus"), mesh)
  over = jax.device_put(over, everywhere)
  out, state, stats = sequence_cases.run(over, sequence_cases.draw("skewed"))
  want = np.load(wanted)
  np.testing.assert_allclose(np.asarray(out), want["out"], atol=cases.TOLERANCE, rtol=0)
  np.testing.assert_array_equal(np.asarray(stats.selected), want["selected"])
  np.testing.assert_array_equal(np.asarray(stats.read), want["read"])
  mine = [shard.data.shape[3] for shard in state.store.pages.addressable_shards]
  print(f"process {number}: equal, holds {mine} pages")
  decoder, full = jax.device_put(tiny.model().decoder, everywhere), OverSequence(Full(), mesh)
  for block in generate(decoder, full, [sequence_cases.PROMPT], new=5):
    print("tokens", *block.tokens[0])


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
