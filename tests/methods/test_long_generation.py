"""Twenty thousand generated tokens: the cache in pages against the reference at checkpoints."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from a2ats_jax import generate
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.rope import make_rope
from a2ats_jax.sampling import Sampling
from tests import cases, tiny

NEW, BLOCK = 20_000, 500
CHECKED = (1, 2, 19, 40)  # blocks
LENGTHS = (37, 12)

OPTIONS = {
  "published": {"budget": Budget(tokens=40)},
  "segments and tail, shared": {
    "budget": Budget(ratio=0.03, per="kv_head"),
    "far": FarPosition.segments(3),
    "tail": "centroid",
  },
}


def one_layer() -> Decoder:
  """Keys and values of its only layer depend on the tokens alone."""
  config = tiny.tiny_config(layers=1, heads=2, kv_heads=1, context=NEW + 100)
  return Decoder(config, rngs=nnx.Rngs(0))


@jax.jit
def project(decoder, tokens):
  return decoder.layer(0).project(decoder.embed(tokens))


@jax.jit
def attend(method, state, q, k, v, positions, rope):
  return method.attend(state, q, k, v, positions=positions, rope=rope, layer=0)


@partial(jax.jit, donate_argnums=1)
def append(method, state, k, v, positions, rope):
  return method.append(state, k, v, positions=positions, rope=rope, layer=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_twenty_thousand_tokens(options):
  """Outputs and tokens read are the reference's at every checkpoint, and nothing compiles late."""
  decoder = one_layer()
  rope = make_rope(decoder.config.rope)
  rng = np.random.default_rng(0)
  words = jnp.asarray(rng.normal(size=(1, 1, 24, 16)), jnp.float32)
  book = make_codebook(words, jnp.eye(16)[None, None])
  reference = A2ATSReference(codebook=book, window=16, sinks=2, **OPTIONS[options])
  fields = {f.name: getattr(reference, f.name) for f in dataclasses.fields(reference)}
  method = A2ATS(page=16, **fields)
  prompts = tiny.prompts(*LENGTHS)
  room = NEW + 1
  made, going = generate.start(
    decoder, method, prompts, new=room, sampling=Sampling(temperature=1.0), seed=1
  )
  _, slow = generate.prefill(
    decoder, reference, *generate.pad_prompts(prompts, decoder.config, new=room), new=room
  )
  tokens, compiled, seen = [made.tokens], None, 0
  for block in range(1, NEW // BLOCK + 1):
    made, going = generate.advance(decoder, method, going, new=BLOCK, block=BLOCK)
    tokens.append(made.tokens)
    if block == 1:
      compiled = generate.decode_block._cache_size()
    if block not in CHECKED:
      continue
    history = np.concatenate(tokens, axis=1)
    done = history.shape[1] - 1  # the last token is in neither cache
    positions = np.asarray(LENGTHS)[:, None] + np.arange(seen, done)
    _, k, v = project(decoder, jnp.asarray(history[:, seen:done]))
    seen = done
    slow = append(reference, slow, k, v, jnp.asarray(positions, jnp.int32), rope)
    now = going.rows.position[:, None]
    q, k, v = project(decoder, going.rows.token[:, None])
    want, _, told = attend(reference, slow, q, k, v, now, rope)
    out, _, stats = attend(method, going.rows.state, q, k, v, now, rope)
    assert np.asarray(now)[:, 0].tolist() == [n + done for n in LENGTHS]
    np.testing.assert_array_equal(stats.read, told.read)
    assert np.asarray(stats.selected).min() > 0
    np.testing.assert_allclose(out, want, atol=cases.TOLERANCE, rtol=0)
    np.testing.assert_allclose(stats.tail, told.tail, atol=cases.TOLERANCE, rtol=0)
  assert generate.decode_block._cache_size() == compiled
  assert going.room == 0
