"""What a method's selection catches of true attention, along the trajectory of full attention.

Every layer's output is that of full attention whatever the method under test would choose, so its
queries and keys are those of the uncompressed model; the method is only asked which tokens it
would read. Figures are kept for every layer and query head.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax import attention
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods import dense, selection
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.base import Geometry, PromptLayer, State
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.models.model import Model
from a2ats_jax.rope import Rope, rotate
from a2ats_jax.typing import Array, Bool, Float, Int
from eval import harness, metrics, plots, texts
from eval.decode import block_of, teacher_forced
from eval.options import Case, CommonOptions, Progress, cases_of, check_context, config_of, row_of
from eval.record import record, replay
from eval.results import Row, Run, open_run
from train_codebooks.texts import Text

FIGURES = ("mass", "far_mass", "topk_recall")
ARRAYS = "recall.npz"


def can_be_asked(method: Any) -> bool:
  """Whether a method tells its selection without attending, as A2ATSReference does."""
  return isinstance(method, Full | Oracle) or (
    hasattr(method, "append") and hasattr(method, "select")
  )


def asked(method: Any) -> Any:
  """What tells a selection: for a cache in pages the reference, which chooses alike."""
  return method.reference if isinstance(method, A2ATS) else method


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["length", "selected", "read", "mass", "far_mass", "topk_recall"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Caught:
  """What one step's selection caught, of one layer or of all.

  Attributes:
    length: tokens cached, with the query's own.
    selected, read: far tokens chosen by the group, and with sinks and window.
    mass: share of true attention on the tokens read.
    far_mass: share of the attention on far tokens that the selected ones have; 1 where there are
      none.
    topk_recall: share of the query head's true top-k far tokens that its group selected, k being
      the budget; 1 where k is 0.
  """

  length: Int[Array, "*L B S"]
  selected: Int[Array, "*L B S K"]
  read: Int[Array, "*L B S K"]
  mass: Float[Array, "*L B S H"]
  far_mass: Float[Array, "*L B S H"]
  topk_recall: Float[Array, "*L B S H"]


@partial(jax.tree_util.register_dataclass, data_fields=["full", "candidate"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ProbeState:
  """The true cache, and the candidate's own (empty for full attention and the oracle)."""

  full: dense.DenseCache
  candidate: State


