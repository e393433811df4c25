"""Prompts answered by every case: one prefill, then a greedy answer under each method.

A prompt's last token is decoded under the method, so that the whole answer is the method's; with
the prompt taken in whole, exact attention would give every method its first token.
"""

from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from a2ats_jax.generate import decode_step, pad_prompts
from a2ats_jax.methods.base import Method, State
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.model import Model
from a2ats_jax.typing import Int
from eval import harness, metrics
from eval.decode import bytes_of, figures_of, greedy_from
from eval.options import Case, Progress
from eval.record import record, replay
from eval.results import Row


def answers(
  model: Model,
  cases: Sequence[Case],
  prompts: Sequence[Sequence[int]],
  *,
  new: int,
  room: int | None = None,
  width: int = 0,
  stop: Sequence[int] | None = None,
  some: bool = False,
  progress: Progress | None = None,
) -> Iterator[list[Row]]:
  """What every case answers to a batch of prompts.

  Args:
    prompts: token ids, two or more each; lengths may differ.
    new: tokens to generate at most.
    room: new tokens that a state has room for; ``new`` by default. One for answers of different
      lengths makes them share a program.
    width: columns to pad prompts without their last tokens to, where they need fewer.
    stop: tokens before which an answer ends; the tokenizer's ends by default.
    some: no answer is empty: none of ``stop`` may come first.
    progress: told of the prefill's layers.

  Yields:
    Case after case, a row a prompt: the case's identity, ``prediction``, means over steps of what
    was read, and the bytes of a batch's state.
  """
  room = new if room is None else room
  stop = model.tokenizer.eos_ids if stop is None else stop
  tokens, lengths = pad_prompts([ids[:-1] for ids in prompts], model.config, new=new)
  tokens = np.pad(tokens, ((0, 0), (0, max(width - tokens.shape[1], 0))))
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  last = [ids[-1] for ids in prompts]
  greedy = _greedy_some if some else greedy_from
  for case in cases:
    state = replay(model.config, recording, case.method, new=room)
    size = bytes_of((state, case.method))
    generated, stats = greedy(
      model.decoder, case.method, state, last, lengths, new=new, steps=room, stop=stop
    )
    rows = []
    for row, ids in enumerate(generated):
      # Steps after a row's end read nothing.
      taken = [s for s in stats if "length" in s and s["length"][0, row, 0] > 0]
      figures = [metrics.reading(s, row) for s in taken]
      means = {k: metrics.spread([f[k] for f in figures])[0] for k in figures[0]} if figures else {}
      rows.append(case.identity | {"prediction": model.tokenizer.decode(ids)} | means | size)
    yield rows


def scored(
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
  """Every prompt's answers by every case, with their scores.

  Args:
    score: of a prompt's place among them and its answer's text.
    step: called after each case with the mean score.
    new, room, width, progress: as in :func:`answers`.

  Returns:
    For each prompt a row for each case, see :func:`answers`, with ``score``.
  """
  results: list[list[Row]] = [[] for _ in prompts]
  every = answers(model, cases, prompts, new=new, room=room, width=width, progress=progress)
  for rows in every:
    for place, (mine, row) in enumerate(zip(results, rows)):
      mine.append(row | {"score": score(place, row["prediction"])})
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


def _greedy_some(
  decoder: Decoder,
  method: Method,
  state: State,
  last: Sequence[int],
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
  steps: int,
  stop: Sequence[int],
) -> tuple[list[list[int]], list[dict[str, np.ndarray]]]:
  """:func:`eval.decode.greedy_from`, but the first token is the best that is no stop token."""
  logits, state, stats = decode_step(
    decoder, method, state, jnp.asarray(last, jnp.int32)[:, None], jnp.asarray(lengths)[:, None]
  )
  best = np.array(logits[:, 0])
  best[:, list(stop)] = -np.inf
  first = best.argmax(axis=-1).tolist()
  if new == 1:
    return [[token] for token in first], [figures_of(stats)]
  rest, more = greedy_from(
    decoder, method, state, first, lengths + 1, new=new - 1, steps=steps - 1, stop=stop
  )
  return [[token, *row] for token, row in zip(first, rest)], [figures_of(stats), *more]
