"""The speed benchmark: what is timed is the real step, and the rows say all of it. No clocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import cli
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import encode
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import decode_step
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.registry import MethodSpec
from a2ats_jax.rope import make_rope, rotate
from eval import lanes, plots, speed_attention, speed_inputs, speed_model, tables, timing
from eval.options import Case, parse_methods
from eval.record import record, replay
from eval.speed import BASELINES, SpeedOptions, run_attention, run_model
from eval.speed_inputs import REAL, LayerShape, draw, draw_codebook
from tests.eval import tiny

SHAPE = LayerShape(heads=4, kv_heads=2, head_dim=8, codewords=16)
PAGED = "a2ats-plus:far=segments(3):window=8:sinks=2:page=4"
KEYS = [
  *("benchmark", "task", "model", "method", "options", "T", "batch", "dtype", "budget", "per"),
  *("ms", "ms_low", "ms_high", "baseline", "baseline_ms", "ratio", "full_ms", "read", "selected"),
  *("moved_bytes", "device_bytes", "host_bytes", "temp_bytes", "n", "seed"),
]
PARTS = ["score_ms", "score_ms_low", "selection_ms", "selection_ms_high", "selection_share"]


def _options(**changes):
  given = {
    "methods": parse_methods(PAGED),
    "budgets": (Budget(ratio=0.1), Budget(tokens=12, per="kv_head")),
    "T": (64,),
    "rounds": 2,
    "shape": SHAPE,
  }
  return SpeedOptions(**(given | changes))


@pytest.fixture(scope="module")
def rows():
  return run_attention(_options())


# --- what is drawn ---


def test_codewords_hold_the_shares_of_the_law():
  shape = LayerShape(heads=8, kv_heads=8, head_dim=4, codewords=64)
  drawn = draw(shape, T=20000, new=1, seed=0)
  counts = np.stack([np.bincount(drawn.codes[0, :, head], minlength=64) for head in range(8)])
  use, law = speed_inputs.usage(counts), REAL.shares(64)
  assert law.sum() == pytest.approx(1)
  assert law[1] / law[0] == pytest.approx(2**-REAL.power * np.exp(-REAL.decay / 64))
  assert use["top1"] == pytest.approx(law[0], abs=0.005)
  assert use["top10"] == pytest.approx(law[:10].sum(), abs=0.01)
  assert use["top100"] == pytest.approx(1)
  assert use["entropy"] == pytest.approx(-(law * np.log2(law)).sum(), abs=0.02)


def test_the_law_at_1024_codewords_is_the_measured_one():
  """SmolLM2's figures over 8028 far tokens, from docs/speed_inputs.py."""
  law, rng = REAL.shares(1024), np.random.default_rng(0)
  use = speed_inputs.usage(rng.multinomial(8028, law, size=30))
  assert use["top1"] == pytest.approx(0.035, abs=0.004)
  assert use["top10"] == pytest.approx(0.199, abs=0.01)
  assert use["top100"] == pytest.approx(0.683, abs=0.015)
  assert use["entropy"] == pytest.approx(7.80, abs=0.12)


def test_codewords_resemble_their_neighbours_and_share_a_part():
  book, _ = draw_codebook(LayerShape(heads=4, kv_heads=4, head_dim=64, codewords=512), seed=1)
  words = np.asarray(book.codewords[0], np.float64)
  common = words.mean(axis=1, keepdims=True)
  own = words - common
  rms = np.sqrt((own**2).sum(-1).mean(-1))
  assert np.linalg.norm(common[:, 0], axis=-1) / rms == pytest.approx(REAL.common, abs=0.5)
  near, far = (((own[:, lag:] * own[:, :-lag]).sum(-1).mean(-1) / rms**2).mean() for lag in (1, 64))
  assert near == pytest.approx(0.75, abs=0.05)  # 0.737 in SmolLM2's codebooks
  assert far < 0.2


