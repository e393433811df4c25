"""What a finished run leaves for people: losses as JSON lines, a picture, and a record."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from a2ats_jax.files import write_atomically
from a2ats_jax.typing import Float
from train_codebooks.fit import Fitted

LOSSES, PLOT = "losses.jsonl", "training.png"


def perplexity(counts: Float[np.ndarray, "M C"]) -> Float[np.ndarray, "M"]:
  """Codewords in effective use: 2 to the entropy of how often each is nearest; C when even."""
  p = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
  return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1))


def loss_rows(fitted: Fitted) -> list[dict[str, Any]]:
  """One row a step: phase, step, loss (mean over heads) and, where known, alive codewords."""
  rows: list[dict[str, Any]] = [
    {"phase": "adam", "step": i, "loss": float(x)} for i, x in enumerate(fitted.adam.mean(axis=0))
  ]
  for phase, run in (("lloyd", fitted.lloyd), ("plain", fitted.plain)):
    if run is not None:
      rows += [
        {"phase": phase, "step": i, "loss": float(x), "alive": float(a)}
        for i, (x, a) in enumerate(zip(run.losses.mean(axis=1), run.alive))
      ]
  return rows


def summary(fitted: Fitted, layers: int) -> dict[str, Any]:
  """Figures of the end of a run for the codebook's header; losses and usage by layer and head."""

  def by_layer(x: np.ndarray) -> list[list[float]]:
    return [[round(float(v), 6) for v in row] for row in x.reshape(layers, -1)]

  return {
    "loss": float(fitted.loss.mean()),
    "loss_after_seeding_and_lloyd_alone": (
      None if fitted.plain is None else float(fitted.plain.losses[-1].mean())
    ),
    "loss_by_head": by_layer(fitted.loss),
    "alive_by_head": by_layer(np.mean(fitted.counts > 0, axis=-1)),
    "perplexity_by_head": by_layer(perplexity(fitted.counts)),
    "heads_where_lloyd_alone_was_better": list(fitted.fallback),
  }


def draw(fitted: Fitted, layers: int) -> bytes:
  """A PNG: the loss over the steps, and codeword usage by layer."""
  size = fitted.counts.shape[-1]
  figure = Figure(figsize=(11, 4), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2)
  steps = fitted.adam.shape[1]
  if steps:
    left.plot(np.arange(steps), fitted.adam.mean(axis=0), label="Adam, minibatches")
  left.plot(
    steps + np.arange(len(fitted.lloyd.losses)),
    fitted.lloyd.losses.mean(axis=1),
    marker="o",
    label="Lloyd",
  )
  if fitted.plain is not None:
    left.axhline(
      float(fitted.plain.losses[-1].mean()), color="grey", linestyle="--", label="Lloyd alone"
    )
  left.set(xlabel="step", ylabel="squared distance / variance", title="Distortion, mean over heads")
  left.legend()
  alive = np.mean(fitted.counts > 0, axis=-1).reshape(layers, -1)
  used = perplexity(fitted.counts).reshape(layers, -1) / size
  layer = np.arange(layers)
  for values, label in ((alive, "in use"), (used, "in effective use (perplexity)")):
    right.plot(layer, values.mean(axis=1), marker=".", label=label)
    right.fill_between(layer, values.min(axis=1), values.max(axis=1), alpha=0.2)
  right.set(
    xlabel="layer", ylabel=f"share of {size}", title="Codewords by layer (range over heads)"
  )
  right.set_ylim(0, 1.05)
  right.legend()
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=120)
  return buffer.getvalue()


def write(directory: Path, fitted: Fitted, layers: int) -> None:
  """``losses.jsonl`` and ``training.png``."""
  lines = "".join(json.dumps(row) + "\n" for row in loss_rows(fitted))
  write_atomically(directory / LOSSES, lines.encode())
  write_atomically(directory / PLOT, draw(fitted, layers))
