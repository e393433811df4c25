"""A model of two layers with random weights, one token a character, and codebooks of its keys."""

import functools

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from a2ats_jax.codebook import Codebook, make_codebook
from a2ats_jax.generate import pad_prompts
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.model import Model
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.rope import RopeConfig
from eval.record import record
from train_codebooks.texts import Text

CHAT = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@functools.cache
def model(context: int = 2048, bos: bool = False) -> Model:
  """Random weights; ids are code points below 128."""
  config = ModelConfig(
    architecture="llama",
    vocab=128,
    layers=2,
    heads=4,
    kv_heads=2,
    width=32,
    mlp_width=48,
    context=context,
    rope=RopeConfig(head_dim=8, theta=1000.0),
  )
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({chr(i): i for i in range(128)}, unk_token="?")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  backend.decoder = tokenizers.decoders.Fuse()
  if bos:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single="\x01 $A", special_tokens=[("\x01", 1)]
    )
  decoder = Decoder(config, rngs=nnx.Rngs(0))
  # Sharper attention than fresh weights give: far tokens must matter.
  decoder.layers.q.kernel[...] = 3 * decoder.layers.q.kernel[...]
  return Model(
    config=config,
    decoder=decoder,
    tokenizer=Tokenizer(backend, template=CHAT),
    fingerprint="tiny",
    source="/somewhere/tiny.gguf",
  )


@functools.cache
def codebook(size: int = 16) -> Codebook:
  """Keys of a random prompt as codewords."""
  m = model()
  # every id once: two codewords that are all but equal would score all but equal
  ids = (32 + np.random.default_rng(1).permutation(95)[:64]).tolist()
  tokens, lengths = pad_prompts([ids], m.config, new=0)
  keys = record(m.decoder, tokens, lengths).prompt.keys[:, 0]
  codewords = jnp.swapaxes(keys[:, 64 - size : 64], 1, 2)
  eye = jnp.broadcast_to(jnp.eye(8), (2, 2, 8, 8))
  return make_codebook(codewords, eye)


@functools.cache
def prose(sentences: int = 120, seed: int = 0) -> Text:
  """Sentences of random words."""
  rng = np.random.default_rng(seed)
  letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
  lines = []
  for _ in range(sentences):
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(rng.integers(4, 9))]
    lines.append(" ".join(words).capitalize() + ".")
  return Text("tiny prose", "\n".join(lines))