def test_a_key_keeps_the_code_it_was_drawn_with():
  for dtype in (jnp.float32, jnp.bfloat16):
    drawn = draw(LayerShape(), T=64, new=1, seed=0, dtype=dtype)
    assert drawn.keys.dtype == dtype
    np.testing.assert_array_equal(encode(drawn.keys, drawn.book.layer(0)), drawn.codes)


def test_queries_of_a_group_agree_as_the_law_says():
  drawn = draw(SHAPE, T=2, new=4000, seed=0)
  q = np.asarray(drawn.q)[0].reshape(4000, 2, 2, 8)
  assert np.mean(q[:, :, 0] * q[:, :, 1]) == pytest.approx(REAL.group, abs=0.03)
  assert np.mean(q[:, 0] * q[:, 1]) == pytest.approx(0, abs=0.03)


def test_a_draw_depends_on_its_seed_and_the_codebook_on_nothing_else():
  one, same, other = (draw(SHAPE, T=32, new=2, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one.keys, same.keys)
  assert np.abs(np.asarray(one.keys) - np.asarray(other.keys)).max() > 0.1
  longer = draw(SHAPE, T=48, new=3, seed=0, batch=2)
  np.testing.assert_array_equal(longer.book.codewords, one.book.codewords)
  assert longer.q.shape == (2, 3, 4, 8)


# --- what is timed ---


def test_rounds_take_turns_and_warm_up_is_left_out():
  calls, ticks = [], []
  programs = {name: lambda name=name: calls.append(name) for name in "abc"}
  times = timing.interleaved(
    programs, rounds=2, warmup=1, calls=2, tick=lambda done, of: ticks.append((done, of))
  )
  assert "".join(calls) == "aabbccccbbaaaabbcc"
  assert ticks == [(1, 3), (2, 3), (3, 3)]
  assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}
  assert timing.summary(np.array([3.0, 1.0, 2.0, 5.0, 4.0]), "x_") == {
    "x_ms": 3.0,
    "x_ms_low": 2.0,
    "x_ms_high": 4.0,
  }


def _methods(drawn):
  """The paged method at two budgets, and the reference of each."""
  common = {"far": FarPosition.segments(3), "tail": "centroid", "window": 8, "sinks": 2}
  for budget in (Budget(ratio=0.1), Budget(tokens=12, per="kv_head")):
    same = common | {"codebook": drawn.book, "budget": budget}
    yield budget, A2ATS(**same, page=4), A2ATSReference(**same)


def test_the_timed_step_is_the_references():
  """Budgets share one state and take turns; each output is that of the reference there."""
  drawn = draw(SHAPE, T=64, new=12, seed=3, batch=2)
  spec = parse_methods(PAGED)[0]
  methods = list(_methods(drawn))
  cases = [Case(spec=spec, budget=budget, method=paged) for budget, paged, _ in methods]
  variants = speed_attention.variants_of(cases, drawn, SHAPE, dtype=jnp.float32)
  assert variants[0].lane is variants[1].lane
  rope, geometry = _where(drawn)
  for variant in variants:  # parts leave the state alone
    for part in variant.parts.values():
      part()
  state = speed_attention.absorb(methods[0][2], drawn.keys, drawn.values, rope, geometry=geometry)
  for i, token in enumerate(speed_attention.tokens_of(drawn)):
    variant, reference = variants[i % 2], methods[i % 2][2]
    out, _ = variant.step()
    expected, state, stats = speed_attention.attend(reference, state, *token, rope)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_array_equal(variant.stats[-1].selected, stats.selected)
  with pytest.raises(ValueError, match="all of its 12 tokens are used up"):
    variants[0].step()


