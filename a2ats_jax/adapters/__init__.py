"""Models of Flax zoos under a KV method: one file a zoo, each of them only the mapping.

The zoo's own modules run, with its own parameters; what is left out is its cache and its attention.
"""

from a2ats_jax.adapters.adapted import (
  Adapted,
  decode_step,
  generate,
  keys_and_queries,
  prefill,
)

__all__ = ["Adapted", "decode_step", "generate", "keys_and_queries", "prefill"]
