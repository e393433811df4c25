"""Tile sizes by measurement: all kernels by their interpreters; wrong or slower sizes stay out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from a2ats_jax import cli, index
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import a2ats, paging
from a2ats_jax.methods.base import Geometry
from a2ats_jax.ops import lookup, paged_decode, stored_tiles
from a2ats_jax.ops.page_fetch import reference
from a2ats_jax.ops.tiles import FetchTiles
from a2ats_jax.plan_known import find_model
from a2ats_jax.rope import RopeConfig, make_rope
from eval import kernels, tune

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_the_interpreters_run_every_kernel_and_no_file_is_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(stored_tiles, "FOLDER", tmp_path)
  cli.main(["tune", "--interpret", "--json"])
  out, err = capsys.readouterr()
  rows = [json.loads(line) for line in out.splitlines()]
  assert not [row["problem"] for row in rows if "problem" in row]
  best = {(row["op"], row["kernel"]) for row in rows if row.get("best")}
  both = ("page_fetch", "paged_decode", "vq_encode")
  assert best == {(op, k) for op in both for k in ("tpu", "gpu")} | {("lookup", "tpu")}
  assert len({json.dumps(row["tiles"]) for row in rows}) > len(
    best
  )  # more than the choice by shape
  assert "of no device; no file was written" in err
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(SystemExit):  # without --interpret a CPU has nothing to tune
    cli.main(["tune"])
  assert "expected a GPU or a TPU, got cpu" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["tpu", "gpu"])
def test_the_checks_take_the_reference_and_nothing_else(family):
  for case in kernels.cases(tune.SMALLEST, family):
    good = case.public(*case.args, implementation="reference")
    assert case.problem(good) is None, case.op
    if case.note != "1 key":
      wrong = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0 if x.ndim == 2 else x.ndim // 2), good)
      assert case.problem(wrong) is not None, case.op


def test_a_shape_that_two_batches_share_is_tried_once(monkeypatch):
  tried = []

  def note(case, *_):
    tried.append(case.op)
    return []

  monkeypatch.setattr(tune, "_try", note)
  layers = [dataclasses.replace(tune.SMALLEST, batch=b, blocks=2 * b) for b in (1, 2)]
  tune.run(layers, "gpu", rounds=1, repeat=1)
  assert sorted(tried) == [*["page_fetch"] * 4, *["paged_decode"] * 4, "vq_encode"]


def _case(kernel):
  layer = dataclasses.replace(tune.SMALLEST, fetched=4)
  case = next(case for case in kernels.cases(layer, "tpu") if case.op == "page_fetch")
  return dataclasses.replace(case, kernel=kernel)


def test_sizes_with_another_result_are_not_timed():
  """Every wrong depth is the fastest by far, in what it leaves out."""

  def kernel(pages, ids, tiles):
    got = reference.page_fetch(pages, ids)
    if tiles.depth == 2:
      raise UserError("too deep")
    return tuple(x.at[-1].set(0) for x in got) if tiles.depth == 4 else got

  case = _case(kernel)
  candidates = [FetchTiles(depth=depth) for depth in (4, 2, 8)]
  wrong, refused, right = tune._try(case, "tpu", candidates, 1, 1)
  assert "bytes differ" in wrong["problem"]
  assert refused["problem"] == "UserError: too deep"
  assert "ms" not in wrong
  assert "ms" not in refused
  assert right["best"]


@pytest.mark.parametrize(("slowest", "best"), [(0.9, 8), (1.1, 2)])
def test_the_choice_by_shape_stays_unless_it_is_beaten_clearly(
  slowest, best, tmp_path, monkeypatch
):
  """And what is kept is read by the op, beside what the file held for other shapes."""
  monkeypatch.setattr(stored_tiles, "FOLDER", tmp_path)
  path = stored_tiles.path_of("cpu")
  shape = {"fetched": 4, "page": 8192, "dtype": "int8", "host": True}
  row = {"op": "page_fetch", "kernel": "tpu", "shape": shape, "by_shape": False}
  rows = [
    row | {"tiles": {"depth": 2}, "by_shape": True, "ms": 1.0, "ms_low": 0.9, "ms_high": 1.2},
    row | {"tiles": {"depth": 8}, "ms": 0.8, "ms_low": 0.7, "ms_high": slowest},
    row | {"tiles": {"depth": 16}, "problem": "does not compile"},
  ]
  tune._best(rows)["best"] = True
  for other in ({"fetched": 9}, {}):
    again = [r | {"shape": shape | other} for r in rows]
    assert tune.store(again, path, kind="cpu", versions="jax 1") == 1
  assert stored_tiles.find("page_fetch", FetchTiles, shape) == FetchTiles(depth=best)
  assert stored_tiles.find("page_fetch", FetchTiles, shape | {"fetched": 9}) is not None
  lines = stored_tiles.read(path, kind="cpu")
  assert [line["by_shape_ms"] for line in lines] == [1.0, 1.0]
  with pytest.raises(UserError, match="expected a2ats-tiles 1 of H100"):
    tune.store(rows, path, kind="H100", versions="jax 1")


def test_the_shapes_are_those_of_a_step():
  """Of 8 heads that need 192 pages each a third, in blocks of 16; eight rows share 8 MiB."""
  options = {"T": 131072, "new": 128, "page": 16, "codewords": 1024, "dtype": "bfloat16"}
  config, budget = find_model("llama-3.1-8b"), Budget(tokens=2048, per="kv_head")
  layers = [tune.layer_of(config, batch=b, budget=budget, **options) for b in (1, 8)]
  assert [(layer.blocks, layer.fetched) for layer in layers] == [(32, 16), (64, 16)]
  assert layers[0].keys == 4096
  case = next(c for c in kernels.cases(dataclasses.replace(layers[0], pages=128), "gpu"))
  assert case.shape == {"fetched": 512, "page": 4096, "dtype": "bfloat16", "host": False}
  assert case.args[0].dtype == jnp.bfloat16


def test_cases_have_the_shapes_that_a_step_asks_for(monkeypatch):
  """Sizes stored for another shape would never be read."""
  asked = []

  def noting(op, function):
    def run(*args, **kwargs):
      asked.append((function.__name__, op.shape_of(*args, **kwargs)))
      return function(*args, **kwargs)

    return run

  monkeypatch.setattr(index, "lookup", noting(lookup, lookup.lookup))
  for module in (a2ats, paging):
    monkeypatch.setattr(module, "paged_decode", noting(paged_decode, paged_decode.paged_decode))
  config, budget = find_model("llama-3.1-8b"), Budget(tokens=256, per="kv_head")
  options = {"T": 2000, "page": 16, "codewords": 32, "new": 64, "dtype": "bfloat16", "batch": 2}
  layer = tune.layer_of(config, budget=budget, **options)
  shape = (1, layer.kv_heads, layer.codewords, layer.head_dim)
  eye = jnp.broadcast_to(jnp.eye(layer.head_dim), (*shape[:2], *(layer.head_dim,) * 2))
  method = a2ats.A2ATS(
    codebook=make_codebook(jnp.zeros(shape), eye),
    budget=budget,
    far=FarPosition.segments(8),
    tail="centroid",
  )
  geometry = Geometry(
    batch=2,
    layers=1,
    heads=layer.heads,
    kv_heads=layer.kv_heads,
    head_dim=layer.head_dim,
    prompt=2000,
    new=64,
    dtype=jnp.dtype(jnp.bfloat16),
  )
  rope = make_rope(RopeConfig(head_dim=layer.head_dim, theta=1e4))

  def step(q, k):
    positions = jnp.zeros((2, 1), jnp.int32)
    state = method.init(geometry)
    return method.attend(state, q, k, k, positions=positions, rope=rope, layer=0)[0]

  heads = [(2, 1, n, layer.head_dim) for n in (layer.heads, layer.kv_heads)]
  jax.eval_shape(step, *(jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in heads))
  tried = [*kernels.cases(layer, "gpu"), *kernels.cases(layer, "tpu")]
  tried = [
    c for c in tried if c.op == "lookup" or (c.op == "paged_decode" and not c.shape["bytes"])
  ]
  assert len(tried) == 5
  for case in tried:
    assert (case.op, case.shape) in asked
