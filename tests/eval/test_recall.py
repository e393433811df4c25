"""Recall along the exact trajectory: bounds, the oracle, and a count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.rope import make_rope, rotate
from eval.decode import teacher_forced
from eval.options import parse_methods
from eval.recall import Probe, RecallOptions, run
from eval.record import record, replay
from tests.eval import tiny

NEAR = {"window": 8, "sinks": 2}
LENGTHS, NEW = (60, 37), 4


@pytest.fixture(scope="module")
def recording():
  model, rng = tiny.model(), np.random.default_rng(7)
  prompts = [rng.integers(0, 128, n).tolist() for n in LENGTHS]
  tokens, lengths = pad_prompts(prompts, model.config, new=NEW)
  inputs = rng.integers(0, 128, (2, NEW)).astype(np.int32)
  return record(model.decoder, tokens, lengths), inputs, lengths


def _probe(candidate, recording):
  recorded, inputs, lengths = recording
  model, probe = tiny.model(), Probe(candidate=candidate)
  state = replay(model.config, recorded, probe, new=NEW)
  return teacher_forced(model.decoder, probe, state, inputs, lengths, block=NEW)


def test_the_trajectory_is_that_of_full_attention(recording):
  recorded, inputs, lengths = recording
  model = tiny.model()
  state = replay(model.config, recorded, Full(), new=NEW)
  expected, _ = teacher_forced(model.decoder, Full(), state, inputs, lengths, block=NEW)
  book, budget = tiny.codebook(), Budget(tokens=1)
  out, caught = _probe(A2ATSReference(codebook=book, budget=budget, **NEAR), recording)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  assert caught["mass"].shape == (2, 2, NEW, 4)
  assert 0 < caught["mass"].min() < caught["mass"].max() < 1
  assert (caught["far_mass"] < 1).any()


@pytest.mark.parametrize("budget", [Budget(tokens=3), Budget(ratio=0.2), Budget(tokens=0)])
def test_the_oracle_recalls_its_own_top_k(budget, recording):
  _, caught = _probe(Oracle(budget=budget, **NEAR), recording)
  np.testing.assert_array_equal(caught["topk_recall"], 1.0)
  if budget.tokens != 0:
    assert 0 < caught["far_mass"].min() < caught["far_mass"].max() <= 1
  else:
    np.testing.assert_array_equal(caught["far_mass"], 0.0)


def test_everything_is_caught_with_the_whole_budget_and_by_full_attention(recording):
  whole = A2ATSReference(codebook=tiny.codebook(), budget=Budget(ratio=1.0), **NEAR)
  for candidate in (whole, Full()):
    _, caught = _probe(candidate, recording)
    for name in ("mass", "far_mass", "topk_recall"):
      np.testing.assert_allclose(caught[name], 1.0, atol=1e-6)
    np.testing.assert_array_equal(caught["read"], caught["length"][..., None] + np.zeros(2, int))


def test_one_step_counted_by_hand():
  config = tiny.model().config
  rope, rng = make_rope(config.rope), np.random.default_rng(0)
  slots, position, budget = 128, 30, Budget(tokens=3)
  keys = rng.normal(size=(2, slots, 8)).astype(np.float32)
  q = rng.normal(0, 2, size=(1, 1, 4, 8)).astype(np.float32)
  method = Probe(candidate=Oracle(budget=budget, **NEAR))
  positions = jnp.full((1, 1), position, jnp.int32)
  rotated = rotate(jnp.asarray(q), positions, rope)[0, 0]
  scores = np.einsum("hd,htd->ht", rotated, keys[[0, 0, 1, 1]]).astype(np.float64) / np.sqrt(8)
  p = np.exp(scores[:, : position + 1])
  p /= p.sum(-1, keepdims=True)
  far = np.arange(2, position - 7)
  top = [set(far[np.argsort(-scores[h, far])[:3]].tolist()) for h in range(4)]
  # a selection that misses what the last two heads would take
  chosen = np.zeros((1, 1, 4, slots), bool)
  for h in (0, 1):
    chosen[0, 0, h, list(top[h])] = True
  near = np.zeros((1, 1, slots), bool)
  near[..., :2] = near[..., position - 7 : position + 1] = True
  eligible = np.zeros((1, 1, slots), bool)
  eligible[..., far] = True
  caught = jax.jit(lambda *a: method._catch(*a, positions, 2))(
    jnp.asarray(scores[None, None], jnp.float32),
    jnp.asarray(chosen),
    jnp.asarray(near),
    jnp.asarray(eligible),
  )
  union = sorted(top[0] | top[1])
  assert caught.selected.tolist() == [[[len(union), 0]]]
  assert caught.read.tolist() == [[[len(union) + 10, 10]]]
  sure = [0, 1, *range(position - 7, position + 1)]
  for h in range(4):
    mine = union if h < 2 else []
    assert caught.mass[0, 0, h] == pytest.approx(p[h, sure + mine].sum(), rel=1e-5)
    share = p[h, mine].sum() / p[h, far].sum()
    assert caught.far_mass[0, 0, h] == pytest.approx(share, rel=1e-5)
    assert caught.topk_recall[0, 0, h] == pytest.approx(len(top[h] & set(mine)) / 3)


def test_rows_arrays_and_pictures(tmp_path):
  near = "window=8:sinks=2"
  methods = f"oracle:{near},a2ats:{near},unquantised:{near},true-distance:{near}"
  options = RecallOptions(
    methods=parse_methods(methods),
    budgets=(Budget(ratio=0.1),),
    T=(96,),
    limit=2,
    new=4,
    out=tmp_path,
  )
  rows = run(tiny.model(), options, [tiny.prose()], codebooks={"default": tiny.codebook()})
  by_name = {row["method"]: row for row in rows}
  assert list(by_name) == ["full", "oracle", "a2ats", "unquantised", "true-distance"]
  for name in ("mass", "far_mass", "topk_recall", "read", "selected"):
    assert by_name["full"][name] == pytest.approx(1.0)
  assert by_name["oracle"]["topk_recall"] == 1.0
  for row in rows[2:]:
    assert 0 < row["far_mass"] < row["mass"] < 1
    assert 0 < row["topk_recall"] < 1
    assert row["n"] == 2
    assert row["mass_se"] > 0
  with np.load(tmp_path / "recall.npz") as arrays:
    for name in ("mass", "far_mass", "topk_recall"):
      assert arrays[name].shape == (5, 2, 4)
      np.testing.assert_allclose(arrays[name].mean((1, 2)), [row[name] for row in rows])
  assert (tmp_path / "mass-tiny-prose-96.png").stat().st_size > 1000
  written = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".png"}
  assert run(tiny.model(), options, [tiny.prose()], codebooks={"default": tiny.codebook()}) == rows
  assert written == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".png"}


def test_a_method_that_cannot_be_asked_is_refused(monkeypatch):
  monkeypatch.delattr(A2ATSReference, "select")
  options = RecallOptions(methods=parse_methods("a2ats"), T=(96,), limit=1, new=2)
  with pytest.raises(UserError, match="a2ats cannot be asked"):
    run(tiny.model(), options, [tiny.prose()], codebooks={"default": tiny.codebook()})