def test_the_choice_that_is_timed_is_the_steps():
  drawn = draw(SHAPE, T=64, new=1, seed=5)
  budget, paged, _ = next(iter(_methods(drawn)))
  case = Case(spec=parse_methods(PAGED)[0], budget=budget, method=paged)
  (variant,) = speed_attention.variants_of([case], drawn, SHAPE, dtype=jnp.float32)
  assert list(variant.parts) == ["score", "selection"]
  variant.step()
  # of the state after the step, where its token has been indexed, and of the same query
  variant.parts["score"]()
  taken, _, pages, _ = variant.parts["selection"]()
  stats = variant.stats[-1]
  np.testing.assert_array_equal(np.asarray(taken).sum(-1), np.asarray(stats.selected)[:, 0])
  np.testing.assert_array_equal(pages, np.asarray(stats.pages)[:, 0])


def test_a_part_is_done_as_often_as_its_time_is_divided_by(monkeypatch):
  """Two arguments in turn, the second last; and its row holds the time of doing it once."""
  seen = []

  def of(x):
    jax.debug.callback(lambda x: seen.append(int(x)), x, ordered=True)
    return x

  assert int(speed_attention._in_turn(of, (jnp.int32(3), jnp.int32(4)))) == 4
  jax.effects_barrier()
  assert seen == [3, 4] * (lanes.REPEATS // 2)
  budget, paged, _ = next(iter(_methods(drawn := draw(SHAPE, T=64, new=3, seed=5))))
  case = Case(spec=parse_methods(PAGED)[0], budget=budget, method=paged)
  variants = speed_attention.variants_of([case], drawn, SHAPE, dtype=jnp.float32)
  variants[0].step()

  def interleaved(programs, **_):
    return {name: np.array([8.0 * lanes.REPEATS]) for name in programs}

  monkeypatch.setattr(lanes, "interleaved", interleaved)
  (row,) = lanes.measure(variants, rounds=1, warmup=0)
  assert row["ms"] == [8.0 * lanes.REPEATS]
  assert row["score_ms"] == row["selection_ms"] == [8.0]


def _where(drawn):
  batch, t = drawn.keys.shape[:2]
  new = drawn.q.shape[1]
  geometry = speed_attention.geometry_of(SHAPE, batch=batch, T=t, new=new, dtype=jnp.float32)
  return make_rope(SHAPE.rope), geometry


def test_the_baselines_are_plain_attention():
  drawn = draw(SHAPE, T=20, new=2, seed=4, batch=2)
  rope, geometry = _where(drawn)
  full = Case(spec=MethodSpec(name="full"), budget=None, method=Full())
  dot = Case(spec=MethodSpec(name="dot"), budget=None, method=speed_attention.DotProduct())
  steps, arrays = (
    speed_attention.variants_of([case], drawn, SHAPE, dtype=jnp.float32)[0] for case in (full, dot)
  )
  state = speed_attention.absorb(Full(), drawn.keys, drawn.values, rope, geometry=geometry)
  spread = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32)[None], (2, 20))
  keys = np.repeat(np.asarray(rotate(drawn.keys, spread, rope), np.float64), 2, axis=2)
  values = np.repeat(np.asarray(drawn.values, np.float64), 2, axis=2)
  for token in speed_attention.tokens_of(drawn):
    out, now = steps.step()
    expected, state, stats = speed_attention.attend(Full(), state, *token, rope)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_array_equal(now.k, state.k)
    np.testing.assert_array_equal(steps.stats[-1].read, stats.read)
    # the other one attends to the prompt alone
    q = np.asarray(rotate(token[0], token[3], rope), np.float64)[:, 0]
    weight = np.exp(np.einsum("bhd,bthd->bht", q, keys) / np.sqrt(8))
    weight /= weight.sum(-1, keepdims=True)
    plain = np.einsum("bht,bthd->bhd", weight, values)
    np.testing.assert_allclose(arrays.step()[0][:, 0], plain, atol=1e-5)


def test_full_attentions_step_copies_no_cache():
  """Its temporary memory is that of the scores; a copy of keys alone would be ten times that."""
  shape = LayerShape(heads=4, kv_heads=2, head_dim=64, codewords=8)
  drawn = draw(shape, T=4096, new=1, seed=0)
  full = Case(spec=MethodSpec(name="full"), budget=None, method=Full())
  (variant,) = speed_attention.variants_of([full], drawn, shape, dtype=jnp.float32)
  keys = 2 * 4096 * 64 * 4
  assert variant.temp_bytes is not None
  assert variant.temp_bytes < keys / 4


