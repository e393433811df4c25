"""The benchmarks as commands."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from a2ats_jax.bars import Bars
from a2ats_jax.cli_args import MethodArgs, codebooks, load, note, numbers, report
from a2ats_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(MethodArgs):
  """What every benchmark takes."""

  methods: str = "full,oracle,a2ats,a2ats-plus"
  """KV methods, comma-separated, with options as in a2ats-plus:far=segments(16). Full attention
  and the oracle are always run beside them."""
  T: str = "4096"
  """Prompt lengths in tokens, comma-separated."""
  budget: str = "0.03,0.01"
  """Far tokens a query head reads: below 1 (and 1 itself) a share of the context, from 2 on a
  number of tokens; comma-separated."""
  limit: int = 4
  """Prompts of each kind and length."""
  batch: int = 1
  """Prompts run at once."""
  seed: int = 0
  """Of everything that is drawn."""
  out: Path | None = None
  """Directory for config.yaml, metrics.json, predictions.jsonl and plots; a killed run goes on."""
  json: bool = False
  """Print the result rows as JSON lines on stdout instead of a table."""

  def shared(self) -> dict[str, Any]:
    """The options that all benchmarks share, parsed."""
    from a2ats_jax.budget import Budget
    from eval.options import parse_methods

    return {
      "methods": parse_methods(self.methods),
      "budgets": tuple(Budget.parse(part) for part in self.budget.split(",")),
      "T": numbers("T", self.T),
      "limit": self.limit,
      "batch": self.batch,
      "seed": self.seed,
      "out": self.out,
    }

  def report(self, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a table on stdout, or as JSON lines."""
    report(rows, json=self.json, out=self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBenchmark(Benchmark):
  """What every benchmark over prose takes."""

  text: tuple[Path, ...] = ()
  """UTF-8 files of prose, each its own kind. Default: held-out reference text of CPython."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fidelity(TextBenchmark):
  """How far next-token distributions are from full attention's on held-out text."""

  new: int = 32
  """Tokens fed after each prompt."""

  def run(self) -> None:
    from eval import fidelity, texts

    options = fidelity.FidelityOptions(**self.shared(), new=self.new)
    kinds, model = texts.gather(self.text), load(self)
    with Bars() as bars:
      rows = fidelity.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(TextBenchmark):
  """What share of true attention, and of the true top tokens, a selection catches."""

  new: int = 32
  """Tokens fed after each prompt."""

  def run(self) -> None:
    from eval import recall, texts

    options = recall.RecallOptions(**self.shared(), new=self.new)
    kinds, model = texts.gather(self.text), load(self)
    with Bars() as bars:
      rows = recall.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(TextBenchmark):
  """RULER's single needle in noise and in prose at several depths: is the number still found?"""

  new: int = 16
  """Tokens generated for each answer at most."""
  limit: int = 5
  """Prompts of each haystack and length; the depths take turns."""
  haystacks: str = "noise,prose"
  """What the needle is hidden in: noise (RULER's sentences), prose (--text), or both."""
  depths: str = "0.1,0.3,0.5,0.7,0.9"
  """Where it is hidden, 0 at the beginning of the haystack to 1 at its end."""
  chat: bool = False
  """Ask through the model's chat template."""

  def run(self) -> None:
    from eval import needle, texts

    try:
      depths = tuple(float(part) for part in self.depths.split(","))
    except ValueError:
      raise UserError(f"depths: expected numbers in [0, 1], got {self.depths!r}") from None
    options = needle.NeedleOptions(
      **self.shared(),
      new=self.new,
      haystacks=tuple(self.haystacks.split(",")),
      depths=depths,
      chat=self.chat,
    )
    kinds, model = texts.gather(self.text), load(self)
    with Bars() as bars:
      rows = needle.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ruler(TextBenchmark):
  """RULER's thirteen tasks: needles, variable tracking, word counts, questions about documents."""

  methods: str = "full,oracle,a2ats,a2ats-plus"
  """KV methods, comma-separated, with options as in a2ats-plus:far=segments(16). Full attention is
  always run beside them, the oracle where it is named."""
  T: str = "4096"
  """Tokens of a prompt and of its answer together, as RULER counts them, comma-separated."""
  limit: int = 4
  """Prompts of each task and length."""
  tasks: str = "all"
  """RULER's names, comma-separated. Default: all thirteen, less the qa tasks whose file is not
  given."""
  chat: bool = False
  """Ask through the model's chat template."""
  squad: Path | None = None
  """A file in the format of SQuAD 2.0, such as dev-v2.0.json, for qa_1."""
  hotpotqa: Path | None = None
  """A file in the format of HotpotQA, such as hotpot_dev_distractor_v1.json, for qa_2."""

  def run(self) -> None:
    from eval import texts
    from eval.ruler import benchmark
    from eval.ruler.tasks import TASKS

    options = benchmark.RulerOptions(
      **self.shared(),
      tasks=tuple(TASKS) if self.tasks == "all" else tuple(self.tasks.split(",")),
      chat=self.chat,
    )
    material = benchmark.gather(texts.gather(self.text), self.squad, self.hotpotqa)
    model = load(self)
    with Bars() as bars:
      rows = benchmark.run(
        model, options, material, codebooks=codebooks(self, model), progress=bars
      )
    self.report(rows)
    for name, reason in benchmark.not_run(options, material).items():
      line = f"not run: {name} {reason}"
      if self.json:
        note(line)
      else:
        print(line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Longbench(Benchmark):
  """LongBench, from its files: questions, summaries, few-shot tasks, retrieval, counting, code."""

  methods: str = "full,oracle,a2ats,a2ats-plus"
  """KV methods, comma-separated, with options as in a2ats-plus:far=segments(16). Full attention is
  always run beside them, the oracle where it is named."""
  data: Path
  """Directory with LongBench's files, a dataset each: qasper.jsonl, hotpotqa.jsonl, ..."""
  datasets: str = ""
  """Which ones, comma-separated. Default: every one that has a file."""
  T: str = "4096"
  """Tokens of a prompt at most, comma-separated; a longer prompt loses its middle. The tokens of a
  chat template come on top."""
  limit: int = 500
  """Prompts of each dataset, drawn by the seed; no dataset has more than 500."""
  new: int = 512
  """Tokens generated for each answer at most; LongBench's own number (32 to 512) where that is
  less."""
  chat: bool = True
  """Ask through the model's chat template, if it has one; few-shot and code never are."""

  def run(self) -> None:
    from eval.longbench import benchmark

    options = benchmark.LongbenchOptions(
      **self.shared(),
      new=self.new,
      data=self.data,
      datasets=tuple(filter(None, self.datasets.split(","))),
      chat=self.chat,
    )
    model = load(self)
    books = codebooks(self, model)
    with Bars() as bars:
      work = benchmark.prepare(model, options, progress=bars)
    note(work.summary)
    with Bars() as bars:
      rows = benchmark.run(model, options, work, codebooks=books, progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(TextBenchmark):
  """Perplexity on long text by position, beside that of full attention."""

  T: str = "4096"
  """Lengths of texts in tokens, comma-separated; --prompt of them are the prompt."""
  prompt: int = 1024
  """Tokens of a text whose attention is exact; the others are fed one by one."""
  buckets: str = "4"
  """Ranges of positions to average over: a number of equal parts, or their edges in tokens from the
  text's beginning, as in 1024,2048,4096."""
  limit: int = 4
  """Texts of each kind and length."""
  kl: bool = False
  """Also compare distributions with full attention's, which is then fed beside every method."""
  kinds: str = "text"
  """Of text, comma-separated: text (--text), code (CPython's own source) and identifiers (random
  UUIDs)."""

  def run(self) -> None:
    from eval import perplexity, texts
    from eval.buckets import Buckets

    options = perplexity.PerplexityOptions(
      **self.shared(),
      prompt=self.prompt,
      buckets=Buckets.parse(self.buckets),
      kl=self.kl,
    )
    tokens = self.limit * (max(options.T) + 1)
    kinds = texts.gather_kinds(self.kinds.split(","), self.text, tokens=tokens, seed=self.seed)
    model = load(self)
    with Bars() as bars:
      rows = perplexity.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation(TextBenchmark):
  """How far methods drift from full attention over a long text that full attention generates."""

  T: str = "1024"
  """Prompt lengths in tokens, comma-separated."""
  new: int = 1024
  """Tokens generated after each prompt; an end-of-text token does not end them."""
  buckets: str = "4"
  """Ranges of generated tokens to average over: a number of equal parts, or their edges, as in
  0,256,1024."""
  temperature: float = 0.0
  """Above 0, tokens are drawn, for every method with the same draws; 0 is greedy."""
  kinds: str = "text,code,identifiers"
  """Of prompts, comma-separated: text (--text), code (CPython's own source) and identifiers (random
  UUIDs)."""
  recall: bool = False
  """Also what share of true attention A2ATS and the oracle read; other methods cannot be asked."""

  def run(self) -> None:
    from a2ats_jax.sampling import Sampling
    from eval import generation, texts
    from eval.buckets import Buckets

    options = generation.GenerationOptions(
      **self.shared(),
      new=self.new,
      buckets=Buckets.parse(self.buckets),
      sampling=Sampling(temperature=self.temperature),
      recall=self.recall,
    )
    tokens = self.limit * max(options.T)
    kinds = texts.gather_kinds(self.kinds.split(","), self.text, tokens=tokens, seed=self.seed)
    model = load(self)
    with Bars() as bars:
      rows = generation.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    self.report(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(TextBenchmark):
  """All methods side by side: closeness, needles, and bytes read, moved and held, in one table."""

  methods: str = "all"
  """KV methods, comma-separated, with options; all is every method but the reference. Full
  attention and the oracle are always run beside them."""
  budget: str = "0.2,0.05"
  """Tokens kept or read: below 1 (and 1 itself) a share of the context, from 2 on a number of
  tokens; comma-separated. Methods without a budget run once."""
  limit: int = 5
  """Texts of each kind, and needle prompts of each haystack."""
  benchmarks: str = "fidelity,needle"
  """What is measured: fidelity, needle, or both."""
  new: int = 32
  """Tokens fed after each text."""
  answer: int = 16
  """Tokens generated for each needle at most."""
  haystacks: str = "noise,prose"
  """What needles are hidden in: noise (RULER's sentences), prose (--text), or both."""

  def run(self) -> None:
    from eval import compare, tables, texts

    options = compare.CompareOptions(
      **self.shared(),
      new=self.new,
      answer=self.answer,
      benchmarks=tuple(self.benchmarks.split(",")),
      haystacks=tuple(self.haystacks.split(",")),
    )
    kinds, model = texts.gather(self.text), load(self)
    with Bars() as bars:
      rows = compare.run(model, options, kinds, codebooks=codebooks(self, model), progress=bars)
    if self.json:
      self.report(rows)
    else:
      tables.console().print(tables.table(rows, compare.columns(rows)))
      if self.out is not None:
        print(f"results in {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(MethodArgs):
  """How long a decode step takes beside plain attention: one attention layer, or a whole model."""

  what: Literal["attention", "model"] = "attention"
  """One layer on keys drawn as unevenly as a real model's, or decode steps of --model after a
  text."""
  methods: str = "a2ats-plus"
  """KV methods, comma-separated, with options. Beside each, in every round: full attention, and the
  fastest other plain form (jax.nn.dot_product_attention; for a model, attention in blocks)."""
  T: str = ""
  """Prompt lengths in tokens, comma-separated. Default: 8192,32768,131072, for a model
  2048,4096,8000."""
  budget: str = "0.03,2048/kv"
  """Far tokens read: below 1 (and 1 itself) a share of the context, from 2 on a number of tokens,
  for each query head, or with /kv for each KV head; comma-separated."""
  dtype: str = ""
  """Of one layer's keys, values and queries: float32, bfloat16 or both (the default). A model runs
  in float32."""
  batch: str = ""
  """Rows, comma-separated. Default: 1, for a model 1,4,8, whose rows all continue one text."""
  heads: int | None = None
  """Query heads of the layer. Default: 32, as Llama-3.1-8B has."""
  kv_heads: int | None = None
  """KV heads of the layer. Default: 8."""
  head_dim: int | None = None
  """Numbers of a head's vector. Default: 128."""
  codewords: int | None = None
  """Codewords of each of the layer's codebooks. Default: 1024."""
  rounds: int = 15
  """Timed rounds, in which everything takes its turn; figures are medians and quartiles."""
  seed: int = 0
  """Of everything that is drawn."""
  out: Path | None = None
  """Directory for config.yaml, metrics.json, predictions.jsonl and the plot; a killed run goes
  on."""
  json: bool = False
  """Print the result rows as JSON lines on stdout instead of a table."""
  text: Path | None = None
  """A UTF-8 file of prose for the model. Default: held-out reference text of CPython."""

  def run(self) -> None:
    from a2ats_jax.budget import Budget
    from eval import speed, texts
    from eval.options import parse_methods
    from eval.speed_inputs import LayerShape

    layer = {name: getattr(self, name) for name in ("heads", "kv_heads", "head_dim", "codewords")}
    given = {name: value for name, value in layer.items() if value is not None}
    whole = self.what == "model"
    others = given if whole else {"codebook": self.codebook, "text": self.text}
    for name, value in others.items():
      if value not in ("", None):
        flag = name.replace("_", "-")
        raise UserError(f"{flag}: has no meaning with --what {self.what}; leave --{flag} out")
    options = speed.SpeedOptions(
      what=self.what,
      methods=parse_methods(self.methods),
      budgets=tuple(Budget.parse(part) for part in self.budget.split(",")),
      T=numbers("T", self.T or ("2048,4096,8000" if whole else "8192,32768,131072")),
      batch=numbers("batch", self.batch or ("1,4,8" if whole else "1")),
      dtypes=tuple((self.dtype or ("float32" if whole else "float32,bfloat16")).split(",")),
      rounds=self.rounds,
      seed=self.seed,
      shape=LayerShape(**given),
      out=self.out,
    )
    if not whole:
      with Bars() as bars:
        rows = speed.run_attention(options, progress=bars)
    else:
      (text,), model = texts.gather([self.text] if self.text else []), load(self)
      books = codebooks(self, model)
      with Bars() as bars:
        rows = speed.run_model(model, options, text, codebooks=books, progress=bars)
    report(rows, json=self.json, out=self.out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Runs of a directory as one HTML page and as Markdown: tables, plots, commands, settings."""

  directory: tyro.conf.Positional[Path]
  """Where runs were left by --out; those in folders below it are shown too."""
  out: Path | None = None
  """Directory for report.html and report.md. Default: the runs' own."""

  def run(self) -> None:
    from eval import report

    for path in report.write(self.directory, self.out):
      print(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
  """Measure KV methods against full attention and the top-k oracle in one run."""

  benchmark: (
    Annotated[Fidelity, tyro.conf.subcommand("fidelity")]
    | Annotated[Recall, tyro.conf.subcommand("recall")]
    | Annotated[Needle, tyro.conf.subcommand("needle")]
    | Annotated[Ruler, tyro.conf.subcommand("ruler")]
    | Annotated[Longbench, tyro.conf.subcommand("longbench")]
    | Annotated[Perplexity, tyro.conf.subcommand("perplexity")]
    | Annotated[Generation, tyro.conf.subcommand("generation")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Speed, tyro.conf.subcommand("speed")]
    | Annotated[Report, tyro.conf.subcommand("report")]
  )

  @property
  def resumes(self) -> bool:
    """Whether finished prompts are kept when it is stopped."""
    return self.benchmark.out is not None and not isinstance(self.benchmark, Report)

  def run(self) -> None:
    self.benchmark.run()

  def keep_command(self, arguments: Sequence[str]) -> None:
    """Leave what was typed beside the results, for reports."""
    from a2ats_jax.files import write_atomically
    from eval.report import COMMAND

    out = self.benchmark.out
    if out is not None and out.is_dir() and not isinstance(self.benchmark, Report):
      write_atomically(out / COMMAND, shlex.join(["a2ats", *arguments]) + "\n")
