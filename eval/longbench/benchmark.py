"""LongBench's datasets answered by every method: prompts first, then batches of like length."""

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.models.model import Model
from eval import harness, plots
from eval.answers import answers, summary
from eval.longbench import data, metrics
from eval.longbench.data import Prompt
from eval.longbench.tasks import tasks
from eval.longbench.widths import width_of
from eval.metrics import spread
from eval.options import Case, CommonOptions, Progress, cases_of, config_of, row_of
from eval.results import Row, open_run

AVERAGE = "average"  # the task of the rows over all datasets


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongbenchOptions(CommonOptions):
  """What the LongBench benchmark takes.

  Attributes:
    T: tokens of a prompt's text at most; a longer one loses its middle.
    limit: prompts of each dataset, drawn by the seed; all where a file has fewer.
    new: tokens generated at most; LongBench's own number for a dataset where that is less.
    data: folder of LongBench's JSONL files.
    datasets: names; none for every one that has a file.
    chat: use the chat template, where the model has one and the dataset is for it.
  """

  limit: int = 500
  new: int = 512
  data: Path
  datasets: tuple[str, ...] = ()
  chat: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """Prompts that run together.

  Attributes:
    width: slots of the prompts.
    new: tokens generated at most.
  """

  unit: harness.Unit
  prompts: tuple[Prompt, ...]
  width: int
  new: int

  @property
  def shape(self) -> tuple[int, int, int]:
    """Rows, slots of the prompts and new tokens: what every method compiles anew."""
    return len(self.prompts), self.width, self.new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """Everything a run will ask.

  Attributes:
    batches: shortest prompts of a dataset first.
    hashes: SHA-256 of each dataset's file.
    chat: whether the chat template is used.
  """

  batches: tuple[Batch, ...]
  hashes: Mapping[str, str]
  chat: bool

  @property
  def summary(self) -> str:
    """How much there is to do, in a line."""
    prompts = sum(len(batch.prompts) for batch in self.batches)
    return (
      f"{prompts} prompts of {len(self.hashes)} datasets in {len(self.batches)} batches of "
      f"{len({batch.shape for batch in self.batches})} shapes, each compiled once for every method"
    )


def prepare(model: Model, options: LongbenchOptions, progress: Progress | None = None) -> Work:
  """Read the files, cut and tokenise the prompts, and put those of like length into batches.

  Raises:
    UserError: see :func:`eval.longbench.data.datasets_in` and :func:`eval.longbench.data.read`;
      also a package missing for a dataset's metric, or a prompt that with its new tokens exceeds
      the model's context.
  """
  names = data.datasets_in(options.data, options.datasets)
  for name in names:
    metrics.check(tasks()[name].metric)
  chat = options.chat and model.tokenizer.has_chat
  hashes: dict[str, str] = {}
  prompts: dict[tuple[str, int], list[tuple[int, Prompt]]] = {}
  for done, name in enumerate(names):
    if progress is not None:
      progress("tokenize", done, len(names))
    task = tasks()[name]
    items, hashes[name] = data.read(options.data / f"{name}.jsonl", task)
    drawn = list(range(len(items)))
    random.Random(f"{options.seed} {name}").shuffle(drawn)
    for T in options.T:
      prompts[name, T] = []
      for index in drawn[: options.limit]:
        item, text = items[index]
        prompt = data.prompt_of(item, text, model.tokenizer, T=T, chat=chat and task.chat)
        _check(model, prompt, min(task.new, options.new))
        prompts[name, T].append((index, prompt))
  if progress is not None:
    progress("tokenize", len(names), len(names))
  return Work(batches=tuple(_batches(prompts, options)), hashes=hashes, chat=chat)


def _check(model: Model, prompt: Prompt, new: int) -> None:
  count, context = len(prompt.ids), model.config.context
  if count < 2:
    raise UserError(f"{prompt.item.where}: the prompt has {count} tokens, expected 2 or more")
  if count + new > context:
    raise UserError(
      f"T: a prompt of {count} tokens ({prompt.item.where}) and {new} new ones exceed the model's "
      f"context of {context}; give a smaller T"
    )


