"""Drift on full attention's own text: zero where it must be, and agreement by hand."""

import json

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate, pad_prompts
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.sampling import Sampling
from eval import metrics, texts
from eval.buckets import Buckets
from eval.decode import teacher_forced
from eval.generation import GenerationOptions, agreement, continued, run
from eval.options import parse_methods
from eval.record import record, replay
from tests.eval import tiny

NEAR = "window=8:sinks=2"
T, NEW = 48, 40


def _options(**changes):
  given = {
    "methods": parse_methods(f"full,oracle:{NEAR},kivi:group=4:residual=8"),
    "budgets": (Budget(tokens=4), Budget(ratio=1.0)),
    "T": (T,),
    "new": NEW,
    "buckets": Buckets(parts=2),
    "limit": 2,
  }
  return GenerationOptions(**(given | changes))


def _run(options, **kwargs):
  return run(tiny.model(), options, [tiny.prose()], **kwargs)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("generation")


@pytest.fixture(scope="module")
def rows(out):
  return _run(_options(out=out, recall=True))


@pytest.fixture(scope="module")
def prompts():
  tokenizer = tiny.model().tokenizer
  windows = texts.windows(tiny.prose(), tokenizer, longest=T, after=0, limit=2, seed=0)
  return windows.tolist()


@pytest.fixture(scope="module")
def written(prompts):
  """What the library generates greedily."""
  blocks = generate(tiny.model().decoder, Full(), prompts, new=NEW)
  return np.concatenate([block.tokens for block in blocks], axis=1)


def test_full_attention_is_the_zero_of_the_scale(rows):
  assert [(row["method"], row["bucket"]) for row in rows[:3]] == [
    *(("full", "0-19"), ("full", "20-39")),
    ("oracle", "0-19"),
  ]
  assert len(rows) == 2 * (1 + 2 + 1)
  for row in rows[:2]:
    assert (row["kl"], row["top1"], row["nll_diff"], row["read"]) == (0.0, 1.0, 0.0, 1.0)
    assert (row["agree"], row["agree_se"], row["mass"]) == (NEW, 0.0, 1.0)
    # the prompt's last token is the first one fed: its step sees the whole prompt
    assert row["read_bytes"] == (T + row["begin"] + 9.5) * 2 * 8 * 4 * 2 * 2


def test_the_text_is_the_librarys_greedy_one(out, written):
  lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
  for line, row in zip(lines, written):
    assert line["results"][0]["text"] == tiny.model().tokenizer.decode(row.tolist())


def test_perplexity_is_that_of_the_greedy_choices(rows, written, prompts):
  """The likeliest token's own probability; by one prefill of prompt and text per token."""
  decoder = tiny.model().decoder
  nll = []
  for prompt, row in zip(prompts, written):
    tokens, lengths = pad_prompts([prompt[:1]], tiny.model().config, new=T + NEW)
    state = replay(decoder.config, record(decoder, tokens, lengths), Full(), new=T + NEW)
    fed = np.asarray([[*prompt[1:], *row]], np.int32)
    logits, _ = teacher_forced(decoder, Full(), state, fed, lengths, block=T + NEW - 1)
    nll.append(-metrics.log_softmax(logits[0, T - 2 : T - 2 + NEW]).max(-1))
  for row, here in zip(rows, (slice(0, 20), slice(20, 40))):
    assert row["nll"] == pytest.approx(np.mean([x[here].mean() for x in nll]), rel=1e-5)


def test_the_whole_budget_is_full_attention_and_a_small_one_drifts(rows):
  small, whole = rows[2:4], rows[4:6]
  for row in whole:
    assert row["kl"] == pytest.approx(0.0, abs=1e-8)
    assert (row["top1"], row["agree"], row["read"]) == (1.0, NEW, 1.0)
    assert row["mass"] == pytest.approx(1.0)
  for row in small:
    assert row["kl"] > 1e-4
    assert row["agree"] < NEW
    assert 0.2 < row["mass"] < 0.99
  for row in rows[6:]:  # kivi cannot be asked
    assert "mass" not in row
    assert 0 < row["kl"] < small[0]["kl"]


