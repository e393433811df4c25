"""Make the figures of accuracy.md: train the codebooks, run the benchmarks, print the tables.

Everything goes through the same functions as the `a2ats` command and resumes where it was stopped.

  python docs/accuracy.py runs/accuracy --novels runs/novels.txt
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from a2ats_jax.budget import Budget
from a2ats_jax.cli import DEFAULT_MODEL, Bars
from a2ats_jax.models.model import Model, load_model
from eval import fidelity, needle
from eval.options import parse_methods
from eval.results import Row, write_atomically
from eval.tables import label
from train_codebooks.metric import Metric
from train_codebooks.options import TrainOptions
from train_codebooks.texts import Text, pydoc_held_out, read_text
from train_codebooks.train import train

SMALL = TrainOptions(codewords=1024, tokens=57344, steps=60, lloyd_steps=3)
LARGE = dataclasses.replace(SMALL, codewords=4096)
PUBLISHED = Metric(kind="query", distances=(2048,))
DISTANCES = (64, 128, 256, 512, 1024, 2048, 4096)
AVERAGED = Metric(kind="query", distances=DISTANCES)
SHRUNK = Metric(kind="query", distances=DISTANCES, shrinkage=0.3)
BOOKS = {
  "plain-1024": SMALL,
  "query-1024": dataclasses.replace(SMALL, metric=PUBLISHED),
  "averaged-1024": dataclasses.replace(SMALL, metric=AVERAGED),
  "shrunk-1024": dataclasses.replace(SMALL, metric=SHRUNK),
  "plain-4096": LARGE,
  "query-4096": dataclasses.replace(LARGE, metric=PUBLISHED),
}

AT_4K = (
  "full,oracle,"
  "unquantised:far=constant(2048),unquantised:far=segments(8),unquantised:far=segments(16),"
  "true-distance:book=plain-1024,"
  "a2ats:book=plain-1024,a2ats:book=query-1024,a2ats:tail=centroid:book=plain-1024,"
  "a2ats:far=segments(4):book=plain-1024,a2ats:far=segments(8):book=plain-1024,"
  "a2ats:far=segments(16):book=plain-1024,"
  "a2ats:far=segments(8):book=query-1024,a2ats:far=segments(8):book=averaged-1024,"
  "a2ats:far=segments(8):book=shrunk-1024,"
  "a2ats-plus:book=plain-1024,a2ats-plus:far=segments(16):book=plain-1024,"
  "a2ats:book=plain-4096,a2ats:book=query-4096,a2ats:far=segments(8):book=plain-4096,"
  "a2ats-plus:book=plain-4096"
)
AT_8K = (
  "full,oracle,a2ats:book=plain-1024,a2ats:book=query-1024,a2ats:far=segments(8):book=plain-1024,"
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
    near = fidelity.run(
      model,
      fidelity.FidelityOptions(
        methods=parse_methods(AT_4K),
        budgets=BUDGETS,
        T=(4096,),
        limit=TEXTS,
        new=NEW,
        out=args.out / "fidelity-4k",
      ),
      kinds,
      codebooks=books,
      progress=bars,
    )
    far = fidelity.run(
      model,
      fidelity.FidelityOptions(
        methods=parse_methods(AT_8K),
        budgets=BUDGETS[1:],
        T=(model.config.context - NEW,),
        limit=TEXTS,
        new=NEW,
        out=args.out / "fidelity-8k",
      ),
      kinds,
      codebooks=books,
      progress=bars,
    )
    found = find_needles(model, kinds[1:], books, args.out / "needle", bars)
  tables = [
    *(f"## {b} of 4096 tokens per query head\n\n{_closeness(near, b)}" for b in BUDGETS),
    f"## {BUDGETS[1]} of {far[0]['T']} tokens per query head\n\n{_closeness(far, BUDGETS[1])}",
    f"## Needles in novels, 4096 tokens\n\n{_needles(found)}",
  ]
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


def _closeness(rows: Sequence[Row], budget: Budget) -> str:
  """One budget's table: a line a method, both kinds of text side by side."""
  kinds = list(dict.fromkeys(row["task"] for row in rows))
  head = "| method | " + " | ".join(f"{k}: KL ± s.e. | top-1 | chosen" for k in kinds) + " |"
  lines = [head, "|---" * (1 + 3 * len(kinds)) + "|"]
  chosen = [row for row in rows if row["budget"] in (None, budget.ratio)]
  for name in dict.fromkeys(label(row, chosen) for row in chosen):
    cells = [name]
    for kind in kinds:
      (row,) = (r for r in chosen if r["task"] == kind and label(r, chosen) == name)
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
