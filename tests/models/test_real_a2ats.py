"""A2ATS on the real model: selections and greedy tokens equal those of the independent step."""

import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import generate, pad_prompts
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.models.model import load_model
from a2ats_jax.rope import make_rope
from eval.record import record
from tests import independent
from train_codebooks.texts import pydoc_held_out

TOKENS, NEW = 150, 4


@pytest.fixture(scope="module")
def model():
  return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def prompt(model):
  return model.tokenizer.encode(pydoc_held_out().text[:2000], special=True)[:TOKENS]


@pytest.fixture(scope="module")
def cache(model, prompt):
  """Keys before rotary embedding and values of the prompt, ``[L, T, K, D]``."""
  recorded = record(model.decoder, *pad_prompts([prompt], model.config, new=NEW)).prompt
  return np.asarray(recorded.keys[:, 0, :TOKENS]), np.asarray(recorded.values[:, 0, :TOKENS])


@pytest.fixture(scope="module")
def book(cache):
  """Real keys as codewords, 24 a head, under a metric of its own for every head."""
  keys = cache[0]
  layers, _, kv_heads, dim = keys.shape
  rng = np.random.default_rng(0)
  words = keys[:, rng.permutation(TOKENS)[:24]].swapaxes(1, 2)
  metric = np.eye(dim) + np.tril(rng.normal(scale=0.1, size=(layers, kv_heads, dim, dim)), -1)
  return make_codebook(jnp.asarray(words), jnp.asarray(metric, jnp.float32))


def reference_tokens(model, prompt, cache, book, *, ratio, **options):
  """Greedy tokens with every layer's attention by the independent step; the prompt's are exact."""
  decoder, rope = model.decoder, make_rope(model.config.rope)
  inv_freq = np.asarray(rope.inv_freq, np.float64)
  lower = np.asarray(book.whitener, np.float64)
  metric = lower @ lower.swapaxes(-1, -2)
  words = np.asarray(book.codewords)
  keys, values = (list(x) for x in cache)
  codes = [
    np.stack(
      [
        independent.encode(keys[layer][:, head], words[layer, head], metric[layer, head])[0]
        for head in range(keys[layer].shape[1])
      ],
      axis=1,
    )
    for layer in range(len(keys))
  ]
  # The first token comes from the prompt's exact attention, in the package as here.
  made = [int(next(generate(decoder, _full_budget(book), [prompt], new=1)).tokens[0, 0])]
  chosen = 0
  for _ in range(NEW - 1):
    x = decoder.embed(jnp.asarray([[made[-1]]], jnp.int32))
    for layer in range(len(keys)):
      block = decoder.layer(layer)
      q, k, v = block.project(x)
      keys[layer] = np.concatenate([keys[layer], np.asarray(k[0])])
      values[layer] = np.concatenate([values[layer], np.asarray(v[0])])
      new = [
        independent.encode(np.asarray(k[0, :, head]), words[layer, head], metric[layer, head])[0]
        for head in range(k.shape[2])
      ]
      codes[layer] = np.concatenate([codes[layer], np.stack(new, axis=1)])
      step = independent.decode_step(
        np.asarray(q[0, 0]),
        keys[layer],
        values[layer],
        codes[layer],
        words[layer],
        inv_freq,
        k=independent.granted(len(keys[layer]), ratio),
        prompt=TOKENS,
        **options,
      )
      chosen += sum(len(one) for one in step.union)
      x = block.finish(x, jnp.asarray(step.out[None, None], jnp.float32))
    made.append(int(jnp.argmax(decoder.logits(x)[0, 0])))
  return made, chosen


def _full_budget(book):
  return A2ATSReference(codebook=book, budget=Budget(ratio=1.0))


@pytest.mark.parametrize(
  ("ours", "theirs"),
  [
    ({}, {"distance": 2048}),
    (
      {"far": FarPosition.segments(3, span=16), "tail": "centroid"},
      {"segments": independent.Segments(3, 16), "tail": True},
    ),
  ],
  ids=["published", "segments and tail"],
)
def test_greedy_tokens_and_tokens_read(model, prompt, cache, book, ours, theirs):
  """Every layer under the method, a tenth of the context per query head."""
  method = A2ATSReference(codebook=book, budget=Budget(ratio=0.1), **ours)
  got, selected = [], 0
  for block in generate(model.decoder, method, [prompt], new=NEW):
    got += block.tokens[0].tolist()
    selected += 0 if block.stats is None else int(block.stats.selected.sum())
  want, chosen = reference_tokens(model, prompt, cache, book, ratio=0.1, **theirs)
  assert got == want
  assert selected == chosen


def test_pages_give_the_references_tokens(model, prompt, book):
  """The cache in host pages on the real model: same tokens, same number read."""
  options = {
    "codebook": book,
    "budget": Budget(ratio=0.1),
    "far": FarPosition.segments(3, span=16),
    "tail": "centroid",
    "window": 16,
  }
  told = []
  for method in (A2ATSReference(**options), A2ATS(**options)):
    blocks = list(generate(model.decoder, method, [prompt], new=12))
    tokens = np.concatenate([block.tokens for block in blocks], axis=1).tolist()
    told.append((tokens, [np.asarray(block.stats.selected).tolist() for block in blocks[1:]]))
  assert told[0] == told[1]
