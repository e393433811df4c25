"""Drift over a long generation: does a method stay near full attention on the model's own text?

Full attention continues a prompt by N tokens. Every method is then fed these tokens one by one,
beside full attention, and each token's distribution is compared. And every method continues the
prompt by itself, the same way and with the same draws, until it departs from full attention's text.

As in :mod:`eval.needle` a prompt's last token is decoded under the method, so that every
distribution compared is the method's. An end-of-text token ends nothing: all texts have N tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import generate
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import Rows, advance, pad_prompts
from a2ats_jax.methods.base import Method
from a2ats_jax.models.model import Model
from a2ats_jax.sampling import Sampling
from a2ats_jax.sharding import committed
from a2ats_jax.typing import Float, Int
from eval import harness, metrics, plots, texts
from eval.buckets import Buckets, Span
from eval.decode import block_of, fed_block
from eval.follow import follow, rows_by_bucket
from eval.options import Case, CommonOptions, Progress, cases_of, check_context, config_of
from eval.recall import Probe, asked, can_be_asked
from eval.record import Recording, record, replay
from eval.results import Row, open_run
from train_codebooks.texts import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions(CommonOptions):
  """What the benchmark takes; ``limit`` counts prompts of each kind.

  Attributes:
    new: tokens generated, N.
    buckets: of generated tokens, the first one being 0.
    sampling: how full attention, and then every method by itself, draws tokens.
    recall: also measure the true attention that methods read which can be asked for it.
  """

  T: tuple[int, ...] = (1024,)
  new: int = 1024
  buckets: Buckets = Buckets(parts=4)
  sampling: Sampling = Sampling()
  recall: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.seed >= 1 << 32:
      raise UserError(f"seed: expected a whole number from 0 to 2^32 - 1, got {self.seed}")

  @property
  def spans(self) -> tuple[Span, ...]:
    """Buckets of generated tokens."""
    return self.buckets.spans(0, self.new)


def run(
  model: Model,
  options: GenerationOptions,
  kinds: Sequence[Text],
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Measure every method at every budget and length on every kind of prompt.

  Args:
    kinds: prompts are cut out of these; each becomes a ``task``.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    The rows of :func:`eval.follow.rows_by_bucket` on full attention's text, whose perplexity is
    that of the generated tokens. ``agree``: tokens that the method's own continuation shares with
    it before the first that differs, N at most, mean over prompts and alike in all buckets of a
    method. With ``recall``, ``mass``: the share of true attention on the tokens read, along the
    trajectory of full attention, as in :class:`eval.recall.Caught`.

  Raises:
    UserError: lengths beyond the model's context, buckets without a token, a text too short,
      codebooks missing, or ``out`` holding another run.
  """
  check_context(model, options)
  spans = options.spans
  cases = cases_of(options, codebooks)
  windows = texts.windows_of(
    kinds,
    model.tokenizer,
    longest=max(options.T),
    after=0,
    limit=options.limit,
    seed=options.seed,
  )
  config = config_of("generation", model, options, cases, codebooks)
  config |= {
    "buckets": str(options.buckets),
    "sampling": dataclasses.asdict(options.sampling),
    "texts": {kind.name: kind.sha256 for kind in kinds},
  }
  finished = open_run(options.out, config)
  units = harness.units_of(windows, options.T, options.limit, options.batch)

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    rows = windows[unit.task][list(unit.indices)]
    return _measure(model, unit, cases, rows, options, progress, step)

  harness.run_units(finished, units, cases, measure, progress)
  rows = rows_by_bucket(
    "generation",
    model,
    options,
    finished,
    units,
    cases,
    buckets=dict.fromkeys(options.T, spans),
    first=0,
    more=_agreement,
  )
  finished.finish(rows)
  if options.out is not None:
    for y in ("kl", "top1"):
      plots.by_position(rows, options.out / f"{y}.png", y=y, x="tokens generated")
  return rows


def _agreement(results: Sequence[Row]) -> Row:
  mean, deviation, error = metrics.spread([float(r["agree"]) for r in results])
  return {"agree": mean, "agree_std": deviation, "agree_se": error}


