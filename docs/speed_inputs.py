"""How a real model uses its codes, beside the input that `a2ats eval speed` draws.

Runs SmolLM2 over a text, takes in its keys with A2ATS, feeds some tokens more and prints what the
constants of eval/speed_inputs.py are made of; then the same figures of drawn layers of the model's
shape, and of drawn layers of Llama-3.1-8B's shape. About two minutes on two cores.

  a2ats train --out books --codewords 1024 --tokens 57344
  python docs/speed_inputs.py books --text novels.txt
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.cli_args import DEFAULT_MODEL
from a2ats_jax.codebook import Codebook
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.models.model import load_model
from a2ats_jax.rope import make_rope
from eval import texts
from eval.decode import figures_of, teacher_forced
from eval.record import record, replay
from eval.speed_attention import absorb, attend, geometry_of, tokens_of
from eval.speed_inputs import LayerShape, draw, usage
from train_codebooks.texts import Text

T, NEW, LAGS = 8100, 16, (1, 2, 4, 8, 16, 32)
BUDGETS = (Budget(ratio=0.03), Budget(ratio=0.01))


def method(book: Codebook, budget: Budget) -> A2ATS:
  return A2ATS(codebook=book, budget=budget, far=FarPosition.segments(8), tail="centroid")


def of_words(book: Codebook) -> dict[str, float]:
  """The common part of codewords, and how alike neighbours are without it."""
  words = np.asarray(book.codewords, np.float64)
  words = words.reshape(-1, *words.shape[2:])
  common = words.mean(axis=1, keepdims=True)
  own = words - common
  length = np.linalg.norm(own, axis=-1)
  rms = np.sqrt((length**2).mean(axis=-1))
  out = {"common": float((np.linalg.norm(common[:, 0], axis=-1) / rms).mean())}
  for lag in LAGS:
    product = (own[:, lag:] * own[:, :-lag]).sum(-1) / length[:, lag:] / length[:, :-lag]
    out[f"cosine {lag} apart"] = float(product.mean())
  return out


def of_counts(cells: np.ndarray, size: int) -> dict[str, float]:
  """Use of codewords and cells ``[heads, 8 C ...]``."""
  old = cells[:, : 8 * size].reshape(len(cells), 8, size)
  return usage(old.sum(axis=1)) | {"cells": float((old > 0).sum((1, 2)).mean())}


def of_stats(stats: dict[str, np.ndarray], budget: Budget, page: int) -> dict[str, float]:
  """Tokens that a group chose over those granted to a query head, and fetched over chosen."""
  granted = budget.resolve(int(stats["length"].max()))[stats["length"]]
  chosen = stats["selected"].astype(np.float64)
  return {
    f"union at {budget}": float((chosen / granted[..., None]).mean()),
    f"fetched at {budget}": float(page * stats["pages"].sum() / chosen.sum()),
  }


def real(books: Path, text: Path | None) -> tuple[dict[str, float], LayerShape]:
  model = load_model(DEFAULT_MODEL)
  book, _ = model.load_codebooks(books)
  kind = texts.gather([text] if text else [])[0]
  kind = Text(kind.name, kind.text[:200000])
  size = {"longest": T, "after": NEW, "limit": 1, "seed": 0}
  window = texts.windows(kind, model.tokenizer, **size)
  tokens, lengths = pad_prompts(window[:, :T].tolist(), model.config, new=NEW)
  recording = record(model.decoder, tokens, lengths)
  out = of_words(book)
  for budget in BUDGETS:
    ours = method(book, budget)
    state = replay(model.config, recording, ours, new=NEW)
    if budget == BUDGETS[0]:
      counts = np.asarray(state.index.counts)
      out |= of_counts(counts.reshape(-1, counts.shape[-1]), book.size)
    later = window[:, T:]
    _, stats = teacher_forced(model.decoder, ours, state, later, lengths, block=NEW)
    out |= of_stats(stats, budget, ours.page)
  config = model.config
  shape = LayerShape(
    heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim, codewords=book.size
  )
  return out, shape


def drawn(shape: LayerShape, layers: int) -> dict[str, float]:
  figures, rope = [], make_rope(shape.rope)
  geometry = geometry_of(shape, batch=1, T=T, new=NEW, dtype=jnp.float32)
  for seed in range(layers):
    layer = draw(shape, T=T, new=NEW, seed=seed)
    out = of_words(layer.book)
    for budget in BUDGETS:
      ours = method(layer.book, budget)
      state = absorb(ours, layer.keys, layer.values, rope, geometry=geometry)
      if budget == BUDGETS[0]:
        out |= of_counts(np.asarray(state.index.counts)[0, 0], shape.codewords)
      steps = []
      for token in tokens_of(layer):
        _, state, stats = attend(ours, state, *token, rope)
        steps.append(figures_of(stats))
      stats = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
      out |= of_stats(stats, budget, ours.page)
    figures.append(out)
  return {name: float(np.mean([f[name] for f in figures])) for name in figures[0]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("books", type=Path, help="codebooks that `a2ats train` wrote")
  parser.add_argument("--text", type=Path, help="UTF-8 prose; default: CPython's held-out text")
  arguments = parser.parse_args()
  measured, shape = real(arguments.books, arguments.text)
  columns = [measured, drawn(shape, 8), drawn(LayerShape(), 3)]
  print(f"| {T} tokens | SmolLM2 | drawn, its shape | drawn, Llama-3.1-8B's |")
  print("|---|---|---|---|")
  for name in measured:
    print(f"| {name} | " + " | ".join(f"{c[name]:.3g}" for c in columns) + " |")


if __name__ == "__main__":
  main()
