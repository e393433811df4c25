"""How long a decode step takes, beside plain attention in the same process.

``attention`` times one layer of Llama-3.1-8B's shape on drawn keys (:mod:`eval.speed_inputs`);
``model`` times whole decode steps of a model after a real text. A round runs every variant in turn;
figures are medians and quartiles over rounds. Full attention and the fastest other plain form of it
run in the same rounds, ``jax.nn.dot_product_attention`` for one layer and attention in blocks for a
model: a row's ``ratio`` is that of the faster one's time to the method's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax.numpy as jnp
import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods import registry
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.registry import MethodSpec
from a2ats_jax.models.model import Model
from eval import harness, lanes, plots, speed_attention, speed_model, texts, timing
from eval.ablation import TABLE
from eval.options import Case, Progress, codebook_hash, model_name, parse_methods
from eval.record import Recording, record
from eval.results import Row, Run, open_run
from eval.speed_inputs import LLAMA_8B, REAL, LayerShape, draw, draw_codebook
from train_codebooks.texts import Text

WARMUP = 3  # rounds left out
DTYPES = MappingProxyType({"float32": jnp.float32, "bfloat16": jnp.bfloat16})
BASELINES = ("full", speed_attention.DOT_PRODUCT, speed_model.BLOCKED)
PLOT = "speed.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedOptions:
  """What is timed.

  Attributes:
    what: one attention layer, or a whole model.
    methods: the baselines are added.
    budgets: each method that selects runs under every one.
    T: prompt lengths, tokens.
    batch: rows.
    dtypes: of cached keys and values, and of queries; a model takes float32 alone.
    rounds: timed.
    seed: of everything that is drawn.
    shape: of the layer; a model has its own.
    out: directory of the run; None writes nothing.
  """

  what: Literal["attention", "model"] = "attention"
  methods: tuple[MethodSpec, ...] = parse_methods("a2ats-plus")
  budgets: tuple[Budget, ...] = (Budget(ratio=0.03), Budget(tokens=2048, per="kv_head"))
  T: tuple[int, ...] = (8192, 32768, 131072)
  batch: tuple[int, ...] = (1,)
  dtypes: tuple[str, ...] = ("float32",)
  rounds: int = 15
  seed: int = 0
  shape: LayerShape = LLAMA_8B
  out: Path | None = None

  def __post_init__(self):
    if self.what not in ("attention", "model"):
      raise UserError(f"what: expected attention or model, got {self.what!r}")
    for name in ("methods", "budgets", "T", "batch", "dtypes"):
      values = getattr(self, name)
      if not values:
        raise UserError(f"{name}: expected at least one, got none")
      for value in values:
        if values.count(value) > 1:
          raise UserError(f"{name}: {value} is named twice")
    for name, least in (("T", 2), ("batch", 1)):
      if min(getattr(self, name)) < least:
        raise UserError(f"{name}: expected at least {least}, got {min(getattr(self, name))}")
    for name in self.dtypes:
      if name not in DTYPES:
        raise UserError(f"dtype: expected {' or '.join(DTYPES)}, got {name!r}")
    if self.what == "model" and self.dtypes != ("float32",):
      raise UserError(f"dtype: a model runs in float32, got {', '.join(self.dtypes)}")
    if self.rounds < 1:
      raise UserError(f"rounds: expected at least 1, got {self.rounds}")
    if self.seed < 0:
      raise UserError(f"seed: expected 0 or more, got {self.seed}")


def run_attention(options: SpeedOptions, *, progress: Progress | None = None) -> list[Row]:
  """Time one attention layer at every length, dtype and batch.

  Returns:
    Rows with ``ms``, ``ms_low`` and ``ms_high`` (median and quartiles), the same of ``score_ms``
    and ``selection_ms`` (from the score table to page numbers), each timed in a program of its own
    that does it :data:`eval.lanes.REPEATS` times, and ``selection_share`` of the step;
    ``baseline`` (the faster plain attention), ``baseline_ms`` and ``ratio``; ``full_ms`` and
    ``dot_product_attention_ms``; what was read and moved in a step; and bytes.

  Raises:
    UserError: a method cannot be built, or ``out`` holds another run.
  """
  book, _ = draw_codebook(options.shape, seed=options.seed)
  names = {dict(spec.options).get("book", registry.DEFAULT_BOOK) for spec in options.methods}
  dot = MethodSpec(name=speed_attention.DOT_PRODUCT)
  plain = [Case(spec=dot, budget=None, method=speed_attention.DotProduct())]
  cases = _cases(options, dict.fromkeys(names, book), plain)
  finished = open_run(options.out, _config(options) | {"law": dataclasses.asdict(REAL)})

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    dtype, batch = _kinds(options)[unit.indices[0]]
    drawn = draw(
      options.shape,
      T=unit.T,
      new=_steps(options, cases),
      seed=options.seed,
      batch=batch,
      dtype=DTYPES[dtype],
    )

    def variants(some: Sequence[Case]) -> list[lanes.Variant]:
      return speed_attention.variants_of(some, drawn, options.shape, dtype=DTYPES[dtype])

    return _measure(unit, options, cases, variants, progress, step)

  return _finish(finished, options, cases, measure, progress, options.shape.name)


def run_model(
  model: Model,
  options: SpeedOptions,
  text: Text,
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Time decode steps of a model at every length and batch, after one text.

  Args:
    text: held out from the codebooks' training.
    codebooks: of all layers by name.

  Returns:
    Rows as of :func:`run_attention`, without the parts of a step, with ``blocked_ms`` for the other
    baseline, and with ``tokens_per_s`` of the whole batch.

  Raises:
    UserError: a length beyond the model's context, a text too short, codebooks missing, or ``out``
      holding another run.
  """
  blocked = MethodSpec(name=speed_model.BLOCKED)
  plain = [Case(spec=blocked, budget=None, method=speed_model.Blocked())]
  cases = _cases(options, codebooks, plain)
  steps = _steps(options, cases)
  if max(options.T) + steps > model.config.context:
    raise UserError(
      f"T: {max(options.T)} tokens and {steps} timed ones exceed the model's context of "
      f"{model.config.context}"
    )
  window = texts.windows(
    text, model.tokenizer, longest=max(options.T), after=steps, limit=1, seed=options.seed
  )[0]
  config = _config(options) | {
    "model": {"name": model_name(model), "fingerprint": model.fingerprint},
    "codebook_sha256": {name: codebook_hash(book) for name, book in codebooks.items()},
    "text": text.sha256,
  }
  finished = open_run(options.out, config)
  kept: dict[int, Recording] = {}

  def recording(T: int) -> Recording:
    if T not in kept:
      kept.clear()
      prefix = model.tokenizer.encode("", special=True)
      prompt = texts.prompt_of(window, T, steps, prefix)
      tokens, lengths = pad_prompts([prompt], model.config, new=steps)
      layers = harness.layers_of(progress)
      kept[T] = record(model.decoder, tokens, lengths, progress=layers)
    return kept[T]

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    _, batch = _kinds(options)[unit.indices[0]]

    def variants(some: Sequence[Case]) -> list[lanes.Variant]:
      later = window[len(window) - steps :]
      prompt = recording(unit.T)
      return speed_model.variants_of(some, model, prompt, later, T=unit.T, batch=batch)

    return _measure(unit, options, cases, variants, progress, step)

  return _finish(finished, options, cases, measure, progress, model_name(model))