def test_rows_of_a_repeated_state_decode_as_the_one_row():
  model, tokens = tiny.model(), np.arange(40, 72, dtype=np.int32)[None]
  recording = record(model.decoder, tokens, np.array([32], np.int32))
  method = A2ATS(codebook=tiny.codebook(), budget=Budget(ratio=0.2), window=8, sinks=2, page=4)
  case = Case(spec=parse_methods(PAGED)[0], budget=method.budget, method=method)
  fed = np.array([50, 60], np.int32)
  (variant,) = speed_model.variants_of([case], model, recording, fed, T=32, batch=3)
  state = replay(model.config, recording, method, new=2)
  assert lanes.bytes_of(variant.lane.state)["host_bytes"] == 3 * lanes.bytes_of(state)["host_bytes"]
  for i, token in enumerate(fed):
    out, _ = variant.step()
    place = jnp.full((1, 1), 32 + i, jnp.int32)
    alone, state, _ = decode_step(
      model.decoder, method, state, jnp.full((1, 1), token, jnp.int32), place
    )
    np.testing.assert_allclose(out, jnp.repeat(alone, 3, axis=0), atol=1e-4)


def test_attention_in_blocks_is_full_attention(monkeypatch):
  monkeypatch.setattr(speed_model, "_BLOCK", 12)
  model, tokens = tiny.model(), np.arange(40, 104, dtype=np.int32).reshape(2, 32)
  lengths = np.array([32, 17], np.int32)
  recording = record(model.decoder, tokens, lengths)
  methods = Full(), speed_model.Blocked()
  states = [replay(model.config, recording, method, new=3) for method in methods]
  for place in (lengths[:, None], np.array([[33], [-1]]), np.array([[34], [18]])):
    fed = jnp.asarray(place % 7 + 40, jnp.int32)
    outs, caches = [], []
    for method, state in zip(methods, states):
      out, state, stats = decode_step(
        model.decoder, method, state, fed, jnp.asarray(place, jnp.int32)
      )
      outs.append((np.asarray(out)[place[:, 0] >= 0], np.asarray(stats.read)))
      caches.append(state)
    np.testing.assert_allclose(outs[0][0], outs[1][0], atol=1e-4)
    np.testing.assert_array_equal(outs[0][1], outs[1][1])
    np.testing.assert_allclose(caches[0].k, caches[1].k, atol=1e-4)
    states = caches


# --- rows ---


def test_rows_hold_the_designs_keys(rows):
  assert [(row["method"], row["budget"], row["per"]) for row in rows] == [
    ("full", None, None),
    ("dot_product_attention", None, None),
    ("a2ats-plus", 0.1, "query_head"),
    ("a2ats-plus", 12, "kv_head"),
  ]
  for row in rows:
    assert set(KEYS) <= set(row), set(KEYS) - set(row)
    json.dumps(row, allow_nan=False)
    assert (row["benchmark"], row["task"], row["n"]) == ("speed", "attention", 2)
    assert row["ratio"] == row["baseline_ms"] / row["ms"]
    assert row["baseline"] in BASELINES
    assert row["baseline_ms"] == min(row["full_ms"], row["dot_product_attention_ms"])
    assert row["baseline_ms"] == row[f"{row['baseline']}_ms"]
    assert row["ms_low"] <= row["ms"] <= row["ms_high"]
  for row in rows[2:]:
    assert set(PARTS) <= set(row)
    assert row["selection_share"] == row["selection_ms"] / row["ms"]
    assert row["host_bytes"] > 0
    assert row["pages"] > 0
    assert row["selected"] < row["read"] < 1
  assert rows[0]["read"] == 1.0
  assert rows[0]["ms"] == rows[0]["full_ms"]
  assert LayerShape().name == "llama-3.1-8b layer"
  assert rows[0]["model"] == "layer H=4 K=2 D=8"


