"""The loop of every benchmark: batches of prompts, each finished once, then rows."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

from a2ats_jax.errors import UserError
from a2ats_jax.files import locked
from eval.options import Case, Progress
from eval.results import PREDICTIONS, Row, Run


@runtime_checkable
class Step(Protocol):
  """Called after each case of a batch, with what a progress bar may show."""

  def __call__(self, **figures: float) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """Prompts that run together.

  Attributes:
    task: their kind.
    T: length asked for.
    indices: which prompts of the task and length.
  """

  task: str
  T: int
  indices: tuple[int, ...]


def units_of(tasks: Iterable[str], lengths: Iterable[int], limit: int, batch: int) -> list[Unit]:
  """Batches of every task and length, short lengths first."""
  lengths = sorted(lengths)
  return [
    Unit(task=task, T=length, indices=tuple(range(start, min(start + batch, limit))))
    for length in lengths
    for task in tasks
    for start in range(0, limit, batch)
  ]


def _key(line: Row) -> tuple[str, int, int]:
  return line["task"], line["T"], line["index"]


def run_units(
  run: Run,
  units: Sequence[Unit],
  cases: Sequence[Case],
  measure: Callable[[Unit, Step], list[Row]],
  progress: Progress | None,
) -> None:
  """Measure the batches that have no lines yet.

  A batch some of whose lines are missing is repeated whole, so that a run that was cut off gives
  what an unbroken one gives.

  Args:
    measure: a batch to one line a prompt; it calls its second argument after each case.
  """
  phase = str(run.config["benchmark"])
  for line in run.lines:
    if len(line["results"]) != len(cases):
      raise UserError(f"{run.out}: {PREDICTIONS} is damaged; give another directory")
  keys = {unit: [(unit.task, unit.T, i) for i in unit.indices] for unit in units}
  there = {_key(line) for line in run.lines}
  done = {unit for unit in units if there.issuperset(keys[unit])}
  finished = {key for unit in done for key in keys[unit]}
  run.keep(lambda line: _key(line) in finished)
  total, steps = len(units) * len(cases), len(done) * len(cases)

  def step(**figures: float) -> None:
    nonlocal steps
    steps += 1
    if progress is not None:
      progress(phase, steps, total, **figures)

  if progress is not None:
    progress(phase, steps, total)
  with nullcontext() if run.out is None else locked(run.out):
    for unit in units:
      if unit not in done:
        run.append(measure(unit, step))


def grouped(
  run: Run, units: Sequence[Unit], cases: Sequence[Case]
) -> Iterator[tuple[str, int, Case, list[Row]]]:
  """The results of every task, length and case, in a fixed order whenever they were made."""
  lines = sorted(run.lines, key=lambda line: line["index"])
  for task, length in dict.fromkeys((unit.task, unit.T) for unit in units):
    mine = [line for line in lines if (line["task"], line["T"]) == (task, length)]
    for place, case in enumerate(cases):
      yield task, length, case, [line["results"][place] for line in mine]


def layers_of(progress: Progress | None) -> Callable[[int, int], None] | None:
  """The progress of a prefill, as its own phase."""
  return phase_of(progress, "prefill")


def phase_of(progress: Progress | None, phase: str) -> Callable[[int, int], None] | None:
  """A listener of one phase."""
  if progress is None:
    return None
  return lambda done, total: progress(phase, done, total)
