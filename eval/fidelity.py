"""How far a method's next-token distributions are from full attention's, on held-out text.

A text gives a prompt of T tokens and N tokens that follow it. The prompt's attention is exact; the
N tokens are fed one by one whatever a method predicts, every layer under the method, and each
token's distribution is compared with that of full attention.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from a2ats_jax.codebook import Codebook
from a2ats_jax.generate import pad_prompts
from a2ats_jax.models.model import Model
from eval import harness, metrics, plots, texts
from eval.decode import Figures, block_of, bytes_of, teacher_forced
from eval.options import Case, CommonOptions, Progress, cases_of, check_context, config_of, row_of
from eval.record import Recording, record, replay
from eval.results import Row, open_run
from train_codebooks.texts import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityOptions(CommonOptions):
  """Shared options only. ``limit`` counts texts of each kind, ``new`` the tokens fed to each."""


def run(
  model: Model,
  options: FidelityOptions,
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
    Rows with ``kl`` (nats a token), ``top1`` (agreement with full attention), ``ppl``, ``read``
    and ``selected`` (fractions of the cache with and without sinks and window), ``moved_bytes`` and
    ``read_bytes`` a token, ``tail``, ``device_bytes`` and ``host_bytes`` of live arrays (the states
    of a batch, padded to its longest row, and the method's own arrays); ``_std`` over texts and
    ``_se`` of the mean beside kl and top1.

  Raises:
    UserError: lengths beyond the model's context, a text too short, codebooks missing, or ``out``
      holding another run.
  """
  check_context(model, options)
  cases = cases_of(options, codebooks)
  after = options.new + 1
  windows = texts.windows_of(
    kinds,
    model.tokenizer,
    longest=max(options.T),
    after=after,
    limit=options.limit,
    seed=options.seed,
  )
  config = config_of("fidelity", model, options, cases, codebooks)
  config["texts"] = {kind.name: kind.sha256 for kind in kinds}
  finished = open_run(options.out, config)
  units = harness.units_of(windows, options.T, options.limit, options.batch)

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    rows = windows[unit.task][list(unit.indices)]
    return _measure(model, unit, cases, rows, options, progress, step)

  harness.run_units(finished, units, cases, measure, progress)
  rows = [
    row_of("fidelity", task, model, case, T, options, n=len(results), figures=_summary(results))
    for task, T, case, results in harness.grouped(finished, units, cases)
  ]
  finished.finish(rows)
  if options.out is not None:
    plots.plot(rows, options.out / "kl.png", y="kl")
  return rows


def _measure(
  model: Model,
  unit: harness.Unit,
  cases: Sequence[Case],
  windows: np.ndarray,
  options: FidelityOptions,
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  after, prefix = options.new + 1, model.tokenizer.encode("", special=True)
  prompts = [texts.prompt_of(window, unit.T, after, prefix) for window in windows]
  tokens, lengths = pad_prompts(prompts, model.config, new=options.new)
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  inputs, targets = windows[:, -after:-1], windows[:, -options.new :]
  lines: list[Row] = [
    {"task": unit.task, "T": unit.T, "index": index, "results": []} for index in unit.indices
  ]
  full: np.ndarray | None = None
  for case in cases:
    logits, stats, size = _logits(model, case, recording, inputs, lengths)
    if full is None:
      full = logits  # the first case is full attention
    for row, line in enumerate(lines):
      close = metrics.compare(full[row], logits[row], targets[row])
      result = case.identity | {
        "kl": close.kl.tolist(),
        "top1": close.top1.tolist(),
        "nll": close.nll.tolist(),
      }
      line["results"].append(result | metrics.reading(stats, row) | size)
    step(T=float(unit.T), kl=float(np.mean([line["results"][-1]["kl"] for line in lines])))
  return lines


def _logits(
  model: Model, case: Case, recording: Recording, inputs: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, Figures, dict[str, int]]:
  """One case from a fresh state, which is dropped on return, and the bytes of that state."""
  batch, new = inputs.shape
  state = replay(model.config, recording, case.method, new=new)
  slots = recording.prompt.keys.shape[2] + new
  block = block_of(model.config, batch=batch, slots=slots, new=new)
  size = bytes_of((state, case.method))
  return *teacher_forced(model.decoder, case.method, state, inputs, lengths, block=block), size


def _summary(results: Sequence[Row]) -> Row:
  """Figures of a row out of every text's result."""
  figures: Row = {}
  for name in ("read", "selected"):
    if name in results[0]:
      figures[name] = metrics.spread([r[name] for r in results])[0]
  for name in ("kl", "top1"):
    per_text = [math.fsum(r[name]) / len(r[name]) for r in results]
    figures[name], figures[f"{name}_std"], figures[f"{name}_se"] = metrics.spread(per_text)
  figures["ppl"] = math.exp(
    metrics.spread([math.fsum(r["nll"]) / len(r["nll"]) for r in results])[0]
  )
  for name in ("moved_bytes", "read_bytes", "tail", "device_bytes", "host_bytes"):
    if name in results[0]:
      figures[name] = metrics.spread([float(r[name]) for r in results])[0]
  return figures