def test_bytes_are_those_of_the_arrays(rows):
  full, dot, paged, _ = rows
  new = 5 * 3 * 2  # three rounds to warm up and two timed, three calls each, of two budgets
  assert full["device_bytes"] == 2 * 2 * (64 + new) * 8 * 4
  assert dot["device_bytes"] == 2 * 2 * 64 * 8 * 4
  assert full["moved_bytes"] == dot["moved_bytes"] == 0
  assert paged["host_bytes"] == 2 * 2 * (64 + 32) * 8 * 4  # whole pages of 4


def test_tables_and_plots_take_the_rows(rows, tmp_path, monkeypatch):
  text = tables.table(rows)
  assert [c.header for c in text.columns][:3] == ["method", "budget", "chosen"]
  assert list(text.columns[1].cells) == ["-", "-", "0.1", "12/kv"]
  seen = []
  monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, **_: seen.append(self))
  plots.speed([*rows, *(row | {"T": 128} for row in rows)], tmp_path / "p", baselines=BASELINES)
  (axis,) = seen[0].axes
  assert [line.get_linestyle() for line in axis.lines] == ["--", "--", "-", "-"]
  assert [line.get_label() for line in axis.lines][2:] == ["a2ats-plus, 0.1", "a2ats-plus, 12/kv"]
  assert list(axis.lines[0].get_xdata()) == [64, 128]
  assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


@pytest.mark.parametrize(
  ("T", "budgets"),
  [(5, (Budget(ratio=0.5),)), (40, (Budget(tokens=4096), Budget(tokens=0)))],
  ids=["shorter than the window", "budgets beyond the prompt and of nothing"],
)
def test_corners_are_timed_too(T, budgets):
  rows = run_attention(_options(T=(T,), budgets=budgets, dtypes=("bfloat16",), rounds=1))
  assert [row["dtype"] for row in rows] == ["bfloat16"] * (2 + len(budgets))
  if T == 40:
    assert rows[2]["read"] == 1.0  # sinks, window and all between
    assert rows[3]["selected"] == 0.0


def test_any_method_can_be_timed():
  near = "window=8:sinks=2"
  methods = parse_methods(f"full,oracle:{near},a2ats:{near}:book=other")
  rows = run_attention(_options(methods=methods, budgets=(Budget(ratio=0.2),), rounds=1))
  names = ["full", "dot_product_attention", "oracle", "a2ats"]
  assert [row["method"] for row in rows] == names


def test_full_attention_alone_is_a_run():
  rows = run_attention(_options(methods=parse_methods("full"), rounds=1))
  assert [row["method"] for row in rows] == ["full", "dot_product_attention"]


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path):
  def options():
    return _options(T=(32, 16), methods=parse_methods("full"), rounds=1, out=tmp_path)

  def kill(phase, done, total, **figures):
    if phase == "speed" and done == 3:  # inside the second of two groups
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run_attention(options(), progress=kill)
  assert not (tmp_path / "metrics.json").exists()
  (first,) = (tmp_path / "predictions.jsonl").read_text().splitlines()
  calls = []
  rows = run_attention(options(), progress=lambda phase, *done, **_: calls.append((phase, *done)))
  assert calls[0] == ("speed", 2, 4)
  assert sum(call == ("rounds", 4, 4) for call in calls) == 1
  assert (tmp_path / "predictions.jsonl").read_text().splitlines()[0] == first
  assert [row["T"] for row in rows] == [16] * 2 + [32] * 2
  assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == rows
  assert (tmp_path / "speed.png").stat().st_size > 1000
  # from the lines alone, and the same rows
  assert run_attention(options()) == rows
  with pytest.raises(UserError, match="rounds was 1 and is now 2"):
    run_attention(_options(**(vars(options()) | {"rounds": 2})))


