"""The main job on real input, start to end, in a few minutes on two cores.

Fetches SmolLM2 135M, trains small codebooks on text that every Python ships, hides a number in a
prompt of more than 4096 tokens of other text and asks for it, with full attention and with A2ATS at
two budgets, and compares next-token distributions on held-out text. What was made is reused.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods.registry import DEFAULT_BOOK
from a2ats_jax.models.model import Model, load_model
from eval import fidelity, metrics, single_needle, tables
from eval.decode import greedy_from
from eval.options import Case, CommonOptions, Progress, cases_of, parse_methods
from eval.record import record, replay
from eval.results import Row
from eval.ruler.scoring import match_all
from train_codebooks.options import TrainOptions
from train_codebooks.texts import Text, pydoc_held_out
from train_codebooks.train import train

MODEL = "smollm2-135m-instruct"
METHODS = parse_methods("full,oracle,a2ats,a2ats-plus")
BUDGETS = (Budget(ratio=0.03), Budget(ratio=0.01))
TRAINING = TrainOptions(
  codewords=512, tokens=16384, identifiers=0.25, steps=100, lloyd_steps=6, batch=1024
)
PROMPT = 4352  # tokens at most; the haystack's units leave it a little short of that
ANSWER = 16  # tokens


def demo(
  out: Path,
  *,
  cache: Path | None,
  progress: Progress,
  note: Callable[[str], None],
) -> None:
  """Run it and print what came out.

  Args:
    out: directory for codebooks, results and ``demo.png``.
    cache: folder for the model.
    progress: told of every phase. note: shown lines of text.
  """
  started = time.perf_counter()
  model = load_model(MODEL, cache, note)
  note(
    f"training codebooks of {TRAINING.codewords} codewords on {TRAINING.tokens} tokens "
    f"({model.config.layers} layers x {model.config.kv_heads} KV heads)"
  )
  book = train(model, TRAINING, out / "codebooks", progress=progress)
  held_out = pydoc_held_out()
  answers = answer(model, book, held_out, progress)
  options = fidelity.FidelityOptions(
    methods=METHODS, budgets=BUDGETS, T=(4096,), limit=2, new=32, out=out / "fidelity"
  )
  kinds = (held_out,)
  rows = fidelity.run(model, options, kinds, codebooks={DEFAULT_BOOK: book}, progress=progress)
  draw(answers, rows, out / "demo.png")
  report(answers, rows, tables.console())
  note(f"{time.perf_counter() - started:.0f} s in all; plot and results in {out}")


def answer(model: Model, book: Codebook, text: Text, progress: Progress) -> list[Row]:
  """Hide a number half-way down the prompt and let every method answer.

  The prompt's last token is the first one decoded, so that the whole answer is the method's.
  """
  rng = random.Random(7)
  sentences = single_needle.sentences_of(text)
  first = single_needle.first_sentence(sentences, model.tokenizer, PROMPT, rng)
  prompt = single_needle.fit(
    single_needle.prose_haystack(sentences, first),
    model.tokenizer,
    rng,
    T=PROMPT,
    depth=0.4,
    chat=False,
    most=len(sentences) - first,
  )
  options = CommonOptions(methods=METHODS, budgets=BUDGETS)
  cases = [case for case in cases_of(options, {DEFAULT_BOOK: book}) if case.spec.name != "oracle"]
  tokens, lengths = pad_prompts([prompt.ids[:-1]], model.config, new=ANSWER)
  began = time.perf_counter()
  recording = record(
    model.decoder, tokens, lengths, progress=lambda done, of: progress("prefill", done, of)
  )
  prefill_s = time.perf_counter() - began
  rows: list[Row] = []
  for place, case in enumerate(cases):
    progress("answer", place, len(cases))
    generated, stats, seconds = _timed(model, case, recording, prompt.ids[-1], lengths)
    read = [metrics.reading(s, 0) for s in stats]
    text_out = model.tokenizer.decode(generated[0])
    rows.append(
      case.identity
      | {name: float(np.mean([r[name] for r in read])) for name in ("read", "read_bytes")}
      | {
        "prompt_tokens": len(prompt.ids),
        "prefill_s": prefill_s,
        "ms": 1e3 * seconds / max(len(stats), 1),
        "asked": prompt.answer,
        "prediction": text_out,
        "score": match_all(text_out, [prompt.answer]),
      }
    )
  progress("answer", len(cases), len(cases))
  return rows


def _timed(model, case: Case, recording, last: int, lengths):
  """Answer twice; the second time is without compilation."""
  seconds = 0.0
  for _ in range(2):
    state = replay(model.config, recording, case.method, new=ANSWER)
    began = time.perf_counter()
    generated, stats = greedy_from(
      model.decoder,
      case.method,
      state,
      [last],
      lengths,
      new=ANSWER,
      stop=model.tokenizer.eos_ids,
    )
    seconds = time.perf_counter() - began
  return generated, stats, seconds


def report(answers: Sequence[Row], rows: Sequence[Row], console: Console) -> None:
  """The two tables."""
  first = answers[0]
  console.print(
    f"\n[bold]A number hidden in {first['prompt_tokens']} tokens[/bold] "
    f"(it is {first['asked']}; the prompt took {first['prefill_s']:.1f} s)"
  )
  table = Table(box=None, header_style="bold", pad_edge=False)
  for name in ("method", "budget", "found", "tokens read", "bytes read", "ms a token", "answer"):
    table.add_column(name, justify="left" if name in ("method", "answer") else "right")
  for row in answers:
    table.add_row(
      row["method"],
      "-" if row["budget"] is None else f"{row['budget']:g}",
      "yes" if row["score"] else "no",
      f"{row['read'] * row['prompt_tokens']:.0f}",
      f"{row['read_bytes'] / 1e6:.1f} MB",
      f"{row['ms']:.0f}",
      row["prediction"].strip().split("\n")[0],
    )
  console.print(table)
  console.print(
    "[dim]Tokens, bytes and times are of one step. Bytes are of the cache and of the index that "
    "chooses from it.[/dim]"
  )
  console.print("\n[bold]Next-token distributions on held-out text[/bold]")
  console.print(tables.table(rows))


def draw(answers: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
  """Divergence from full attention against the share of the cache that was chosen and read."""
  figure = Figure(figsize=(6, 4), layout="constrained")
  axis = figure.subplots()
  for name in dict.fromkeys(row["method"] for row in rows if row["method"] != "full"):
    mine = sorted((r["selected"], r["kl"]) for r in rows if r["method"] == name)
    axis.plot(*zip(*mine), marker="o", label=name)
  found = ", ".join(
    f"{r['method']}{'' if r['budget'] is None else ' ' + format(r['budget'], 'g')}"
    for r in answers
    if r["score"]
  )
  axis.set(
    xscale="log",
    yscale="log",
    xlabel="share of the cache chosen (after the union over a group)",
    ylabel="KL(full || method), nats a token",
  )
  for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
    ticks(PercentFormatter(1, decimals=0))
  axis.set_title(f"needle found by: {found or 'none'}", fontsize="small")
  axis.grid(alpha=0.3)
  axis.legend()
  figure.savefig(path, dpi=120)
