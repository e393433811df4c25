"""Perplexity by position: full attention against a plain forward pass, and no logits kept."""

import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.rope import make_rope, rotate
from eval import decode, perplexity, plots, texts
from eval.buckets import Buckets
from eval.follow import Followed, follow
from eval.options import parse_methods
from eval.perplexity import PerplexityOptions, run
from eval.record import record
from tests.eval import tiny

NEAR = "window=8:sinks=2"
PROMPT, T = 60, 100
SPANS = [(60, 70), (70, 95), (95, 100)]  # 100 is beyond the last token that is fed


def _options(**changes):
  given = {
    "methods": parse_methods(f"full,oracle:{NEAR}"),
    "budgets": (Budget(ratio=0.1), Budget(ratio=1.0)),
    "T": (T,),
    "prompt": PROMPT,
    "buckets": Buckets.parse("60,70,95,200"),
    "limit": 2,
    "kl": True,
  }
  return PerplexityOptions(**(given | changes))


def _run(options, model=None, **kwargs):
  return run(model or tiny.model(), options, [tiny.prose()], **kwargs)


def _plain(ids):
  """Negative log-likelihood of every token but the first: one causal attention over the text."""
  decoder = tiny.model().decoder
  config = decoder.config
  x, rope = decoder.embed(jnp.asarray([ids])), make_rope(config.rope)
  positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
  seen = np.tril(np.ones((len(ids), len(ids)), bool))
  for index in range(config.layers):
    layer = decoder.layer(index)
    q, k, v = layer.project(x)
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    k, v = (jnp.repeat(a, config.heads // config.kv_heads, axis=2) for a in (k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / math.sqrt(config.head_dim)
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    x = layer.finish(x, jnp.einsum("bhst,bthd->bshd", weights, v))
  logits = np.asarray(decoder.logits(x)[0], np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return -log_p[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("perplexity")


@pytest.fixture(scope="module")
def rows(out):
  return _run(_options(out=out))


def test_full_attention_is_a_plain_forward_pass_bucket_by_bucket(rows):
  model = tiny.model()
  windows = texts.windows(tiny.prose(), model.tokenizer, longest=T, after=1, limit=2, seed=0)
  each = [_plain(window) for window in windows]
  assert [row["method"] for row in rows[:4]] == ["full"] * 3 + ["oracle"]
  for row, (begin, end) in zip(rows, SPANS):
    assert (row["bucket"], row["begin"], row["end"]) == (f"{begin}-{end - 1}", begin, end)
    one, two = (nll[begin:end].mean() for nll in each)  # of the token after each position
    assert row["nll"] == pytest.approx((one + two) / 2, rel=1e-6)
    assert row["ppl"] == pytest.approx(math.exp((one + two) / 2), rel=1e-5)
    assert row["nll_se"] == pytest.approx(abs(one - two) / 2, rel=1e-4)
    assert (row["kl"], row["top1"], row["nll_diff"], row["nll_diff_se"]) == (0, 1, 0, 0)
    # keys and values of both heads in both layers, mean over the positions of the bucket
    assert row["read_bytes"] == pytest.approx((begin + end + 1) / 2 * 2 * 8 * 4 * 2 * 2)


def test_the_whole_budget_is_full_attention_and_a_small_one_is_not(rows):
  full = {row["bucket"]: row for row in rows[:3]}
  assert len(rows) == 3 * (1 + 2)
  for row in rows[3:]:
    beside = full[row["bucket"]]
    assert row["nll_diff"] == pytest.approx(row["nll"] - beside["nll"], abs=1e-12)
    assert row["n"] == 2
    if row["budget"] == 1.0:
      assert row["nll"] == pytest.approx(beside["nll"], abs=1e-5)
      assert (row["top1"], row["read"]) == (1.0, 1.0)
    else:
      assert row["kl"] > 1e-3
      assert abs(row["nll_diff"]) > 1e-4
      assert row["selected"] < 0.25


def test_it_leaves_plots_and_every_tokens_likelihood(rows, out):
  for name in ("ppl", "nll-diff", "kl", "top1"):
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  lines = (out / "predictions.jsonl").read_text().splitlines()
  assert len(lines) == 2
  assert '"buckets": "60,70,95,200"' in (out / "metrics.json").read_text()


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path):
  changes = {"methods": parse_methods(f"oracle:{NEAR}"), "budgets": (Budget(ratio=0.1),)}
  changes |= {"limit": 3, "kl": False, "batch": 2}
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  expected = _run(_options(**changes, out=whole))
  assert "kl" not in expected[0]

  def kill(phase, done, total, **figures):
    if phase == "perplexity" and done == 3:  # full attention of the second batch
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _run(_options(**changes, out=cut), progress=kill)
  assert len((cut / "predictions.jsonl").read_text().splitlines()) == 2
  fed = []
  again = _run(
    _options(**changes, out=cut),
    progress=lambda phase, done, total, **_: phase == "feed" and fed.append((done, total)),
  )
  assert again == expected
  assert fed == [(32, 40), (40, 40)] * 2  # one batch, two methods
  for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  with pytest.raises(UserError, match="prompt was 60 and is now 61"):
    _run(_options(**changes, out=cut, prompt=61))


def test_lengths_end_on_the_same_token_and_texts_begin_as_the_model_expects(monkeypatch):
  """A shorter text is the end of the longer one, and its first token gives way to BOS."""
  model, prompts, fed = tiny.model(bos=True), [], []
  nothing = Followed(figures={"nll": np.zeros(T)}, reading={})

  def seen(model, recording, method, tokens, lengths, **_):
    fed.append((tokens.tolist(), lengths.tolist()))
    return [nothing], {"device_bytes": 0, "host_bytes": 0}

  monkeypatch.setattr(
    perplexity, "record", lambda decoder, tokens, lengths, **_: prompts.append(tokens.tolist())
  )
  monkeypatch.setattr(perplexity, "follow", seen)
  whole = Buckets(parts=1)
  found = _run(_options(T=(80, T), buckets=whole, limit=1, kl=False), model=model)
  assert {(row["T"], row["bucket"]) for row in found} == {(80, "60-79"), (T, "60-99")}
  (window,) = texts.windows(tiny.prose(), model.tokenizer, longest=T, after=1, limit=1, seed=0)
  short, long = ([1, *window[T - size :].tolist()[1:]] for size in (80, T))
  assert [prompt[0][:PROMPT] for prompt in prompts] == [short[:PROMPT], long[:PROMPT]]
  assert fed[0] == ([short[PROMPT:]], [PROMPT])
  assert fed[-1] == ([long[PROMPT:]], [PROMPT])
  assert len(long) == T + 1  # the last token is a target only


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with-kl"])
def test_only_the_logits_of_one_block_are_alive(monkeypatch, beside):
  """Of a method, and of full attention beside it; what stays is one number a token."""
  model, steps, alive, most = tiny.model(), [], weakref.WeakSet(), []
  real = decode.decode_step

  def counted(*arguments):
    most.append(len(alive))  # of earlier calls
    out, state, stats = real(*arguments)
    logits = np.array(out)  # a copy, whose end can be seen
    holder = _Seen(logits)
    alive.add(holder)
    steps.append(out.shape)
    return holder, state, stats

  monkeypatch.setattr(decode, "decode_step", counted)
  rng = np.random.default_rng(4)
  tokens, lengths = pad_prompts([rng.integers(0, 128, 20).tolist()], model.config, new=150)
  method, full = Oracle(budget=Budget(tokens=4), window=8, sinks=2), Full()
  recording = record(model.decoder, tokens, lengths, methods=[method])
  fed = rng.integers(0, 128, (1, 151)).astype(np.int32)
  (row,), _ = follow(model, recording, method, fed, lengths, beside=full if beside else None)
  assert steps == [(1, 32, 128)] * 5 * (1 + beside)  # blocks of 32, the last one padded
  assert max(most) == int(beside)
  assert set(row.figures) == ({"nll", "kl", "top1"} if beside else {"nll"})
  assert all(x.shape == (150,) for x in (*row.figures.values(), *row.reading.values()))


class _Seen:
  """Logits that a weak reference can watch: alive as long as the array made of it."""

  def __init__(self, logits):
    self._logits = logits

  @property
  def __array_interface__(self):
    return self._logits.__array_interface__


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prompt": T}, "prompt: expected 1 to 99 tokens, fewer than a text has, got 100"),
    ({"prompt": 0}, "prompt: expected 1 to 99"),
    ({"T": (2049,)}, "T: 2049 tokens exceed the model's context of 2048"),
    ({"buckets": Buckets(parts=41)}, "buckets: 41 parts of 40 tokens"),
    ({"buckets": Buckets(edges=(0, 60))}, "buckets: 0,60 holds none of the positions from 60"),
    ({"limit": 0}, "limit: expected at least 1"),
    ({"limit": 90}, "90 texts of 101 tokens need"),
  ],
)
def test_bad_options_are_refused_in_a_line(tmp_path, changes, message):
  with pytest.raises(UserError) as caught:
    _run(_options(**changes, out=tmp_path / "out"))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()


def test_a_line_for_each_method_and_budget(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, **_: seen.append(self))
  who = {"task": "prose", "T": 100, "options": ""}
  rows = [
    who | {"method": name, "budget": budget, "begin": begin, "end": begin + 10, "kl": kl}
    for name, budget, kl in (("full", None, 0.0), ("oracle", 0.1, 0.2), ("oracle", 0.5, 0.1))
    for begin in (60, 70)
  ]
  plots.by_position(rows, tmp_path / "kl.png", y="kl")
  (axis,) = seen[0].axes
  handles, names = axis.get_legend_handles_labels()
  assert names == ["oracle, 0.1", "oracle, 0.5"]  # full attention's nought is off the scale
  assert handles[0].lines[0].get_xdata().tolist() == [64.5, 74.5]
