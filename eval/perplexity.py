"""Perplexity on long text, by position: what does a method lose as its cache grows?

Of a text of T tokens the first ones are the prompt, whose attention is exact. The others are fed
one by one whatever a method predicts, every layer under the method, and each token's negative
log-likelihood of the token that follows is recorded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.models.model import Model
from eval import harness, plots, texts
from eval.buckets import Buckets, Span
from eval.follow import follow, rows_by_bucket
from eval.options import BaseOptions, Case, Progress, cases_of, config_of
from eval.record import record
from eval.results import Row, open_run
from train_codebooks.texts import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions(BaseOptions):
  """What the benchmark takes; ``T`` are lengths of texts, ``limit`` counts texts of each kind.

  Attributes:
    prompt: tokens of a text that are prefilled, below T.
    buckets: of positions in the text; positions of the prompt are not fed and in none.
    kl: also compare distributions, for which full attention is fed again beside every method.
  """

  T: tuple[int, ...] = (4096,)
  prompt: int = 1024
  buckets: Buckets = Buckets(parts=4)
  kl: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not 1 <= self.prompt < min(self.T):
      raise UserError(
        f"prompt: expected 1 to {min(self.T) - 1} tokens, fewer than a text has, got {self.prompt}"
      )

  @property
  def spans(self) -> dict[int, tuple[Span, ...]]:
    """Buckets of positions, by the length of a text."""
    return {T: self.buckets.spans(self.prompt, T) for T in self.T}


def run(
  model: Model,
  options: PerplexityOptions,
  kinds: Sequence[Text],
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Measure every method at every budget and length on every kind of text.

  Args:
    kinds: each becomes a ``task``.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    The rows of :func:`eval.follow.rows_by_bucket`; ``kl`` and ``top1`` if asked for.

  Raises:
    UserError: lengths beyond the model's context, buckets without a position, a text too short,
      codebooks missing, or ``out`` holding another run.
  """
  if max(options.T) > model.config.context:
    raise UserError(
      f"T: {max(options.T)} tokens exceed the model's context of {model.config.context}"
    )
  spans = options.spans
  cases = cases_of(options, codebooks)
  windows = texts.windows_of(
    kinds,
    model.tokenizer,
    longest=max(options.T),
    after=1,
    limit=options.limit,
    seed=options.seed,
  )
  config = config_of("perplexity", model, options, cases, codebooks)
  config |= {
    "buckets": str(options.buckets),
    "texts": {kind.name: kind.sha256 for kind in kinds},
  }
  finished = open_run(options.out, config)
  units = harness.units_of(windows, options.T, options.limit, options.batch)

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    rows = windows[unit.task][list(unit.indices)]
    return _measure(model, unit, cases, rows, options, progress, step)

  harness.run_units(finished, units, cases, measure, progress)
  rows = rows_by_bucket(
    "perplexity",
    model,
    options,
    finished,
    units,
    cases,
    buckets=spans,
    first=options.prompt,
  )
  finished.finish(rows)
  if options.out is not None:
    for y in ("ppl", "nll_diff", *(("kl", "top1") if options.kl else ())):
      plots.by_position(rows, options.out / f"{y.replace('_', '-')}.png", y=y)
  return rows


def _measure(
  model: Model,
  unit: harness.Unit,
  cases: Sequence[Case],
  windows: np.ndarray,
  options: PerplexityOptions,
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  prompt, prefix = options.prompt, model.tokenizer.encode("", special=True)
  whole = np.asarray(
    [[*texts.prompt_of(window, unit.T, 1, prefix), window[-1]] for window in windows], np.int32
  )
  tokens, lengths = pad_prompts(whole[:, :prompt].tolist(), model.config, new=unit.T - prompt)
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  offsets = [(begin - prompt, end - prompt) for begin, end in options.spans[unit.T]]
  lines: list[Row] = [
    {"task": unit.task, "T": unit.T, "index": index, "results": []} for index in unit.indices
  ]
  for case in cases:
    followed, size = follow(
      model,
      recording,
      case.method,
      whole[:, prompt:],
      lengths,
      beside=cases[0].method if options.kl else None,
      progress=harness.phase_of(progress, "feed"),
    )
    for line, one in zip(lines, followed):
      line["results"].append(case.identity | one.result(offsets) | size)
    step(T=float(unit.T), nll=float(np.mean([one.figures["nll"] for one in followed])))
  return lines
