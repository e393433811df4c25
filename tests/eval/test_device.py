"""The report on a device, in its small form; and a batch that does not fit."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from a2ats_jax import cli
from a2ats_jax.budget import Budget
from a2ats_jax.methods.base import Geometry
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.plan_known import find_model
from a2ats_jax.rope import make_rope
from eval import device, device_step, kernels, tune
from eval.speed_attention import absorb

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_the_small_form_reports_everything(tmp_path, capsys):
  out = tmp_path / "device.jsonl"
  cli.main(["device", "--small", "--json", "--out", str(out), "--trace", str(tmp_path / "trace")])
  printed, said = capsys.readouterr()
  rows = [json.loads(line) for line in printed.splitlines()]
  assert out.read_text() == printed
  assert "of no accelerator" in said
  assert all(row["small"] and row["device"] == "cpu" for row in rows)
  kinds = {
    what: [row for row in rows if row["what"] == what]
    for what in ("card", "copy", "kernel", "step")
  }
  assert kinds["card"][0]["versions"]["jax"] == jax.__version__
  assert {row["copy"] for row in kinds["copy"]} == {"host to device", "device to device"}
  assert len(kinds["kernel"]) == 5
  for row in kinds["kernel"]:
    assert row["implementation"] == "reference"
    assert "ok" not in row  # nothing was compared with itself
    copy = next(r for r in kinds["copy"] if r["copy"] == row["of"])
    assert row["share"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
  full, paged = kinds["step"]
  assert (full["method"], paged["method"]) == ("full", "a2ats-plus")
  assert paged["ratio"] == pytest.approx(paged["tokens_per_s"] / full["tokens_per_s"])
  assert paged["tokens_per_s"] == pytest.approx(2e3 / paged["ms"])
  assert paged["host_bytes"] > 0
  assert full["host_bytes"] == 0
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_a_kernel_is_held_to_its_op(wrong, monkeypatch):
  """Stand-ins for a kernel that this machine could not run: the op itself, and one that is off."""
  able = dataclasses.replace(device._OPS["paged_decode"]["gpu"], hindrances=lambda *_: [])
  monkeypatch.setattr(device, "_OPS", {"paged_decode": {"gpu": able}})
  case = next(case for case in kernels.cases(tune.SMALLEST, "gpu") if case.op == "paged_decode")

  def public(*args, implementation):
    part = case.public(*args, implementation="reference")
    return dataclasses.replace(part, out=part.out + (wrong if implementation == "gpu" else 0.0))

  rates = {"host to device": 1.0, "device to device": 1.0}
  kernel, reference = device._run(
    dataclasses.replace(case, public=public), "gpu", "gpu", rates, rounds=1, repeat=1
  )
  assert kernel["ok"] is not bool(wrong)
  assert ("problem" in kernel, "ms" in kernel) == (bool(wrong), not wrong)
  assert "ok" not in reference
  assert reference["ms"] > 0


def _options(**changes):
  given = device_step.StepOptions(
    config=find_model("llama-3.1-8b"),
    method="a2ats-plus",
    budget=Budget(tokens=32, per="kv_head"),
    codewords=16,
    T=(64,),
    batch=(),
    dtype="float32",
    rounds=1,
    seed=0,
    trace=None,
  )
  return dataclasses.replace(device_step.small(given), **({"T": (64,)} | changes))


@functools.cache
def _decoder():
  return Decoder(_options().config, rngs=nnx.Rngs(0))


def _made(options, method, chip):
  drawn = device_step._drawn(options, 64)
  return device_step._Made(options, _decoder(), drawn, 64, method, chip)


CHIP = device_step.chip_of(10**9, {"device to device": 1.0, "host to device": 1.0})


@pytest.mark.parametrize("name", ["full", "a2ats-plus"])
def test_the_cache_is_that_of_equal_rows_in_every_layer(name):
  made = _made(_options(), name, CHIP)
  method, c = made.method(2), made.options.config
  got = made.state(method, 3)
  geometry = Geometry(
    batch=3,
    layers=1,
    heads=c.heads,
    kv_heads=c.kv_heads,
    head_dim=c.head_dim,
    prompt=64,
    new=made.options.new,
  )
  keys, values = (jnp.tile(x, (3, 1, 1, 1)) for x in made.drawn[1:])
  want = absorb(made.method(1), keys, values, make_rope(c.rope), geometry=geometry)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  places = [x.sharding.memory_kind for x in jax.tree.leaves(got)]
  assert places == [x.sharding.memory_kind for x in jax.tree.leaves(want)]
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    layers = [x] if x.shape == y.shape else [x[0][None], x[1][None]]
    for layer in layers:
      np.testing.assert_array_equal(layer, y)


def test_a_batch_without_room_is_a_row_and_the_run_goes_on(monkeypatch):
  """The plan's batch fails twice before three quarters of three quarters of it run."""
  tried = []

  def timed(self, batch):
    tried.append((self.spec.name, batch))
    if batch > 50:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nallocating 9 bytes")
    return {"ms": 10.0, "ms_low": 9.0, "ms_high": 11.0}

  monkeypatch.setattr(device_step._Made, "timed", timed)
  monkeypatch.setattr(device_step._Made, "most", lambda self: 80)
  monkeypatch.setattr(device_step, "random_decoder", lambda *args: _decoder())
  rows = device_step.run(_options(batch=()), CHIP)
  assert tried == [(name, b) for name in ("full", "a2ats-plus") for b in (1, 80, 60, 45)]
  failed = [row for row in rows if "problem" in row]
  assert [row["batch"] for row in failed] == [80, 60, 80, 60]
  assert failed[0]["problem"] == "JaxRuntimeError: RESOURCE_EXHAUSTED: out of memory"
  assert [row["ratio"] for row in rows if "ratio" in row] == pytest.approx([1 / 45, 1.0])


def test_the_largest_batch_is_the_plans():
  """Full attention's by the device's memory; the method's cache lies on the host."""
  full, paged = (_made(_options(), name, CHIP) for name in ("full", "a2ats-plus"))
  slots = 64 + full.options.new
  cache = 2 * 2 * 2 * slots * 64 * 4  # keys and values, layers, KV heads, numbers
  assert 10**9 // (2 * cache) < full.most() < 10**9 // cache
  assert paged.most() > 0
  unknown = device_step.chip_of(None, {"device to device": 1.0})
  assert _made(_options(), "full", unknown).most() == 0
