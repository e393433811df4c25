"""Make the figures of accuracy.md: train the codebooks, run the benchmarks, print the tables.

Everything goes through the same functions as the `a2ats` command and resumes where it was stopped.

  python docs/accuracy.py runs/accuracy --novels runs/novels.txt
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from a2ats_jax.bars import Bars
from a2ats_jax.budget import Budget
from a2ats_jax.cli_args import DEFAULT_MODEL
from a2ats_jax.files import write_atomically
from a2ats_jax.models.model import Model, load_model
from eval import fidelity, needle
from eval.options import parse_methods
from eval.results import Row
from eval.tables import label
from train_codebooks.metric import Metric, log_spaced
from train_codebooks.options import TrainOptions
from train_codebooks.texts import Text, pydoc_held_out, read_text
from train_codebooks.train import train

PLAIN = Metric(kind="plain")
PUBLISHED = Metric(kind="query", distances=(2048,))
AVERAGED = Metric(kind="query", distances=log_spaced(64, 4096, 7))
SHRUNK = dataclasses.replace(AVERAGED, shrinkage=0.3)


def training(metric: Metric, codewords: int = 1024, **options) -> TrainOptions:
  """57K tokens, a short optimiser run, three Lloyd steps."""
  return TrainOptions(codewords=codewords, metric=metric, steps=60, lloyd_steps=3, **options)


BOOKS = {
  "query-1024": training(PUBLISHED),
  "plain-1024": training(PLAIN),
  "averaged-1024": training(AVERAGED),
  "shrunk-1024": training(SHRUNK),
  "plain-4096": training(PLAIN, 4096, guard=False),
  "query-4096": training(PUBLISHED, 4096, guard=False),
}

AT_3_PERCENT = (
  "full,oracle,"
  "unquantised:far=constant(2048),a2ats:book=plain-1024,a2ats:book=query-1024,"
  "true-distance:book=plain-1024,"
  "unquantised:far=segments(8),unquantised:far=segments(16),"
  "a2ats:far=segments(4):book=plain-1024,a2ats:far=segments(8):book=plain-1024,"
  "a2ats:far=segments(16):book=plain-1024,a2ats:far=segments(8):book=query-1024,"
  "a2ats-plus:book=plain-1024,a2ats-plus:far=segments(16):book=plain-1024,"
  "a2ats:book=query-4096,a2ats-plus:book=plain-4096"
)
AT_1_PERCENT = (
  "full,oracle,a2ats:book=plain-1024,a2ats:book=query-1024,a2ats:far=segments(8):book=plain-1024,"
  "a2ats:far=segments(8):book=query-1024,a2ats:far=segments(8):book=averaged-1024,"
  "a2ats:far=segments(8):book=shrunk-1024,"
  "a2ats-plus:book=plain-1024,a2ats-plus:far=segments(16):book=plain-1024,"
  "a2ats:book=query-4096,a2ats-plus:book=plain-4096"
)
AT_8K = (
  "full,oracle,a2ats:book=query-1024,a2ats:far=segments(8):book=plain-1024,"
  "a2ats-plus:book=plain-1024,a2ats-plus:far=segments(12):book=plain-1024,"
  "a2ats:book=query-4096,a2ats-plus:book=plain-4096"
)
NEEDLE = (
  "full,oracle,a2ats:book=plain-1024,a2ats:book=query-1024,a2ats:far=segments(8):book=plain-1024,"
  "a2ats-plus:book=plain-1024"
)
BUDGETS = (Budget(ratio=0.03), Budget(ratio=0.01))
TEXTS = 5  # of each kind
NEW = 32  # tokens fed after each


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("out", type=Path, help="directory for codebooks, results and tables.md")
  parser.add_argument("--novels", type=Path, required=True, help="text file from docs/novels.py")
  args = parser.parse_args()
  model = load_model(DEFAULT_MODEL)
  kinds = (pydoc_held_out(), dataclasses.replace(read_text(args.novels), name="novels"))
  with Bars() as bars:
    books = {}
    for name, options in BOOKS.items():
      books[name] = train(model, options, args.out / "books" / name, progress=bars)
    runs = (
      (AT_3_PERCENT, BUDGETS[0], 4096),
      (AT_1_PERCENT, BUDGETS[1], 4096),
      (AT_8K, BUDGETS[1], model.config.context - NEW),
    )
    tables = []
    for methods, budget, length in runs:
      options = fidelity.FidelityOptions(
        methods=parse_methods(methods),
        budgets=(budget,),
        T=(length,),
        limit=TEXTS,
        new=NEW,
        out=args.out / f"fidelity-{length}-{budget}",
      )
      rows = fidelity.run(model, options, kinds, codebooks=books, progress=bars)
      tables.append(f"## {budget} of {length} tokens per query head\n\n{_closeness(rows)}")
    found = find_needles(model, kinds[1:], books, args.out / "needle", bars)
  tables.append(f"## Needles in novels, 4096 tokens\n\n{_needles(found)}")
  text = "\n\n".join(tables) + "\n"
  write_atomically(args.out / "tables.md", text)
  print(text)


def find_needles(model: Model, kinds: Sequence[Text], books, out: Path, bars: Bars) -> list[Row]:
  """Ten needles in the novels, at five depths."""
  options = needle.NeedleOptions(
    methods=parse_methods(NEEDLE),
    budgets=BUDGETS,
    T=(4096,),
    limit=10,
    haystacks=("prose",),
    out=out,
  )
  return needle.run(model, options, kinds, codebooks=books, progress=bars)


def _closeness(rows: Sequence[Row]) -> str:
  """A line a method, all kinds of text side by side."""
  kinds = list(dict.fromkeys(row["task"] for row in rows))
  head = "| method | " + " | ".join(f"{k}: KL ± s.e. | top-1 | chosen" for k in kinds) + " |"
  lines = [head, "|---" * (1 + 3 * len(kinds)) + "|"]
  for name in dict.fromkeys(label(row, rows) for row in rows):
    cells = [name]
    for kind in kinds:
      (row,) = (r for r in rows if r["task"] == kind and label(r, rows) == name)
      cells += [f"{row['kl']:.4f} ± {row['kl_se']:.4f}", f"{row['top1']:.3f}"]
      cells.append(f"{row['selected']:.3f}")
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _needles(rows: Sequence[Row]) -> str:
  lines = ["| method | budget | found | of |", "|---|---|---|---|"]
  for row in rows:
    budget = "-" if row["budget"] is None else f"{row['budget']:g}"
    lines.append(f"| {label(row, rows)} | {budget} | {row['score'] * row['n']:.0f} | {row['n']} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
