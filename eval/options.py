"""Options every benchmark shares, and the methods and budgets they ask for."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.methods import registry
from a2ats_jax.methods.base import Method
from a2ats_jax.methods.registry import MethodSpec
from a2ats_jax.models.model import Model
from eval.ablation import TABLE
from eval.results import Row
from train_codebooks.progress import Progress as Progress  # one listener serves both applications


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
  """Methods of the registry and the ablations, see :func:`registry.parse_methods`."""
  return registry.parse_methods(text, TABLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions:
  """What every benchmark takes.

  Attributes:
    methods: full and oracle are added where missing.
    budgets: each method that selects runs under every one.
    T: lengths of prompts or texts, tokens.
    limit: prompts of each task and length.
    batch: prompts run at once.
    seed: of everything that is drawn.
    out: directory of the run; None writes nothing.
  """

  methods: tuple[MethodSpec, ...] = parse_methods("full,oracle,a2ats,a2ats-plus")
  budgets: tuple[Budget, ...] = (Budget(ratio=0.03), Budget(ratio=0.01))
  T: tuple[int, ...] = (4096,)
  limit: int = 4
  batch: int = 1
  seed: int = 0
  out: Path | None = None

  def __post_init__(self):
    for name in ("limit", "batch"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
    if self.seed < 0:
      raise UserError(f"seed: expected 0 or more, got {self.seed}")
    for name in ("methods", "budgets", "T"):
      values = getattr(self, name)
      if not values:
        raise UserError(f"{name}: expected at least one, got none")
      for value in values:
        if values.count(value) > 1:
          raise UserError(f"{name}: {value} is named twice")
    if min(self.T) < 2:
      raise UserError(f"T: expected at least 2 tokens, got {min(self.T)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions(BaseOptions):
  """What benchmarks take that decode some tokens after each prompt.

  Attributes:
    new: tokens decoded after each prompt.
  """

  new: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.new < 1:
      raise UserError(f"new: expected at least 1, got {self.new}")


def check_context(model: Model, options: CommonOptions) -> None:
  """Refuse prompts that with their new tokens exceed the model's context."""
  if max(options.T) + options.new > model.config.context:
    raise UserError(
      f"T: {max(options.T)} tokens and {options.new} new ones exceed the model's context of "
      f"{model.config.context}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A method at a budget.

  Attributes:
    budget: None for a method that reads every token.
  """

  spec: MethodSpec
  budget: Budget | None
  method: Method

  @property
  def identity(self) -> Row:
    """``method``, ``options``, ``budget`` and who is granted it (``per``), as rows spell them."""
    budget = self.budget
    return {
      "method": self.spec.name,
      "options": self.spec.options_text,
      "budget": None if budget is None else budget.tokens if budget.ratio is None else budget.ratio,
      "per": None if budget is None else budget.per,
    }


def cases_of(
  options: BaseOptions,
  codebooks: Mapping[str, Codebook],
  *,
  beside: Sequence[str] = ("full", "oracle"),
) -> list[Case]:
  """Every method under every budget: full first, then the oracle, then what was asked for.

  Args:
    beside: methods that run whether they were asked for or not.

  Raises:
    UserError: a method needs codebooks and there are none, or an option is out of range.
  """
  asked = list(options.methods)
  named = [spec.name for spec in asked]
  missing = [n for n in beside if n not in named]
  specs = [registry.parse_method(name, TABLE) for name in missing] + asked
  rank = {"full": 0, "oracle": 1}
  cases = []
  for spec in sorted(specs, key=lambda spec: rank.get(spec.name, 2)):
    budgets = options.budgets if TABLE[spec.name].takes_budget else (None,)
    for budget in budgets:
      method = registry.build(spec, budget=budget, codebooks=codebooks, table=TABLE)
      cases.append(Case(spec=spec, budget=budget, method=method))
  return cases


def config_of(
  benchmark: str,
  model: Model,
  options: BaseOptions,
  cases: Sequence[Case],
  codebooks: Mapping[str, Codebook],
) -> Row:
  """Everything shared that decides a run's results, as JSON types."""
  fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
  del fields["out"]
  named = [value for case in cases for key, value in case.spec.options if key == "profile"]
  profiles = {path: _file_hash(path) for path in dict.fromkeys(named) if path != "uniform"}
  return {
    "benchmark": benchmark,
    "model": {
      "name": model_name(model),
      "fingerprint": model.fingerprint,
      "tokenizer_sha256": model.tokenizer.sha256,
    },
    "codebook_sha256": {name: codebook_hash(book) for name, book in codebooks.items()},
    **({"profile_sha256": profiles} if profiles else {}),
    **fields,
    "methods": list(dict.fromkeys(str(case.spec) for case in cases)),
    "budgets": [str(budget) for budget in options.budgets],
    "T": list(options.T),
  }


def _file_hash(path: str) -> str:
  return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def model_name(model: Model) -> str:
  """The last part of where a model was read from, without the suffix of a GGUF file."""
  path = Path(model.source)
  return path.stem if path.suffix == ".gguf" else path.name


def codebook_hash(codebook: Codebook) -> str:
  """Identity of codebooks: codewords and metric."""
  digest = hashlib.sha256(np.asarray(codebook.codewords).tobytes())
  digest.update(np.asarray(codebook.whitener).tobytes())
  return digest.hexdigest()


def row_of(
  benchmark: str,
  task: str,
  model: Model,
  case: Case,
  T: int,
  options: BaseOptions,
  *,
  n: int,
  figures: Row,
) -> Row:
  """A flat row: who and where, the figures, how many and which seed."""
  return {
    "benchmark": benchmark,
    "task": task,
    "model": model_name(model),
    "method": case.spec.name,
    "options": case.spec.options_text,
    "T": T,
    "batch": options.batch,
    "dtype": "float32",
    "budget": case.identity["budget"],
    "per": case.identity["per"],
    **figures,
    "n": n,
    "seed": options.seed,
  }