def _batches(
  prompts: Mapping[tuple[str, int], Sequence[tuple[int, Prompt]]], options: LongbenchOptions
) -> Iterable[Batch]:
  longest = max(len(prompt.ids) - 1 for mine in prompts.values() for _, prompt in mine)
  for (name, T), mine in sorted(prompts.items(), key=lambda entry: entry[0][1]):
    ranked = sorted(mine, key=lambda entry: (len(entry[1].ids), entry[0]))
    for start in range(0, len(ranked), options.batch):
      indices, together = zip(*ranked[start : start + options.batch])
      yield Batch(
        unit=harness.Unit(task=name, T=T, indices=indices),
        prompts=together,
        width=width_of(len(together[-1].ids) - 1, longest),
        new=min(tasks()[name].new, options.new),
      )


def run(
  model: Model,
  options: LongbenchOptions,
  work: Work,
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Answer every prompt with every method at every budget.

  Args:
    work: from :func:`prepare` with the same model and options.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    Rows with ``score``, the mean of LongBench's metric (0 to 1; LongBench prints it times 100), for
    each dataset; with more than one dataset also of task ``average``, the mean over datasets.

  Raises:
    UserError: codebooks missing, or ``out`` holding another run.
  """
  cases = cases_of(options, codebooks, beside=("full",))
  config = config_of("longbench", model, options, cases, codebooks)
  config |= {"data": dict(work.hashes), "datasets": list(work.hashes), "chat": work.chat}
  finished = open_run(options.out, config)
  batches = {batch.unit: batch for batch in work.batches}

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    return _measure(model, batches[unit], cases, progress, step)

  harness.run_units(finished, list(batches), cases, measure, progress)
  rows = [
    row_of("longbench", task, model, case, T, options, n=len(results), figures=summary(results))
    for task, T, case, results in harness.grouped(finished, list(batches), cases)
  ]
  if len(work.hashes) > 1:
    rows += averages(rows)
  finished.finish(rows)
  if options.out is not None:
    shown = [row for row in rows if row["task"] == AVERAGE] or rows
    plots.plot(shown, options.out / "score.png", y="score")
  return rows


def _measure(
  model: Model,
  batch: Batch,
  cases: Sequence[Case],
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  unit, task = batch.unit, tasks()[batch.unit.task]
  lines: list[Row] = [
    {
      "task": unit.task,
      "T": unit.T,
      "index": index,
      "id": prompt.item.id,
      "length": prompt.item.length,
      "tokens": len(prompt.ids),
      "answers": list(prompt.item.answers),
      "classes": list(prompt.item.classes),
      "results": [],
    }
    for index, prompt in zip(unit.indices, batch.prompts)
  ]
  stop = list(model.tokenizer.eos_ids)
  if task.one_line:
    stop.append(model.tokenizer.encode("\n", special=False)[-1])
  every = answers(
    model,
    cases,
    [prompt.ids.tolist() for prompt in batch.prompts],
    new=batch.new,
    width=batch.width,
    stop=stop,
    some=task.one_line,
    progress=progress,
  )
  for results in every:
    for line, result in zip(lines, results):
      score = task.score(result["prediction"], line["answers"], line["classes"])
      line["results"].append(result | {"score": score})
    step(T=float(unit.T), score=spread([line["results"][-1]["score"] for line in lines])[0])
  return lines


_FIGURES = ("read", "selected", "moved_bytes", "read_bytes", "tail", "device_bytes", "host_bytes")


def _means(rows: Sequence[Row]) -> Row:
  """Means of the figures that all the rows have."""
  shared = [name for name in _FIGURES if all(name in row for row in rows)]
  return {name: spread([float(row[name]) for row in rows])[0] for name in shared}


def averages(rows: Sequence[Row]) -> list[Row]:
  """A row for every length and case: means over datasets, each of the same weight."""
  groups: dict[tuple[object, ...], list[Row]] = {}
  for row in rows:
    who = ("T", "method", "options", "budget", "per")
    groups.setdefault(tuple(row[name] for name in who), []).append(row)
  out = []
  for mine in groups.values():
    figures = _means(mine) | {"score": spread([row["score"] for row in mine])[0]}
    errors = [row["score_se"] for row in mine]
    known = None if None in errors else math.hypot(*errors) / len(errors)
    figures |= {"score_std": None, "score_se": known}
    n = sum(row["n"] for row in mine)
    out.append(
      {k: v for k, v in mine[0].items() if k not in _FIGURES} | {"task": AVERAGE, "n": n} | figures
    )
  return out