def _measure(
  model: Model,
  unit: harness.Unit,
  cases: Sequence[Case],
  windows: np.ndarray,
  options: GenerationOptions,
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  prefix = model.tokenizer.encode("", special=True)
  prompts = [texts.prompt_of(window, unit.T, 0, prefix) for window in windows]
  tokens, lengths = pad_prompts([p[:-1] for p in prompts], model.config, new=options.new)
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  last = np.asarray([p[-1] for p in prompts], np.int32)
  by_itself = partial(
    continued,
    model,
    recording,
    last=last,
    lengths=lengths,
    new=options.new,
    sampling=options.sampling,
    seed=options.seed,
    streams=unit.indices,
    progress=harness.phase_of(progress, "generate"),
  )
  full = by_itself(cases[0].method)
  fed = np.concatenate([last[:, None], full], axis=1)
  lines: list[Row] = [
    {"task": unit.task, "T": unit.T, "index": index, "results": []} for index in unit.indices
  ]
  for case in cases:
    followed, size = follow(
      model,
      recording,
      case.method,
      fed,
      lengths,
      beside=cases[0].method,
      progress=harness.phase_of(progress, "feed"),
    )
    own = full
    if case is not cases[0]:
      own = by_itself(case.method, until=full)
    for row, (line, one) in enumerate(zip(lines, followed)):
      result = case.identity | one.result(options.spans) | size
      result["agree"] = agreement(own[row], full[row])
      result["text"] = model.tokenizer.decode(own[row].tolist())
      line["results"].append(result)
    if options.recall and can_be_asked(asked(case.method)):
      mass = mass_read(model, recording, case.method, fed, lengths)
      for row, line in enumerate(lines):
        means = [float(np.mean(mass[row, a:b])) for a, b in options.spans]
        line["results"][-1]["reading"]["mass"] = means
    step(T=float(unit.T), kl=float(np.mean([one.figures["kl"] for one in followed])))
  return lines


def continued(
  model: Model,
  recording: Recording,
  method: Method,
  *,
  last: Int[np.ndarray, "B"],
  lengths: Int[np.ndarray, "B"],
  new: int,
  sampling: Sampling,
  seed: int,
  streams: Sequence[int],
  until: Int[np.ndarray, "B N"] | None = None,
  progress: generate.Progress | None = None,
) -> Int[np.ndarray, "B n"]:
  """Continue prompts under a method, every token of them its own.

  Args:
    recording: of the prompts less their last tokens.
    last: the prompts' last tokens, at position ``lengths``.
    new: tokens to make.
    seed, streams: of the draws, as in :func:`a2ats_jax.generate.start`.
    until: a text to stop at once every row has departed from it; nothing is asked of what follows.

  Returns:
    The tokens made: ``new`` of them, or fewer after ``until``.
  """
  rows = Rows(
    state=replay(model.config, recording, method, new=new),
    token=jnp.asarray(last),
    position=jnp.asarray(lengths, jnp.int32),
    live=jnp.ones(len(last), bool),
  )
  numbers = jnp.asarray(streams, jnp.int32)
  generation = generate.Generation(
    rows=committed(rows),
    keys=jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers),
    stop=jnp.zeros(0, jnp.int32),
    sampling=sampling,
    room=new,
  )
  block, made = min(generate.BLOCK, new), np.zeros((len(last), 0), np.int32)
  while generation.room:
    piece, generation = advance(
      model.decoder, method, generation, new=min(block, generation.room), block=block
    )
    made = np.concatenate([made, piece.tokens], axis=1)
    if progress is not None:
      progress(made.shape[1], new)
    if until is not None and (made != until[:, : made.shape[1]]).any(axis=1).all():
      break
  return made


def agreement(own: Int[np.ndarray, "n"], full: Int[np.ndarray, "N"]) -> int:
  """Tokens before the first that differs; if none does, all of ``own``, which may be shorter."""
  apart = np.flatnonzero(own != full[: len(own)])
  return int(apart[0]) if len(apart) else len(own)


def mass_read(
  model: Model,
  recording: Recording,
  method: Method,
  tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"],
) -> Float[np.ndarray, "B N"]:
  """The share of true attention on what a method would read at each token, under full attention.

  Args:
    method: one whose selection can be asked for, see :func:`eval.recall.can_be_asked`.
    tokens: the first at position ``lengths``; the last one is not fed.

  Returns:
    Means over layers and query heads.
  """
  probe, inputs = Probe(candidate=asked(method)), tokens[:, :-1]
  count = inputs.shape[1]
  state = replay(model.config, recording, probe, new=count)
  slots = recording.prompt.keys.shape[2] + count
  block = block_of(model.config, batch=len(tokens), slots=slots, new=count)
  parts = []
  for start in range(0, count, block):
    stats, state = fed_block(
      model.decoder, probe, state, inputs, lengths, start=start, block=block
    )[1:]
    parts.append(np.mean(stats["mass"], axis=(0, 3), dtype=np.float64))
  return np.concatenate(parts, axis=1)
