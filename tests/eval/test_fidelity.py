"""Fidelity on a tiny model: exact where it must be, and whole after a kill."""

import json
import math

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import decode_step, pad_prompts, prefill
from a2ats_jax.methods.full import Full
from eval import texts
from eval.fidelity import FidelityOptions, run
from eval.options import parse_methods
from tests.eval import tiny

NEAR = "window=8:sinks=2"
METHODS = f"oracle:{NEAR},a2ats:{NEAR},a2ats-plus:{NEAR}"
COMMON = [
  "benchmark",
  "task",
  "model",
  "method",
  "options",
  "T",
  "batch",
  "dtype",
  "budget",
  "read",
  "kl",
  "top1",
  "ppl",
  "moved_bytes",
  "n",
  "seed",
]


def _options(**changes):
  given = {
    "methods": parse_methods(METHODS),
    "budgets": (Budget(ratio=0.1), Budget(ratio=1.0)),
    "T": (96,),
    "limit": 2,
    "new": 4,
  }
  return FidelityOptions(**(given | changes))


def _run(options, **kwargs):
  return run(
    tiny.model(), options, [tiny.prose()], codebooks={"default": tiny.codebook()}, **kwargs
  )


@pytest.fixture(scope="module")
def rows():
  return _run(_options())


def test_rows_hold_the_designs_keys(rows):
  assert len(rows) == 1 + 3 * 2
  for row in rows:
    assert set(COMMON) <= set(row)
    assert (row["benchmark"], row["task"], row["model"]) == ("fidelity", "tiny prose", "tiny")
    assert (row["T"], row["batch"], row["n"], row["seed"]) == (96, 1, 2, 0)
    json.dumps(row, allow_nan=False)
  assert [row["method"] for row in rows[:3]] == ["full", "oracle", "oracle"]


def test_full_attention_is_the_zero_of_the_scale(rows):
  full = rows[0]
  assert (full["kl"], full["top1"], full["read"], full["budget"]) == (0.0, 1.0, 1.0, None)
  # every step reads T + its own place, keys and values, of both heads in both layers
  cached = np.mean([96 + i for i in range(1, 5)])
  assert full["read_bytes"] == cached * 2 * 8 * 4 * 2 * 2
  assert full["moved_bytes"] == 0


def test_the_whole_budget_costs_nothing(rows):
  for row in rows:
    if row["budget"] == 1.0:
      assert abs(row["kl"]) < 1e-8
      assert row["top1"] == 1.0
      assert row["read"] == 1.0
      assert row["ppl"] == pytest.approx(rows[0]["ppl"], rel=1e-5)


def test_a_small_budget_costs_something_and_reads_little(rows):
  for row in rows:
    if row["budget"] == 0.1:
      assert row["kl"] > 1e-4
      assert 0.09 < row["selected"] < 0.21  # a group of two takes between one and two budgets
      assert row["selected"] < row["read"] < row["selected"] + 11 / 96
      assert (row["tail"] > 0) == (row["method"] == "a2ats-plus")
      assert row["kl_se"] == pytest.approx(row["kl_std"] / math.sqrt(2))


def test_perplexity_of_full_is_that_of_the_text(rows):
  model, after = tiny.model(), 5
  windows = texts.windows(tiny.prose(), model.tokenizer, longest=96, after=after, limit=2, seed=0)
  nll = []
  for window in windows:
    tokens, lengths = pad_prompts([window[:96].tolist()], model.config, new=4)
    _, state = prefill(model.decoder, Full(), tokens, lengths, new=4)
    logits, _, _ = decode_step(
      model.decoder, Full(), state, window[None, 96:100], np.arange(96, 100, dtype=np.int32)[None]
    )
    p = np.exp(np.asarray(logits[0], np.float64))
    p /= p.sum(-1, keepdims=True)
    nll.append(-np.log(p[np.arange(4), window[97:101]]).mean())
  assert rows[0]["ppl"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-6)


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, rows):
  options = _options(limit=3, batch=2, budgets=(Budget(ratio=0.1),), methods=parse_methods("full"))
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  expected = _run(_options(**(vars(options) | {"out": whole})))
  assert [row["method"] for row in expected] == ["full", "oracle"]

  calls = []

  def kill(phase, done, total, **figures):
    calls.append((phase, done, total))
    if phase == "fidelity" and done == 3:  # inside the second of two batches
      raise KeyboardInterrupt

  here = _options(**(vars(options) | {"out": cut}))
  with pytest.raises(KeyboardInterrupt):
    _run(here, progress=kill)
  assert calls[0] == ("fidelity", 0, 4)
  assert not (cut / "metrics.json").exists()
  assert len((cut / "predictions.jsonl").read_text().splitlines()) == 2
  resumed = []
  again = _run(here, progress=lambda phase, done, total, **f: resumed.append((phase, done)))
  assert resumed[0] == ("fidelity", 2)  # the first batch is not repeated
  assert sum(phase == "prefill" for phase, _ in resumed) == 2  # one batch, two layers
  assert again == expected
  for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  assert (cut / "kl.png").stat().st_size > 1000
  # a batch with a line missing is repeated whole
  lines = (cut / "predictions.jsonl").read_text().splitlines(keepends=True)
  (cut / "predictions.jsonl").write_text("".join(lines[1:]))
  (cut / "metrics.json").unlink()
  _run(here)
  assert (cut / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
  with pytest.raises(UserError, match="seed was 0 and is now 5"):
    _run(_options(**(vars(here) | {"seed": 5})))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"T": (2045,)}, "2045 tokens and 4 new ones exceed the model's context of 2048"),
    ({"limit": 60}, "60 texts of 101 tokens need 6060, it has"),
  ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(changes, message):
  with pytest.raises(UserError) as caught:
    _run(_options(**changes))
  assert message in str(caught.value)


def test_codebooks_that_are_missing_are_asked_for():
  with pytest.raises(UserError, match="--codebook"):
    run(tiny.model(), _options(), [tiny.prose()])