@partial(jax.tree_util.register_dataclass, data_fields=["candidate"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """Full attention that asks a candidate what it would have read.

  Attributes:
    candidate: a method that :func:`can_be_asked`. For full attention every token counts as far
      and as selected.
  """

  candidate: Any

  @property
  def name(self) -> str:
    return f"probe({self.candidate.name})"

  @property
  def _asks(self) -> bool:
    return not isinstance(self.candidate, Full | Oracle)

  def init(self, geometry: Geometry) -> ProbeState:
    return ProbeState(dense.init(geometry), self.candidate.init(geometry) if self._asks else ())

  def absorb(self, state: ProbeState, prompt: PromptLayer, *, layer: int | Array) -> ProbeState:
    return ProbeState(
      dense.write_prompt_cache(state.full, prompt, layer),
      self.candidate.absorb(state.candidate, prompt, layer=layer) if self._asks else (),
    )

  def attend(
    self,
    state: ProbeState,
    q: Float[Array, "B S H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    positions: Int[Array, "B S"],
    rope: Rope,
    layer: int | Array,
  ) -> tuple[Float[Array, "B S H D"], ProbeState, Caught]:
    where = {"positions": positions, "rope": rope, "layer": layer}
    out, full, _ = Full().attend(state.full, q, k, v, **where)
    candidate = state.candidate
    if self._asks:
      candidate = self.candidate.append(candidate, k, v, **where)
    scores = attention.logits(rotate(q, positions, rope), dense.read(full.k, layer))
    chosen, near, far = self._choose(candidate, q, scores, where)
    caught = self._catch(scores, chosen, near, far, positions, k.shape[2])
    return out, ProbeState(full, candidate), caught

  def _choose(
    self, state: State, q: Float[Array, "B S H D"], scores: Float[Array, "B S H T"], where: Any
  ) -> tuple[Bool[Array, "B S H T"], Bool[Array, "B S T"], Bool[Array, "B S T"]]:
    if self._asks:
      return self.candidate.select(state, q, **where)[1:]
    slots = scores.shape[-1]
    if isinstance(self.candidate, Full):
      far = dense.visible(where["positions"], slots)
      return jnp.broadcast_to(far[:, :, None], scores.shape), jnp.zeros_like(far), far
    near, far = selection.near_and_far(
      where["positions"], slots, sinks=self.candidate.sinks, window=self.candidate.window
    )
    return self._top(scores, far, where["positions"]), near, far

  def _top(
    self, scores: Float[Array, "B S H T"], far: Bool[Array, "B S T"], positions: Int[Array, "B S"]
  ) -> Bool[Array, "B S H T"]:
    """The true top-k far tokens of every query head."""
    budget = getattr(self.candidate, "budget", Budget(ratio=1.0))
    no_cells = jnp.zeros((scores.shape[0], 1, scores.shape[-1]), jnp.int32)
    return selection.choose(scores, no_cells, far, positions + 1, budget)

  def _catch(
    self,
    scores: Float[Array, "B S H T"],
    chosen: Bool[Array, "B S H T"],
    near: Bool[Array, "B S T"],
    far: Bool[Array, "B S T"],
    positions: Int[Array, "B S"],
    kv_heads: int,
  ) -> Caught:
    union = selection.union(chosen, kv_heads)
    selected = attention.per_query_head(union, scores.shape[2] // kv_heads)
    near, far = near[:, :, None], far[:, :, None]
    seen = jnp.where(near | far, scores, -jnp.inf)
    peak = jnp.max(seen, axis=-1, keepdims=True)
    weight = jnp.exp(seen - jnp.where(jnp.isfinite(peak), peak, 0.0))

    def share(part: Array, whole: Array) -> Array:
      part, whole = jnp.sum(part, axis=-1), jnp.sum(whole, axis=-1)
      return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 1.0)

    top = self._top(scores, far[:, :, 0], positions).astype(jnp.float32)
    return Caught(
      length=positions + 1,
      selected=jnp.sum(union, axis=-1, dtype=jnp.int32),
      read=jnp.sum(union | near, axis=-1, dtype=jnp.int32),
      mass=share(jnp.where(selected | near, weight, 0.0), weight),
      far_mass=share(jnp.where(selected, weight, 0.0), jnp.where(far, weight, 0.0)),
      topk_recall=share(jnp.where(selected, top, 0.0), top),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallOptions(CommonOptions):
  """Shared options only. ``limit`` counts texts of each kind, ``new`` the queries of each."""


def run(
  model: Model,
  options: RecallOptions,
  kinds: Sequence[Text],
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Ask every method at every budget and length on every kind of text.

  Beside the rows, ``out`` receives ``recall.npz`` (arrays ``[row, L, H]`` of each figure, in the
  order of the rows) and a heat map a task and length.

  Args:
    kinds: each becomes a ``task``.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    Rows with ``mass``, ``far_mass`` and ``topk_recall`` as in :class:`Caught`, means over layers,
    query heads, queries and texts.

  Raises:
    UserError: as for fidelity; also a method that cannot be asked for its selection.
  """
  check_context(model, options)
  cases = [
    dataclasses.replace(case, method=asked(case.method)) for case in cases_of(options, codebooks)
  ]
  for case in cases:
    if not can_be_asked(case.method):
      raise UserError(f"recall: method {case.spec.name} cannot be asked which tokens it selects")
  windows = texts.windows_of(
    kinds,
    model.tokenizer,
    longest=max(options.T),
    after=options.new,
    limit=options.limit,
    seed=options.seed,
  )
  config = config_of("recall", model, options, cases, codebooks)
  config["texts"] = {kind.name: kind.sha256 for kind in kinds}
  finished = open_run(options.out, config)
  units = harness.units_of(windows, options.T, options.limit, options.batch)

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    rows = windows[unit.task][list(unit.indices)]
    return _measure(model, unit, cases, rows, options, progress, step)

  harness.run_units(finished, units, cases, measure, progress)
  rows = [
    row_of("recall", task, model, case, T, options, n=len(results), figures=_summary(results))
    for task, T, case, results in harness.grouped(finished, units, cases)
  ]
  finished.finish(rows)
  if options.out is not None:
    _save_arrays(options.out, finished, units, cases)
  return rows


def _measure(
  model: Model,
  unit: harness.Unit,
  cases: Sequence[Case],
  windows: np.ndarray,
  options: RecallOptions,
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  prefix = model.tokenizer.encode("", special=True)
  prompts = [texts.prompt_of(window, unit.T, options.new, prefix) for window in windows]
  tokens, lengths = pad_prompts(prompts, model.config, new=options.new)
  recording = record(
    model.decoder,
    tokens,
    lengths,
    methods=[case.method for case in cases],
    progress=harness.layers_of(progress),
  )
  inputs = windows[:, -options.new :]
  slots = tokens.shape[1] + options.new
  block = block_of(model.config, batch=len(prompts), slots=slots, new=options.new)
  lines: list[Row] = [
    {"task": unit.task, "T": unit.T, "index": index, "results": []} for index in unit.indices
  ]
  for case in cases:
    probe = Probe(candidate=case.method)
    _, caught = teacher_forced(
      model.decoder,
      probe,
      replay(model.config, recording, probe, new=options.new),
      inputs,
      lengths,
      block=block,
    )
    for row, line in enumerate(lines):
      length = caught["length"][:, row, :, None].astype(np.float64)
      line["results"].append(
        case.identity
        | {name: float(np.mean(caught[name][:, row] / length)) for name in ("read", "selected")}
        | {name: _per_head(caught[name][:, row]) for name in FIGURES}
      )
    step(T=float(unit.T), mass=float(np.mean([line["results"][-1]["mass"] for line in lines])))
  return lines


def _per_head(values: Float[np.ndarray, "L N H"]) -> list[list[float]]:
  """Mean over the queries, layers by heads."""
  return np.mean(values, axis=1, dtype=np.float64).tolist()


def _summary(results: Sequence[Row]) -> Row:
  figures: Row = {
    name: metrics.spread([r[name] for r in results])[0] for name in ("read", "selected")
  }
  for name in FIGURES:
    per_text = [float(np.mean(r[name])) for r in results]
    figures[name], figures[f"{name}_std"], figures[f"{name}_se"] = metrics.spread(per_text)
  return figures


def _save_arrays(
  out: Path, finished: Run, units: Sequence[harness.Unit], cases: Sequence[Case]
) -> None:
  """The arrays of every row, and a heat map of the mass for every task and length."""
  groups = list(harness.grouped(finished, units, cases))
  arrays = {
    name: np.stack([np.mean([r[name] for r in results], axis=0) for *_, results in groups])
    for name in FIGURES
  }
  temporary = out / f".{os.getpid()}.{ARRAYS}"  # savez wants the suffix
  try:
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, out / ARRAYS)
  finally:
    temporary.unlink(missing_ok=True)
  for task, T in dict.fromkeys((task, T) for task, T, *_ in groups):
    panels = [
      (f"{case.spec.name} {'' if case.budget is None else case.budget}", arrays["mass"][i])
      for i, (its_task, its_T, case, _) in enumerate(groups)
      if (its_task, its_T) == (task, T)
    ]
    name = re.sub(r"\W+", "-", f"mass-{task}-{T}")
    plots.heatmaps(panels, out / f"{name}.png", label=plots.LABELS["mass"])
