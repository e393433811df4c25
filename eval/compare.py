"""Methods side by side: several benchmarks over the same methods and budgets, in one table.

Each benchmark runs a prompt through the model once for all methods, and keeps its own directory
below the comparison's, so that a run that was stopped goes on where it was.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.files import write_atomically
from a2ats_jax.models.model import Model
from eval import fidelity, needle, plots, tables
from eval.options import (
  CommonOptions,
  Progress,
  cases_of,
  check_context,
  config_of,
  parse_methods,
)
from eval.results import Row, open_run
from train_codebooks.texts import Text

BENCHMARKS = ("fidelity", "needle")
TABLE = "table.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(CommonOptions):
  """What a comparison takes.

  Attributes:
    limit: texts of each kind, and needle prompts of each haystack.
    new: tokens fed after each text.
    answer: tokens generated at most for each needle.
    benchmarks: which of ``fidelity`` and ``needle``.
    haystacks: what needles are hidden in, as in :class:`eval.needle.NeedleOptions`.
  """

  methods: tuple[Any, ...] = parse_methods("all")
  budgets: tuple[Budget, ...] = (Budget(ratio=0.2), Budget(ratio=0.05))
  limit: int = 5
  answer: int = 16
  benchmarks: tuple[str, ...] = BENCHMARKS
  haystacks: tuple[str, ...] = ("noise", "prose")

  def __post_init__(self):
    super().__post_init__()
    if not self.benchmarks or set(self.benchmarks) - set(BENCHMARKS):
      given = ", ".join(self.benchmarks) or "none"
      raise UserError(f"benchmarks: expected {' or '.join(BENCHMARKS)}, got {given}")

  def of(self, benchmark: str) -> Any:
    """The options of one benchmark, below this run's directory."""
    shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(CommonOptions)}
    shared["out"] = self.out and self.out / benchmark
    if benchmark == "fidelity":
      return fidelity.FidelityOptions(**shared)
    return needle.NeedleOptions(**shared | {"new": self.answer}, haystacks=self.haystacks)


def run(
  model: Model,
  options: CompareOptions,
  kinds: Sequence[Text],
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Every benchmark over every method at every budget.

  Args:
    kinds: texts, and prose to hide needles in.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    The rows of :func:`side_by_side`. With ``out``, also ``metrics.json`` with the benchmarks' own
    rows, ``table.md``, and plots of quality against bytes.

  Raises:
    UserError: as the benchmarks, before any of them runs; or ``out`` holds another run.
  """
  each = {name: options.of(name) for name in options.benchmarks}
  for mine in each.values():
    check_context(model, mine)
  if "needle" in each:
    needle.make_prompts(model, each["needle"], kinds)
  cases = cases_of(options, codebooks)
  finished = open_run(options.out, config_of("compare", model, options, cases, codebooks))
  rows: list[Row] = []
  for name, mine in each.items():
    benchmark = fidelity.run if name == "fidelity" else needle.run
    rows += benchmark(model, mine, kinds, codebooks=codebooks, progress=progress)
  finished.finish(rows)
  merged = side_by_side(rows)
  if options.out is not None:
    write_atomically(options.out / TABLE, tables.markdown(merged, columns(merged)))
    _plot(rows, options.out)
  return merged


def side_by_side(rows: Sequence[Row]) -> list[Row]:
  """One row for each method, budget and length, with the figures of every task.

  What is read, moved and held is the mean over tasks, whose prompts differ a little in length.
  ``kl``, ``top1`` and ``score`` carry the task's name after a space.
  """
  who = ("T", "method", "options", "budget", "per")
  merged: dict[tuple[Any, ...], list[Row]] = {}
  for row in rows:
    merged.setdefault(tuple(row[name] for name in who), []).append(row)
  out = []
  for key, mine in merged.items():
    one: Row = {"benchmark": "compare", "model": mine[0]["model"]} | dict(zip(who, key))
    for name in ("read", "read_bytes", "moved_bytes", "device_bytes", "host_bytes"):
      there = [row[name] for row in mine if row.get(name) is not None]
      one[name] = sum(there) / len(there) if there else None
    for row in mine:
      for name in ("kl", "kl_se", "top1", "score"):
        if row.get(name) is not None:
          one[f"{name} {row['task']}"] = row[name]
    one["n"] = sum(row["n"] for row in mine)
    out.append(one)
  return out


def columns(rows: Sequence[Row]) -> list[str]:
  """The figures of merged rows, in the order of the table."""
  fixed = ["read", "read_bytes", "moved_bytes", "device_bytes", "host_bytes"]
  tasks = [name for row in rows for name in row if name.split()[0] in ("kl", "kl_se", "score")]
  return fixed + list(dict.fromkeys(tasks))


def _plot(rows: Sequence[Row], out: Path) -> None:
  """Quality against bytes read a step, and against bytes held on the device."""
  for benchmark, y in (("fidelity", "kl"), ("needle", "score")):
    mine = [row for row in rows if row["benchmark"] == benchmark]
    for x in ("read_bytes", "device_bytes") if mine else ():
      plots.pareto(mine, out / f"{y}-{x.replace('_', '-')}.png", x=x, y=y)
