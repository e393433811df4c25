"""Methods side by side: figures of the benchmarks, live bytes, and a run that goes on."""

import json

import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from eval import compare, fidelity, needle, plots
from eval.compare import CompareOptions, columns, run, side_by_side
from eval.options import parse_methods
from tests.eval import tiny

METHODS = "snapkv:window=8,kivi:group=4:residual=8,a2ats:window=8:sinks=2:page=4"
WIDE, DEEP = 1024, 2 * 2 * 2 * 8 * 4  # tokens; bytes of a token: 2 layers, K and V, 2 heads


def _options(**changes):
  given = {
    "methods": parse_methods(METHODS),
    "budgets": (Budget(ratio=0.25),),
    "T": (WIDE,),
    "limit": 2,
    "new": 4,
    "answer": 3,
    "haystacks": ("noise",),
  }
  return CompareOptions(**(given | changes))


def _run(options, **more):
  books = {"default": tiny.codebook()}
  return run(tiny.model(), options, [tiny.prose()], codebooks=books, **more)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def rows(out):
  return _run(_options(out=out))


def test_a_row_for_each_method_holds_every_figure(rows):
  assert [row["method"] for row in rows] == ["full", "oracle", "snapkv", "kivi", "a2ats"]
  assert columns(rows)[-3:] == ["kl tiny prose", "kl_se tiny prose", "score niah-noise"]
  for row in rows:
    assert all(row[name] is not None for name in columns(rows)), row
    assert row["n"] == 4
  full = rows[0]
  assert full["kl tiny prose"] == 0.0
  assert full["read"] == 1.0


def test_bytes_are_those_of_live_arrays(rows):
  """The mean over both benchmarks, whose states have room for 4 and for 3 later tokens."""
  full, _, snapkv, kivi, paged = rows
  assert full["device_bytes"] == DEEP * (WIDE + 3.5)
  assert (full["host_bytes"], full["moved_bytes"]) == (0, 0)
  slots = 2 * (WIDE // 4 + 3.5)
  assert snapkv["device_bytes"] == 2 * slots * (2 * 8 * 4 + 4) + 2 * 2 * 4
  assert kivi["device_bytes"] < full["device_bytes"] / 2
  assert paged["host_bytes"] == DEEP * (WIDE + 4)  # whole pages of 4
  assert 0 < paged["moved_bytes"] < paged["host_bytes"]
  assert kivi["moved_bytes"] == snapkv["moved_bytes"] == 0


def test_figures_are_the_benchmarks_own(rows):
  options = _options()
  books = {"default": tiny.codebook()}
  alone = fidelity.run(tiny.model(), options.of("fidelity"), [tiny.prose()], codebooks=books)
  assert [row["kl tiny prose"] for row in rows] == [row["kl"] for row in alone]
  alone = needle.run(tiny.model(), options.of("needle"), [tiny.prose()], codebooks=books)
  assert [row["score niah-noise"] for row in rows] == [row["score"] for row in alone]


def test_it_leaves_a_table_plots_and_both_benchmarks(rows, out):
  for name in ("table.md", "metrics.json", "config.yaml", "kl-read-bytes.png"):
    assert (out / name).stat().st_size > 0
  for name in ("kl-device-bytes.png", "score-read-bytes.png", "score-device-bytes.png"):
    assert (out / name).read_bytes().startswith(b"\x89PNG")
  lines = (out / "table.md").read_text().splitlines()
  assert len(lines) == 2 + len(rows)
  assert lines[0].startswith("| method | budget | read | bytes read | moved | device | host | kl ")
  assert lines[2].startswith("| `full` | - | 1 |")
  kept = json.loads((out / "metrics.json").read_text())["rows"]
  assert {row["benchmark"] for row in kept} == {"fidelity", "needle"}
  assert side_by_side(kept) == rows


def test_a_stopped_run_goes_on_without_repeating(rows, out, monkeypatch):
  """A finished prompt is not run again, and the table is the same."""
  path = out / "needle" / "predictions.jsonl"
  whole = path.read_text()
  path.write_text(whole.splitlines(keepends=True)[0])
  monkeypatch.setattr(fidelity, "_measure", None)  # which would fail if it were called
  assert _run(_options(out=out)) == rows
  assert path.read_text() == whole


def test_another_comparison_is_refused(rows, out):
  with pytest.raises(UserError, match="budgets"):
    _run(_options(out=out, budgets=(Budget(ratio=0.5),)))


def test_bad_options_are_refused_before_anything_runs(tmp_path):
  with pytest.raises(UserError, match="benchmarks: expected fidelity or needle, got speed"):
    _options(benchmarks=("speed",))
  with pytest.raises(UserError, match="T"):
    _run(_options(T=(20,), out=tmp_path / "short"))
  assert not (tmp_path / "short").exists()


def test_the_frontier_by_hand():
  points = [(1.0, 0.5), (2.0, 0.6), (2.0, 0.4), (3.0, 0.1), (4.0, 0.2)]
  assert plots.frontier(points, low=True) == [(1.0, 0.5), (2.0, 0.4), (3.0, 0.1)]
  assert plots.frontier(points, low=False) == [(1.0, 0.5), (2.0, 0.6)]


def test_all_is_every_method_but_the_reference():
  names = [spec.name for spec in parse_methods("all")]
  assert "a2ats-reference" not in names
  assert {"full", "kivi", "a2ats-plus", "shadowkv"} <= set(names)
  assert parse_methods("all,kivi:bits=2")[-1].options_text.startswith("bits=2")
  assert compare.CompareOptions().methods == parse_methods("all")
