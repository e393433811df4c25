"""Prompts answered with every case: one prefill for all, greedy decoding under each method.

A prompt's last token is decoded under the method, so that the whole answer is the method's; with
the prompt taken in whole, exact attention would give every method its first token.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from a2ats_jax.generate import CHUNK, decode_step, pad_prompts
from a2ats_jax.methods.base import Method, State
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.model import Model
from a2ats_jax.typing import Int
from eval import harness, metrics
from eval.decode import bytes_of, figures_of, greedy_from
from eval.options import Case, Progress
from eval.record import record, replay
from eval.results import Row


def width_of(tokens: int, longest: int) -> int:
  """Slots for prompts of up to so many tokens: few widths, so that few shapes compile.

  512 times 1, 2, 3, 4, 6, 8, 12, ..., but no more than the longest prompt of all needs.

  Args:
    tokens: of a batch's longest prompt, without the last token.
    longest: the same over all batches.
  """
  most = CHUNK * -(-longest // CHUNK)
  power = CHUNK
  while power < tokens:
    power *= 2
  between = 3 * power // 4
  width = between if between % CHUNK == 0 and between >= tokens else power
  return min(width, most)


def answers(
  model: Model,
  prompts: Sequence[Sequence[int]],
  cases: Sequence[Case],
  *,
  new: int,
  width: int,
  stop: Sequence[int],
  some: bool = False,
  progress: Progress | None = None,
) -> Iterator[list[Row]]:
  """What every case answers to a batch of prompts.

  Args:
    prompts: token ids, two or more each; lengths may differ.
    new: tokens generated at most.
    width: slots of the prompts without their last tokens; a multiple of 512.
    stop: tokens before which an answer ends.
    some: no answer is empty: none of ``stop`` may come first.

  Yields:
    Case after case, a row a prompt: the case's identity, ``prediction``, what was read
    (:func:`eval.metrics.reading`, means over steps) and the bytes of state and method.
  """
  tokens, lengths = pad_prompts([ids[:-1] for ids in prompts], model.config, new=new)
  tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
  methods = [case.method for case in cases]
  layers = harness.layers_of(progress)
  recording = record(model.decoder, tokens, lengths, methods=methods, progress=layers)
  continued = _greedy_some if some else greedy_from
  for case in cases:
    state = replay(model.config, recording, case.method, new=new)
    size = bytes_of((state, case.method))
    last = [ids[-1] for ids in prompts]
    generated, stats = continued(
      model.decoder, case.method, state, last, lengths, new=new, stop=stop
    )
    rows = []
    for row, ids in enumerate(generated):
      # Steps after a row's end read nothing.
      taken = [s for s in stats if "length" in s and s["length"][0, row, 0] > 0]
      figures = [metrics.reading(s, row) for s in taken]
      means = {k: metrics.spread([f[k] for f in figures])[0] for k in figures[0]} if figures else {}
      rows.append(case.identity | {"prediction": model.tokenizer.decode(ids)} | means | size)
    yield rows


def _greedy_some(
  decoder: Decoder,
  method: Method,
  state: State,
  last: Sequence[int],
  lengths: Int[np.ndarray, "B"],
  *,
  new: int,
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
  rest, more = greedy_from(decoder, method, state, first, lengths + 1, new=new - 1, stop=stop)
  return [[token, *row] for token, row in zip(first, rest)], [figures_of(stats), *more]
