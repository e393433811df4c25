"""Thousands of tokens fed after a prompt, each reduced to a few numbers as it passes.

No logits are kept: of each block only a token's negative log-likelihood, its KL and agreement with
full attention, and what was read stay. So the memory beside the states does not grow with the
number of tokens, but for these numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from a2ats_jax.generate import Progress
from a2ats_jax.methods.base import Method, State
from a2ats_jax.models.model import Model
from a2ats_jax.typing import Float, Int
from eval import harness, metrics
from eval.buckets import Span
from eval.decode import block_of, bytes_of, fed_block
from eval.options import BaseOptions, Case, row_of
from eval.record import Recording, replay
from eval.results import Row, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Followed:
  """Figures of every token fed to one row of a batch.

  Attributes:
    figures: ``nll`` (nats) of the token that follows; ``kl`` (nats) and ``top1`` against full
      attention where it ran beside. Each of N numbers.
    reading: see :func:`eval.metrics.reading_by_step`; each of N numbers, empty for a method
      without such statistics.
  """

  figures: Mapping[str, Float[np.ndarray, "N"]]
  reading: Mapping[str, Float[np.ndarray, "N"]]

  def result(self, spans: Iterable[Span]) -> Row:
    """As a line of predictions holds it: every token's figures, and means of what was read.

    Args:
      spans: buckets, in tokens from the first one fed.
    """
    means = {name: [float(np.mean(x[a:b])) for a, b in spans] for name, x in self.reading.items()}
    return {name: x.tolist() for name, x in self.figures.items()} | {"reading": means}


def follow(
  model: Model,
  recording: Recording,
  method: Method,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  *,
  beside: Method | None = None,
  progress: Progress | None = None,
) -> tuple[list[Followed], dict[str, int]]:
  """Feed tokens under a method, block by block, each predicting the next.

  Args:
    recording: of the prompts, made for both methods.
    tokens: the first at position ``lengths``; the last one is predicted but not fed.
    beside: full attention, which is fed the same tokens in step, so that distributions can be
      compared; None where they are not. May be ``method`` itself, which is then fed once.
    progress: called after every block, in tokens.

  Returns:
    The figures of each row, and ``device_bytes`` and ``host_bytes`` of the method's live arrays.
  """
  count = tokens.shape[1] - 1
  methods = (method,) if beside is None or beside is method else (beside, method)
  states = [replay(model.config, recording, each, new=count) for each in methods]
  size = bytes_of((states[-1], method))
  slots = recording.prompt.keys.shape[2] + count
  block = block_of(model.config, batch=len(tokens), slots=slots, new=count)
  rows: list[list[Followed]] = [[] for _ in tokens]
  for start in range(0, count, block):
    pieces, states = _block(
      model, methods, states, tokens, lengths, start, block, compare=beside is not None
    )
    for row, piece in zip(rows, pieces):
      row.append(piece)
    if progress is not None:
      progress(min(start + block, count), count)
  return [_joined(row) for row in rows], size


def _block(
  model: Model,
  methods: Sequence[Method],
  states: Sequence[State],
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
  start: int,
  block: int,
  *,
  compare: bool,
) -> tuple[list[Followed], list[State]]:
  """One block of every row, reduced; its logits are gone on return."""
  after, seen, stats = [], [], {}
  for method, state in zip(methods, states):
    logits, stats, state = fed_block(
      model.decoder, method, state, tokens[:, :-1], lengths, start=start, block=block
    )
    after.append(state)
    seen.append(logits)
  targets = tokens[:, 1:][:, start : start + block]
  pieces = []
  for row, truth in enumerate(targets):
    if compare:
      figures = dataclasses.asdict(metrics.compare(seen[0][row], seen[-1][row], truth))
    else:
      figures = {"nll": metrics.nll(seen[-1][row], truth)}
    pieces.append(Followed(figures=figures, reading=metrics.reading_by_step(stats, row)))
  return pieces, after


def _joined(pieces: Sequence[Followed]) -> Followed:
  def join(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  return Followed(
    figures=join([piece.figures for piece in pieces]),
    reading=join([piece.reading for piece in pieces]),
  )


def rows_by_bucket(
  benchmark: str,
  model: Model,
  options: BaseOptions,
  finished: Run,
  units: Sequence[harness.Unit],
  cases: Sequence[Case],
  *,
  buckets: Mapping[int, Sequence[Span]],
  first: int,
  more: Callable[[Sequence[Row]], Row] = lambda results: {},
) -> list[Row]:
  """A row for each task, length, case and bucket, full attention's first.

  Args:
    buckets: spans of positions by length.
    first: position of the first token fed.
    more: figures of a case that have no bucket, out of every text's result.

  Returns:
    Rows with ``bucket`` (first and last position), ``begin`` and ``end`` (one behind the last),
    ``ppl`` (of the mean NLL), ``nll`` and ``nll_diff`` (less that of full attention on the same
    text; nats a token), and where measured ``kl`` and ``top1``, each with ``_std`` over texts and
    ``_se`` of the mean; means of ``read``, ``selected``, ``tail``, ``read_bytes`` and
    ``moved_bytes`` a step; ``device_bytes`` and ``host_bytes``.
  """
  rows: list[Row] = []
  full: list[Row] = []
  for task, T, case, results in harness.grouped(finished, units, cases):
    if case is cases[0]:
      full = results  # the first case is full attention
    for place, (begin, end) in enumerate(buckets[T]):
      here = slice(begin - first, end - first)
      figures: Row = {"bucket": f"{begin}-{end - 1}", "begin": begin, "end": end}
      figures |= _summary(results, full, here) | more(results)
      for name in results[0]["reading"]:
        figures[name] = metrics.spread([r["reading"][name][place] for r in results])[0]
      for name in ("device_bytes", "host_bytes"):
        figures[name] = metrics.spread([float(r[name]) for r in results])[0]
      rows.append(row_of(benchmark, task, model, case, T, options, n=len(results), figures=figures))
  return rows


def _summary(results: Sequence[Row], full: Sequence[Row], here: slice) -> Row:
  """Figures of one bucket out of every text's result."""

  def per_text(rows: Sequence[Row], name: str) -> list[float]:
    return [math.fsum(row[name][here]) / len(row[name][here]) for row in rows]

  values = {name: per_text(results, name) for name in ("nll", "kl", "top1") if name in results[0]}
  values["nll_diff"] = [a - b for a, b in zip(values["nll"], per_text(full, "nll"))]
  figures: Row = {"ppl": math.exp(metrics.spread(values["nll"])[0])}
  for name, numbers in values.items():
    figures[name], figures[f"{name}_std"], figures[f"{name}_se"] = metrics.spread(numbers)
  return figures
