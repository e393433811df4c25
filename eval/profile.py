"""A model's profile: how the attention of each layer lies over its tokens, for budgets by layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2ats_jax.generate import pad_prompts, prefill
from a2ats_jax.methods import caches, layer_budget
from a2ats_jax.methods.base import Needs
from a2ats_jax.methods.layer_budget import Curves
from a2ats_jax.models.model import Model
from eval import harness, texts
from eval.options import Progress
from eval.record import Recorder
from train_codebooks.texts import Text


def measure(
  model: Model,
  kinds: Sequence[Text],
  out: Path,
  *,
  T: int,
  limit: int,
  seed: int = 0,
  progress: Progress | None = None,
) -> Curves:
  """Run texts through a model and write the mean of their curves to ``out``.

  Args:
    kinds: texts, best not those that methods are measured on.
    T: tokens of each prompt.
    limit: prompts of each text.
    progress: told of every prompt and of the layers of each.

  Raises:
    UserError: a text is too short, or T exceeds the model's context.
  """
  prefix = model.tokenizer.encode("", special=True)
  windows = texts.windows_of(
    kinds, model.tokenizer, longest=T, after=0, limit=limit, seed=seed
  ).values()
  prompts = [texts.prompt_of(window, T, 0, prefix) for rows in windows for window in rows]
  curves = []
  for place, prompt in enumerate(prompts):
    if progress is not None:
      progress("profile", place, len(prompts))
    tokens, lengths = pad_prompts([prompt], model.config, new=0)
    recorder, layers = Recorder(Needs(sums=True)), harness.layers_of(progress)
    _, state = prefill(model.decoder, recorder, tokens, lengths, new=0, progress=layers)
    recorded, _ = caches.split(state)
    curves.append(layer_budget.curves_of(np.asarray(recorded.sums)[:, 0, :, : lengths[0]]))
  if progress is not None:
    progress("profile", len(prompts), len(prompts))
  mean = tuple(tuple(row) for row in np.mean(np.asarray(curves), axis=0).tolist())
  layer_budget.save_profile(out, mean)
  return mean
