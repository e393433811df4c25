"""A model of two layers, text for it, and options that train in a second."""

import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors

from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.model import Model, fingerprint_of
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.rope import RopeConfig
from train_codebooks import Corpus, Metric, TrainOptions

OPTIONS = TrainOptions(
  codewords=16,
  tokens=600,
  document_tokens=48,
  metric=Metric(distances=(40,)),
  steps=10,
  batch=64,
  lloyd_steps=3,
  tolerance=0.0,
)


def byte_tokenizer(bos: str | None = None) -> Tokenizer:
  """One token a byte, and a first token where asked for."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {symbol: i for i, symbol in enumerate([*alphabet, *([bos] if bos else [])])}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  if bos:
    backend.add_special_tokens([bos])
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
    )
  return Tokenizer(backend, bos=bos)


def tiny_model(seed: int = 0) -> Model:
  """Two layers, four query heads on two KV heads of size 8."""
  config = ModelConfig(
    architecture="llama",
    vocab=260,
    layers=2,
    heads=4,
    kv_heads=2,
    width=32,
    mlp_width=48,
    context=128,
    rope=RopeConfig(head_dim=8),
    tied=True,
  )
  decoder = Decoder(config, rngs=nnx.Rngs(seed))
  return Model(
    config=config,
    decoder=decoder,
    tokenizer=byte_tokenizer(),
    fingerprint=fingerprint_of(config, decoder),
    source="random",
  )


def random_corpus(seed: int = 0, lengths: tuple[int, ...] = (48,) * 10 + (31, 48, 7)) -> Corpus:
  """Documents of random tokens."""
  draw = np.random.default_rng(seed)
  documents = tuple(draw.integers(0, 260, n).astype(np.int32) for n in lengths)
  return Corpus(documents=documents, sources=({"name": "random", "sha256": "0", "tokens": 1},))
