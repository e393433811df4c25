"""A number hidden in a long prompt: does a method still read it out?

Every method answers the same prompts from the same prefill, greedily, see :mod:`eval.answers`. The
whole of RULER is in :mod:`eval.ruler`.
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.models.model import Model
from eval import answers, harness, plots, single_needle
from eval.options import Case, CommonOptions, Progress, cases_of, check_context, config_of, row_of
from eval.results import Row, open_run
from eval.ruler.scoring import match_all
from eval.single_needle import NeedlePrompt
from train_codebooks.texts import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleOptions(CommonOptions):
  """What the needle benchmark takes.

  Attributes:
    limit: prompts of each task and length; the depths take turns.
    new: tokens generated at most.
    haystacks: ``noise`` (RULER's sentences) and ``prose`` (a task for each text given).
    depths: 0 at the beginning of the haystack, 1 at its end.
    chat: use the model's chat template.
  """

  limit: int = 5
  new: int = 16
  haystacks: tuple[str, ...] = ("noise",)
  depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
  chat: bool = False

  def __post_init__(self):
    super().__post_init__()
    if not self.haystacks or set(self.haystacks) - {"noise", "prose"}:
      raise UserError(
        f"haystacks: expected noise or prose, got {', '.join(self.haystacks) or 'none'}"
      )
    if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
      raise UserError(f"depths: expected numbers in [0, 1], got {self.depths}")


def make_prompts(
  model: Model, options: NeedleOptions, kinds: Sequence[Text]
) -> dict[tuple[str, int], list[NeedlePrompt]]:
  """The prompts of every task and length, the same for the same seed.

  Args:
    kinds: prose; unused without the prose haystack.

  Raises:
    UserError: a length that does not hold the question, a text too short, no chat template.
  """
  if options.chat and not model.tokenizer.has_chat:
    raise UserError("chat: this model has no chat template")
  prompts: dict[tuple[str, int], list[NeedlePrompt]] = {}
  tasks: list[tuple[str, list[str] | None]] = []
  if "noise" in options.haystacks:
    tasks.append(("niah-noise", None))
  if "prose" in options.haystacks:
    if not kinds:
      raise UserError("haystacks: prose needs a text, got none")
    tasks += [(f"niah-{kind.name}", single_needle.sentences_of(kind)) for kind in kinds]
  for task, sentences in tasks:
    for T in options.T:
      prompts[task, T] = [
        _prompt(model, options, task, sentences, T, index) for index in range(options.limit)
      ]
  return prompts


def _prompt(
  model: Model, options: NeedleOptions, task: str, sentences: list[str] | None, T: int, index: int
) -> NeedlePrompt:
  rng = random.Random(f"{options.seed} {task} {T} {index}")
  context, most = single_needle.noise_haystack(), T
  if sentences is not None:
    first = single_needle.first_sentence(sentences, model.tokenizer, T, rng)
    context, most = single_needle.prose_haystack(sentences, first), len(sentences) - first
  return single_needle.fit(
    context,
    model.tokenizer,
    rng,
    T=T,
    depth=options.depths[index % len(options.depths)],
    chat=options.chat,
    most=most,
  )


def run(
  model: Model,
  options: NeedleOptions,
  kinds: Sequence[Text] = (),
  *,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  progress: Progress | None = None,
) -> list[Row]:
  """Answer every prompt with every method at every budget.

  Args:
    kinds: prose haystacks.
    codebooks: of all layers by name, for methods that need one.

  Returns:
    Rows with ``score``, the share of needles found (0 to 1); RULER prints it times 100.

  Raises:
    UserError: see :func:`make_prompts`; also lengths beyond the model's context, codebooks missing,
      or ``out`` holding another run.
  """
  check_context(model, options)
  cases = cases_of(options, codebooks)
  prompts = make_prompts(model, options, kinds)
  config = config_of("needle", model, options, cases, codebooks)
  if "prose" in options.haystacks:
    config["texts"] = {kind.name: kind.sha256 for kind in kinds}
  finished = open_run(options.out, config)
  tasks = dict.fromkeys(task for task, _ in prompts)
  units = harness.units_of(tasks, options.T, options.limit, options.batch)

  def measure(unit: harness.Unit, step: harness.Step) -> list[Row]:
    mine = [prompts[unit.task, unit.T][index] for index in unit.indices]
    return _measure(model, unit, cases, mine, options, progress, step)

  harness.run_units(finished, units, cases, measure, progress)
  rows = [
    row_of(
      "needle", task, model, case, T, options, n=len(results), figures=answers.summary(results)
    )
    for task, T, case, results in harness.grouped(finished, units, cases)
  ]
  finished.finish(rows)
  if options.out is not None:
    plots.plot(rows, options.out / "score.png", y="score")
  return rows


def _measure(
  model: Model,
  unit: harness.Unit,
  cases: Sequence[Case],
  prompts: Sequence[NeedlePrompt],
  options: NeedleOptions,
  progress: Progress | None,
  step: harness.Step,
) -> list[Row]:
  results = answers.scored(
    model,
    cases,
    [prompt.ids for prompt in prompts],
    lambda row, text: match_all(text, [prompts[row].answer]),
    new=options.new,
    step=lambda score: step(T=float(unit.T), score=score),
    progress=progress,
  )
  return [
    {
      "task": unit.task,
      "T": unit.T,
      "index": index,
      "depth": prompt.depth,
      "tokens": len(prompt.ids),
      "answer": prompt.answer,
      "results": result,
    }
    for index, prompt, result in zip(unit.indices, prompts, results)
  ]
