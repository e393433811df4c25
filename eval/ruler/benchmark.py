"""RULER: every task's prompts answered by every method at every budget and length.

Everything runs as in the needle benchmark, see :mod:`eval.answers`. Prompts of one length are
padded to one width and their states have room for the longest answer: all tasks share programs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.models.model import Model
from eval import answers, harness, plots
from eval.options import CommonOptions, Progress, cases_of, config_of, row_of
from eval.results import Row, open_run
from eval.ruler.documents import read_hotpotqa, read_squad
from eval.ruler.fitting import Prompt, fit
from eval.ruler.haystack import sentences_of
from eval.ruler.question import Material, Place
from eval.ruler.tasks import TASKS
from eval.ruler.vocabulary import english
from train_codebooks.texts import Text

AVERAGE = "average"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerOptions(CommonOptions):
  """What the benchmark takes.

  Attributes:
    T: tokens of a prompt and of its answer together, as RULER counts.
    limit: prompts of each task and length.
    new: tokens a state has room for; each task generates its own number at most.
    tasks: names in :data:`eval.ruler.tasks.TASKS`.
    chat: use the model's chat template.
  """

  new: int = dataclasses.field(default=max(task.new for task in TASKS.values()), init=False)
  tasks: tuple[str, ...] = tuple(TASKS)
  chat: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name in self.tasks:
      if name not in TASKS:
        raise UserError(f"tasks: expected some of {', '.join(TASKS)}, got {name!r}")
      if self.tasks.count(name) > 1:
        raise UserError(f"tasks: {name} is named twice")
    if not self.tasks:
      raise UserError("tasks: expected at least one, got none")


def gather(kinds: Sequence[Text], squad: Path | None, hotpotqa: Path | None) -> Material:
  """What prompts are made of: texts as one haystack, words, and the files there are.

  Raises:
    UserError: no text, the words' package is missing, or a file cannot be used.
  """
  if not kinds:
    raise UserError("text: expected at least one, got none")
  words = english()
  documents = {
    "squad": None if squad is None else read_squad(squad),
    "hotpotqa": None if hotpotqa is None else read_hotpotqa(hotpotqa),
  }
  return Material(
    sentences=tuple(sentences_of("\n\n".join(kind.text for kind in kinds))),
    words=words,
    hashes={f"text {kind.name}": kind.sha256 for kind in kinds}
    | {"words": words.sha256}
    | {name: file.sha256 for name, file in documents.items() if file is not None},
    **documents,
  )


def not_run(options: RulerOptions, material: Material) -> dict[str, str]:
  """The tasks that were asked for and cannot run, and what each needs."""
  return {
    name: f"needs --{TASKS[name].file} FILE"
    for name in options.tasks
    if not TASKS[name].runs(material)
  }


def make_prompts(
  model: Model, options: RulerOptions, material: Material, progress: Progress | None = None
) -> dict[tuple[str, int], list[Prompt]]:
  """The prompts of every task that can run and of every length.

  Each depends on the seed, the task, the length and its index alone, for one tokenizer and one
  material.

  Raises:
    UserError: no task can run, a length is too short for a task or beyond the model's context, a
      text or a file holds too little, or there is no chat template.
  """
  if options.chat and not model.tokenizer.has_chat:
    raise UserError("chat: this model has no chat template")
  if max(options.T) > model.config.context:
    raise UserError(
      f"T: {max(options.T)} tokens exceed the model's context of {model.config.context}"
    )
  missing = not_run(options, material)
  tasks = [name for name in options.tasks if name not in missing]
  if not tasks:
    lacks = ", ".join(f"{name} {reason}" for name, reason in missing.items())
    raise UserError(f"tasks: none of those asked for can run: {lacks}")
  places = [
    Place(
      seed=options.seed,
      task=task,
      T=T,
      index=index,
      material=material,
      tokenizer=model.tokenizer,
    )
    for T in sorted(options.T)
    for task in tasks
    for index in range(options.limit)
  ]
  prompts: dict[tuple[str, int], list[Prompt]] = {}
  for done, place in enumerate(places):
    if progress is not None:
      progress("prompts", done, len(places))
    new = TASKS[place.task].new
    prompts.setdefault((place.task, place.T), []).append(
      fit(TASKS[place.task].source(place), place, new=new, chat=options.chat)
    )
  if progress is not None:
    progress("prompts", len(places), len(places))
  return prompts


def run(
  model: Model,
  options: RulerOptions,
  material: Material,
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Answer every prompt with every method at every budget.

  Args:
    material: from :func:`gather`; ``qa_1`` and ``qa_2`` do not run without their files.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    Rows with ``score``, 0 to 1 (RULER prints it times 100), and ``tokens``, the prompts' mean
    length; after the tasks of a length the rows of their ``average``, with how many ``tasks`` it is
    over. The config names what did not run.

  Raises:
    UserError: see :func:`make_prompts`; also codebooks missing, or ``out`` holding another run.
  """
  cases = cases_of(options, codebooks, beside=("full",))
  prompts = make_prompts(model, options, material, progress)
  tasks = list(dict.fromkeys(task for task, _ in prompts))
  config = config_of("ruler", model, options, cases, codebooks)
  config |= {
    "generated": {task: TASKS[task].new for task in tasks},
    "not_run": not_run(options, material),
    "material": dict(material.hashes),
  }
  finished = open_run(options.out, config)
  units = harness.units_of(tasks, options.T, options.limit, options.batch)
  widths = {T: _width(model, [prompts[task, T] for task in tasks]) for T in options.T}

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    task = TASKS[unit.task]
    mine = [prompts[unit.task, unit.T][index] for index in unit.indices]
    results = answers.scored(
      model,
      cases,
      [prompt.ids for prompt in mine],
      lambda row, text: task.score(text, mine[row].answers),
      new=task.new,
      room=options.new,
      width=widths[unit.T],
      step=lambda score: step(T=float(unit.T), score=score),
      progress=progress,
    )
    return [
      {
        "task": unit.task,
        "T": unit.T,
        "index": index,
        "tokens": len(prompt.ids),
        "answers": list(prompt.answers),
        "results": result,
      }
      for index, prompt, result in zip(unit.indices, mine, results)
    ]

  harness.run_units(finished, units, cases, measure, progress)
  rows: list[Row] = []
  for T in sorted(options.T):
    of_length = [unit for unit in units if unit.T == T]
    figures: list[list[Row]] = [[] for _ in cases]
    for place, (task, _, case, results) in enumerate(harness.grouped(finished, of_length, cases)):
      sizes = [len(prompt.ids) for prompt in prompts[task, T]]
      mine = answers.summary(results) | {"tokens": sum(sizes) / len(sizes)}
      figures[place % len(cases)].append(mine)
      rows.append(row_of("ruler", task, model, case, T, options, n=len(results), figures=mine))
    for case, mine in zip(cases, figures):
      n = options.limit * len(tasks)
      rows.append(row_of("ruler", AVERAGE, model, case, T, options, n=n, figures=_average(mine)))
  finished.finish(rows)
  if options.out is not None:
    plots.plot(
      [row for row in rows if row["task"] == AVERAGE], options.out / "score.png", y="score"
    )
  return rows


def _width(model: Model, prompts: Sequence[Sequence[Prompt]]) -> int:
  """Columns that hold any of these prompts but for its last token."""
  ids = [prompt.ids[:-1] for of_task in prompts for prompt in of_task]
  return pad_prompts([max(ids, key=len)], model.config, new=0)[0].shape[1]


def _average(tasks: Sequence[Row]) -> Row:
  """Means over tasks, each task counting alike, and the standard error of the mean score."""
  names = [n for n in tasks[0] if n not in ("score_std", "score_se") and all(n in t for t in tasks)]
  figures: Row = {name: sum(task[name] for task in tasks) / len(tasks) for name in names}
  errors = [task["score_se"] for task in tasks]
  known = None not in errors
  figures["score_se"] = math.hypot(*errors) / len(tasks) if known else None
  return figures | {"tasks": len(tasks)}