def _cases(
  options: SpeedOptions, codebooks: Mapping[str, Codebook], plain: Sequence[Case]
) -> list[Case]:
  """The baselines, then every method under every budget."""
  full = Case(spec=MethodSpec(name="full"), budget=None, method=Full())
  cases = [full, *plain]
  for spec in options.methods:
    if spec.name == "full":
      continue
    for budget in options.budgets if TABLE[spec.name].takes_budget else (None,):
      method = registry.build(spec, budget=budget, codebooks=codebooks, table=TABLE)
      cases.append(Case(spec=spec, budget=budget, method=method))
  return cases


def _methods(cases: Sequence[Case]) -> list[list[Case]]:
  """Cases of each method that is no baseline; one empty list if there are none."""
  ours = [case for case in cases if case.spec.name not in BASELINES]
  return [list(group) for _, group in groupby(ours, key=lambda case: case.spec)] or [[]]


def _steps(options: SpeedOptions, cases: Sequence[Case]) -> int:
  """Tokens that the fullest state takes in: its budgets', or a baseline's beside every method."""
  methods = _methods(cases)
  calls = (WARMUP + options.rounds) * lanes.CALLS
  return calls * max(len(methods), *(len(group) for group in methods), 1)


def _kinds(options: SpeedOptions) -> list[tuple[str, int]]:
  """Dtype and batch, by the index of a line."""
  return [(dtype, batch) for dtype in options.dtypes for batch in options.batch]