def test_a_models_rows(tmp_path):
  options = _options(
    what="model", T=(48,), batch=(1, 3), budgets=(Budget(ratio=0.1),), rounds=1, out=tmp_path
  )
  books = {"default": tiny.codebook()}
  rows = run_model(tiny.model(), options, tiny.prose(), codebooks=books)
  assert len(rows) == 2 * 3
  for row in rows:
    assert set(KEYS) <= set(row)
    assert row["tokens_per_s"] == row["batch"] * 1000 / row["ms"]
    assert (row["model"], row["task"]) == ("tiny", "model")
    assert row["baseline_ms"] == min(row["full_ms"], row["blocked_ms"])
    assert "selection_ms" not in row
  one, three = (next(r for r in rows if r["batch"] == n and r["budget"]) for n in (1, 3))
  assert three["moved_bytes"] == 3 * one["moved_bytes"]
  assert three["host_bytes"] == 3 * one["host_bytes"]
  assert three["selected"] == pytest.approx(one["selected"])
  assert three["pages"] == one["pages"]
  assert (tmp_path / "speed.png").exists()
  with pytest.raises(UserError, match="2045 tokens and 30 timed ones exceed the model"):
    run_model(tiny.model(), _options(what="model", T=(2045,)), tiny.prose(), codebooks=books)
  with pytest.raises(UserError, match="--codebook"):
    run_model(tiny.model(), _options(what="model"), tiny.prose())


# --- the command ---

SMALL = ("eval", "speed", "--T", "32", "--rounds", "1", "--methods", PAGED, "--budget", "9/kv")
LAYER = ("--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--codewords", "8")


def test_help_names_the_units(capfd):
  with pytest.raises(SystemExit) as caught:
    cli.main(["eval", "speed", "--help"])
  text = " ".join(capfd.readouterr().out.replace("│", " ").split())
  assert caught.value.code == 0
  assert "Prompt lengths in tokens" in text
  assert "{None}" not in text


def test_the_command_prints_json_lines(capfd):
  cli.main([*SMALL, *LAYER, "--dtype", "float32", "--json"])
  rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
  assert [row["budget"] for row in rows] == [None, None, 9]


def test_the_command_prints_a_table(capfd, tmp_path):
  methods = "oracle:window=8:sinks=2"
  cli.main([*SMALL, *LAYER, "--batch", "2", "--methods", methods, "--out", str(tmp_path)])
  out = capfd.readouterr().out
  assert "bfloat16" in out
  assert "9/kv" in out
  assert f"results in {tmp_path}" in out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--T", "1"), "T: expected at least 2, got 1"),
    (("--T", "32,32"), "T: 32 is named twice"),
    (("--batch", "0"), "batch: expected at least 1, got 0"),
    (("--dtype", "float16"), "dtype: expected float32 or bfloat16, got 'float16'"),
    (("--rounds", "0"), "rounds: expected at least 1, got 0"),
    (("--seed", "-1"), "seed: expected 0 or more, got -1"),
    (("--heads", "5"), "heads: 5 query heads are not a multiple of 2 KV heads"),
    (("--head-dim", "7"), "head size must be even"),
    (("--codewords", "0"), "codewords: expected at least 1, got 0"),
    (("--budget", "2/head"), "budget: expected a ratio"),
    (("--methods", "none"), "unknown name 'none'"),
    (("--codebook", "somewhere"), "codebook: has no meaning with --what attention"),
    (("--what", "model"), "heads: has no meaning with --what model"),
  ],
)
def test_a_mistake_is_one_line(capfd, arguments, message):
  with pytest.raises(SystemExit) as caught:
    cli.main([*SMALL, *LAYER, *arguments])
  out, err = capfd.readouterr()
  assert caught.value.code == 2
  assert message in err
  assert out == ""
  assert len(err.splitlines()) == 1


def test_a_model_runs_in_float32():
  with pytest.raises(UserError, match="dtype: a model runs in float32, got bfloat16"):
    _options(what="model", dtypes=("bfloat16",))