def test_agreement_is_where_the_likeliest_tokens_first_part(rows, out):
  """Greedily a method's own text parts where it would choose otherwise on full attention's."""
  for line in (out / "predictions.jsonl").read_text().splitlines():
    full, *others = json.loads(line)["results"]
    for result in others:
      apart = [i for i, same in enumerate(result["top1"]) if not same]
      assert result["agree"] == (apart[0] if apart else NEW)
      same = result["agree"]
      assert result["text"][:same] == full["text"][:same]  # a token is a character


def test_agreement_by_hand():
  full = np.array([5, 6, 7, 8])
  assert agreement(np.array([5, 6, 9, 8]), full) == 2
  assert agreement(np.array([4, 6, 7, 8]), full) == 0
  assert agreement(np.array([5, 6, 7, 8]), full) == 4
  assert agreement(np.array([5, 0]), full) == 1  # stopped after it departed
  assert agreement(np.array([5, 6]), full) == 2


def test_draws_follow_the_seed_and_the_prompts_number(prompts):
  """As the library draws; and a row alone as in its batch, until every row has departed."""
  model, warm = tiny.model(), Sampling(temperature=1.5)
  blocks = generate(model.decoder, Full(), prompts, new=NEW, sampling=warm, seed=3, streams=[4, 5])
  expected = np.concatenate([block.tokens for block in blocks], axis=1)

  def draw(rows, method, **more):
    tokens, lengths = pad_prompts([prompts[i][:-1] for i in rows], model.config, new=NEW)
    return continued(
      model,
      record(model.decoder, tokens, lengths),
      method,
      last=np.asarray([prompts[i][-1] for i in rows], np.int32),
      lengths=lengths,
      new=NEW,
      sampling=warm,
      seed=3,
      streams=[4 + i for i in rows],
      **more,
    )

  np.testing.assert_array_equal(draw([0, 1], Full()), expected)
  np.testing.assert_array_equal(draw([1], Full()), expected[1:])
  other = draw([1], Oracle(budget=Budget(tokens=1), window=4, sinks=0), until=expected[1:])
  blocks = -(-(agreement(other[0], expected[1]) + 1) // 16)
  assert other.shape == (1, min(16 * blocks, NEW))  # to the end of the block of the departure
  assert other.shape[1] < NEW


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path):
  changes = {"methods": parse_methods(f"oracle:{NEAR}"), "budgets": (Budget(tokens=4),)}
  changes |= {"sampling": Sampling(temperature=1.0)}
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  expected = _run(_options(**changes, out=whole))

  def kill(phase, done, total, **figures):
    if phase == "generation" and done == 3:  # inside the second prompt
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _run(_options(**changes, out=cut), progress=kill)
  assert len((cut / "predictions.jsonl").read_text().splitlines()) == 1
  phases = []
  again = _run(_options(**changes, out=cut), progress=lambda *a, **_: phases.append(a))
  assert again == expected
  assert [p for p in phases if p[0] == "generation"] == [("generation", i, 4) for i in (2, 3, 4)]
  for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  for name in ("kl.png", "top1.png"):
    assert (cut / name).read_bytes().startswith(b"\x89PNG")
  with pytest.raises(UserError, match=r"sampling\.temperature was 1\.0 and is now 0\.0"):
    _run(_options(**(changes | {"sampling": Sampling()}), out=cut))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"new": 2001}, "T: 48 tokens and 2001 new ones exceed the model's context of 2048"),
    ({"buckets": Buckets(parts=41)}, "buckets: 41 parts of 40 tokens"),
    ({"buckets": Buckets(edges=(40, 60))}, "buckets: 40,60 holds none of the positions from 0"),
    ({"new": 0}, "new: expected at least 1, got 0"),
    ({"seed": 1 << 32}, "seed: expected a whole number from 0 to 2^32 - 1"),
  ],
)
def test_bad_options_are_refused_in_a_line(tmp_path, changes, message):
  with pytest.raises(UserError) as caught:
    _run(_options(**changes, out=tmp_path / "out"))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()
