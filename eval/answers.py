"""Prompts answered by every case: one prefill, then a greedy answer under each method.

A prompt's last token is decoded under the method, so that the whole answer is the method's; with
the prompt taken in whole, exact attention would give every method its first token.
"""

from collections.abc import Callable, Sequence

import numpy as np

from a2ats_jax.generate import pad_prompts
from a2ats_jax.models.model import Model
from eval import harness, metrics
from eval.decode import bytes_of, greedy_from
from eval.options import Case, Progress
from eval.record import record, replay
from eval.results import Row


def answer(
  model: Model,
  cases: Sequence[Case],
  prompts: Sequence[Sequence[int]],
  score: Callable[[int, str], float],
  *,
  new: int,
  step: Callable[[float], None],
  room: int | None = None,
  width: int = 0,
  progress: Progress | None = None,
) -> list[list[Row]]:
  """Every prompt's answer by every case.

  Args:
    score: of a prompt's place among them and its answer's text.
    new: tokens to generate at most.
    step: called after each case with the mean score.
    room: new tokens that a state has room for; ``new`` by default. One for answers of different
      lengths makes them share a program.
    width: columns to pad prompts to, where they need fewer.
    progress: told of the prefill's layers.

  Returns:
    A row for each prompt and case: the case's identity, ``prediction``, ``score``, means over steps
    of what was read, and the bytes of a batch's state.
  """
  room = new if room is None else room
  tokens, lengths = pad_prompts([ids[:-1] for ids in prompts], model.config, new=new)
  tokens = np.pad(tokens, ((0, 0), (0, max(width - tokens.shape[1], 0))))
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  results: list[list[Row]] = [[] for _ in prompts]
  for case in cases:
    state = replay(model.config, recording, case.method, new=room)
    size = bytes_of((state, case.method))
    generated, stats = greedy_from(
      model.decoder,
      case.method,
      state,
      [ids[-1] for ids in prompts],
      lengths,
      new=new,
      steps=room,
      stop=model.tokenizer.eos_ids,
    )
    for row, mine in enumerate(results):
      text = model.tokenizer.decode(generated[row])
      result = case.identity | {"prediction": text, "score": score(row, text)}
      # Steps after a row's end read nothing.
      taken = [s for s in stats if "length" in s and s["length"][0, row, 0] > 0]
      figures = [metrics.reading(s, row) for s in taken]
      if figures:
        result |= {k: metrics.spread([f[k] for f in figures])[0] for k in figures[0]}
      mine.append(result | size)
    step(metrics.spread([mine[-1]["score"] for mine in results])[0])
  return results


def summary(results: Sequence[Row]) -> Row:
  """Means over prompts of what was read and of the score, which has ``_std`` and ``_se`` too."""
  figures: Row = {}
  sizes = ("moved_bytes", "read_bytes", "tail", "device_bytes", "host_bytes")
  for name in ("read", "selected", *sizes):
    there = [float(r[name]) for r in results if name in r]
    if there:
      figures[name] = metrics.spread(there)[0]
  scores = [r["score"] for r in results]
  figures["score"], figures["score_std"], figures["score_se"] = metrics.spread(scores)
  return figures