def _config(options: SpeedOptions) -> Row:
  """What decides a run's rows, as JSON types."""
  return {
    "benchmark": "speed",
    "what": options.what,
    "methods": [str(spec) for spec in options.methods],
    "budgets": [str(budget) for budget in options.budgets],
    "T": list(options.T),
    "batch": list(options.batch),
    "dtypes": list(options.dtypes),
    "rounds": options.rounds,
    "warmup": WARMUP,
    "calls": lanes.CALLS,
    "repeats": lanes.REPEATS,
    "seed": options.seed,
  } | ({"shape": dataclasses.asdict(options.shape)} if options.what == "attention" else {})


def _measure(
  unit: harness.Unit,
  options: SpeedOptions,
  cases: Sequence[Case],
  variants: Callable[[Sequence[Case]], list[lanes.Variant]],
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  """One method at a time beside the baselines, so that memory holds one more state than theirs."""
  plain = [v for case in cases if case.spec.name in BASELINES for v in variants([case])]
  results: list[Row] = []
  for group in _methods(cases):
    timed = [*plain, *(variants(group) if group else [])]

    def tick(done: int, total: int) -> None:
      if progress is not None:
        progress("rounds", done, total)

    rows = lanes.measure(timed, rounds=options.rounds, warmup=WARMUP, tick=tick)
    beside = {row["method"]: row["ms"] for row in rows[: len(plain)]}
    for row in rows if not results else rows[len(plain) :]:
      results.append(row | {"beside": beside})
      step(T=float(unit.T), ms=float(np.median(row["ms"])))
  return [{"task": unit.task, "T": unit.T, "index": unit.indices[0], "results": results}]


def _finish(
  finished: Run,
  options: SpeedOptions,
  cases: Sequence[Case],
  measure: Callable[[harness.Unit, harness.Step], list[Row]],
  progress: Progress | None,
  model: str,
) -> list[Row]:
  """Measure what is missing; rows from all lines."""
  kinds = range(len(_kinds(options)))
  units = [
    harness.Unit(task=options.what, T=T, indices=(index,))
    for T in sorted(options.T)
    for index in kinds
  ]
  harness.run_units(finished, units, cases, measure, progress)
  lines = {(line["T"], line["index"]): line["results"] for line in finished.lines}
  rows = [
    _row(options, unit, model, result)
    for unit in units
    for result in lines[unit.T, unit.indices[0]]
  ]
  finished.finish(rows)
  if options.out is not None:
    plots.speed(rows, options.out / PLOT, baselines=BASELINES)
  return rows


def _row(options: SpeedOptions, unit: harness.Unit, model: str, result: Row) -> Row:
  dtype, batch = _kinds(options)[unit.indices[0]]
  who = ("method", "options", "budget", "per", "beside")
  figures = {k: v for k, v in result.items() if k not in who and not k.endswith("ms")}
  row: Row = {
    "benchmark": "speed",
    "task": unit.task,
    "model": model,
    "method": result["method"],
    "options": result["options"],
    "T": unit.T,
    "batch": batch,
    "dtype": dtype,
    "budget": result["budget"],
    "per": result["per"],
  }
  times = {name: np.asarray(result[name]) for name in result if name.endswith("ms")}
  for name, taken in times.items():
    row |= timing.summary(taken, name.removesuffix("ms"))
  if "selection_ms" in row:
    row["selection_share"] = row["selection_ms"] / row["ms"]
  beside = {name: float(np.median(taken)) for name, taken in result["beside"].items()}
  fastest = min(beside, key=lambda name: beside[name])
  row |= {"baseline": fastest, "baseline_ms": beside[fastest]}
  row["ratio"] = row["baseline_ms"] / row["ms"]
  row |= {f"{name}_ms": taken for name, taken in beside.items()}
  if unit.task == "model":
    row["tokens_per_s"] = batch * 1e3 / row["ms"]
  return row | figures | {"n": len(result["ms"]), "seed": options.seed}
