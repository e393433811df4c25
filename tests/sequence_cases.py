"""Methods and caches for sequences over devices, and one run over all of a cache's later tokens."""

import jax
import jax.numpy as jnp

from a2ats_jax.budget import Budget
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.full import Full
from a2ats_jax.sequence import OverSequence
from tests import cases

# Neither 4 nor 8 devices divide the prompt into whole pages; seven pages of 4 are sealed after it.
SHAPE = cases.Shape(
  batch=3, layers=2, heads=4, kv_heads=2, head_dim=8, codewords=6, prompt=45, new=30
)
# Rows of one shard or less, of some, of all; ties of no, few and all tokens.
CACHES = {
  "spread": [45, 17, 1],
  "skewed": [40, 45, 9],
  "constant": [45, 30, 13],
  "no query": [44] * 3,
}
PROMPT = [32 + i % 90 for i in range(0, 700, 7)]  # of tests.eval.tiny's model
NEAR = {"window": 4, "sinks": 2, "page": 4}
A2ATS_OPTIONS = {
  "a2ats": {"budget": Budget(ratio=0.15), **NEAR},
  "a2ats by arrival, KV head": {
    "budget": Budget(tokens=6, per="kv_head"),
    "order": "arrival",
    **NEAR,
  },
  "a2ats-plus": {
    "budget": Budget(ratio=0.2),
    "far": FarPosition.segments(3, span=3),
    "tail": "centroid",
    **NEAR,
  },
}


def draw(style: str) -> cases.Cache:
  """A cache whose contents are of a style of :data:`tests.cases.STYLES`."""
  return cases.draw_cache(SHAPE, seed=31, lengths=CACHES[style], style=style)


def method_of(name: str) -> Full | A2ATS:
  """Full attention, or A2ATS with the codebook that all these caches have."""
  if name == "full":
    return Full()
  return A2ATS(codebook=cases.books(SHAPE, 31), **A2ATS_OPTIONS[name])


def run(method: Full | A2ATS | OverSequence, cache: cases.Cache):
  """Output, state and statistics of all later tokens of layer 1, given at once."""
  state, layer = method.init(SHAPE.geometry), jnp.asarray(1, jnp.int32)
  prompt = cases.prompt_layer(cache, 1, cases.needs_of(method))
  state = cases.absorb(method, state, prompt, layer)
  positions = cases.step_positions(cache, 0, SHAPE.new)
  tokens = cases.tokens_at(cache, 1, positions)
  run = cases.attend(method, state, *tokens, jnp.asarray(positions), cache.rope, layer)
  return jax.block_until_ready(run[:3])
