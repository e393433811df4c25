"""A sequence over devices: the tokens of one device, its output, and no traffic that grows."""

import dataclasses
import math
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import save_codebooks
from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.sharded import shard_method
from a2ats_jax.methods.streaming import Streaming
from a2ats_jax.prefix_file import load_prefix
from a2ats_jax.sequence import OverSequence
from a2ats_jax.sharding import make_mesh
from tests import cases
from tests.eval import tiny as eval_tiny
from tests.sequence_cases import CACHES, PROMPT, SHAPE, draw, method_of, run

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/sequence.md"
DEVICES = 8

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def mesh():
  return jax.make_mesh((DEVICES,), ("sequence",))


def assert_same(got, want) -> None:
  """Close outputs; the same tokens chosen and read, step by step."""
  (out, _, stats), (wanted, _, told) = got, want
  np.testing.assert_allclose(out, wanted, atol=cases.TOLERANCE, rtol=0)
  for name in ("length", "selected", "read"):
    np.testing.assert_array_equal(getattr(stats, name), getattr(told, name), name)
  np.testing.assert_allclose(stats.tail, told.tail, atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("style", CACHES)
@pytest.mark.parametrize("name", ["full", "a2ats", "a2ats by arrival, KV head", "a2ats-plus"])
def test_equals_one_device(name, style):
  """Ragged rows through thirty tokens and seven sealed pages; every output and every choice."""
  cache, method = draw(style), method_of(name)
  assert_same(run(OverSequence(method, mesh()), cache), run(method, cache))


def test_two_processes_over_loopback(tmp_path):
  """Two devices each: both give what one device gives here, and each holds half of the pages."""
  out, _, stats = run(method_of("a2ats-plus"), draw("skewed"))
  blocks = list(generate(eval_tiny.model().decoder, Full(), [PROMPT], new=5))
  tokens = np.concatenate([block.tokens[0] for block in blocks]).tolist()
  wanted = tmp_path / "wanted.npz"
  np.savez(wanted, out=out, selected=stats.selected, read=stats.read)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  running = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.sequence_process", address, str(number), str(wanted)],
      cwd=ROOT,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    for number in range(2)
  ]
  try:
    for number, process in enumerate(running):
      told, _ = process.communicate(timeout=500)
      assert process.returncode == 0, told
      # 12 prompt tokens a device, in pages of 4; and two of the 8 pages for later ones.
      assert f"process {number}: equal, holds [5, 5] pages" in told
      made = " ".join(re.findall("^tokens (.*)$", told, re.MULTILINE))
      assert [int(token) for token in made.split()] == tokens
  finally:
    for process in running:
      process.kill()


def test_the_fetch_bound_is_of_all_devices_together():
  """Never more pages than allowed, and what is granted is read or counted as dropped."""
  cache, free = draw("spread"), method_of("a2ats")
  bound = OverSequence(dataclasses.replace(free, fetch=2), mesh())
  (_, _, stats), (_, _, wanted) = run(bound, cache), run(free, cache)
  assert np.asarray(stats.pages).max() == 2
  assert np.any(stats.dropped)
  np.testing.assert_array_equal(stats.selected + stats.dropped, wanted.selected)


def test_each_device_holds_its_part_and_host_pages_stay_on_the_host():
  """Pages before and after a step; what is small is the same everywhere."""
  cache, over = draw("spread"), OverSequence(method_of("a2ats"), mesh())
  for state in (over.init(SHAPE.geometry), run(over, cache)[1]):
    pages = state.store.pages
    assert pages.sharding.memory_kind == "pinned_host"
    assert len(pages.sharding.device_set) == DEVICES
    # Of 45 prompt tokens 6 each, in pages of 4; and one of the 8 pages for 30 later ones.
    assert {shard.data.shape[3] for shard in pages.addressable_shards} == {2 + 1}
    assert state.index.counts.sharding.is_fully_replicated


def collectives(name: str, prompt: int) -> dict[str, list[int]]:
  """Elements of every result of every collective in the compiled step of a prompt's length."""
  shape = dataclasses.replace(SHAPE, prompt=prompt, batch=2)
  over, rope = OverSequence(method_of(name), mesh()), cases.rope_named("plain", SHAPE.head_dim)
  leaves, tree = jax.tree.flatten(over.init(shape.geometry))

  def step(leaves, q, k, v, positions):
    # Leaves: lowering looks at arguments through objects that the annotations refuse.
    state = jax.tree.unflatten(tree, leaves)
    out, state, stats = over.attend(state, q, k, v, positions=positions, rope=rope, layer=0)
    return out, jax.tree.leaves(state), jax.tree.leaves(stats)

  heads = [jnp.zeros((2, 1, n, SHAPE.head_dim)) for n in (SHAPE.heads, *(SHAPE.kv_heads,) * 2)]
  now = jnp.full((2, 1), prompt, jnp.int32)
  program = jax.jit(step).lower(leaves, *heads, now).compile().as_text()
  kinds = r"all-\w+|collective-\w+|reduce-scatter|ragged-\w+"
  found: dict[str, list[int]] = {}
  for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program):
    for dims in re.findall(r"\w+\[([\d,]*)\]", results):
      found.setdefault(kind, []).append(math.prod(int(n) for n in dims.split(",") if n))
  return found


@pytest.mark.parametrize(("name", "beside"), [("full", []), ("a2ats-plus", [2 * 2] * 3)])
def test_what_a_step_exchanges_is_small_and_does_not_grow(name, beside):
  """B H peaks, then B H (D + 1) sums; and three figures of B K for the statistics."""
  found = collectives(name, 96)
  assert found == collectives(name, 4096)
  rows = 2 * 4
  assert set(found) == {"all-reduce"}
  assert sorted(found["all-reduce"]) == sorted([rows, rows, rows * 8, *beside])


def test_padding_is_neither_stored_nor_attended_on_any_device():
  """Tokens at position -1 leave the state as it is, and give zeros."""
  cache = draw("spread")
  for name in ("full", "a2ats-plus"):
    over, layer = OverSequence(method_of(name), mesh()), jnp.asarray(1, jnp.int32)
    _, state, _ = run(over, cache)
    positions = jnp.full((SHAPE.batch, SHAPE.new), -1, jnp.int32)
    tokens = cases.tokens_at(cache, 1, np.asarray(positions))
    out, after, stats, _ = cases.attend(over, state, *tokens, positions, cache.rope, layer)
    cases.assert_close(after, state)
    assert not any(np.any(x) for x in jax.tree.leaves((out, stats)))


def test_what_cannot_be_split_is_refused():
  with pytest.raises(
    UserError, match="full attention or A2ATS to split over devices, got streaming"
  ):
    OverSequence(Streaming(budget=Budget(tokens=4)), mesh())
  with pytest.raises(UserError, match="expected a mesh of one axis, 'sequence', got rows"):
    OverSequence(Full(), jax.make_mesh((DEVICES,), ("rows",)))
  over = OverSequence(Full(), mesh())
  with pytest.raises(UserError, match="expected a method on one device, got full over a mesh"):
    shard_method(over, make_mesh(batch=DEVICES))
  with pytest.raises(UserError, match="split along its tokens cannot be saved or loaded"):
    load_prefix(Path("none"), over, fingerprint="")


def test_the_page_runs(tmp_path, monkeypatch):
  """With a tiny model: the same tokens as on one device."""
  (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  model = eval_tiny.model()
  monkeypatch.setattr("a2ats_jax.load_model", lambda name: model)
  monkeypatch.chdir(tmp_path)
  save_codebooks(
    Path("codebooks"),
    eval_tiny.codebook(),
    fingerprint=model.fingerprint,
    rope=model.config.rope,
    training={},
  )
  Path("long.txt").write_text(eval_tiny.prose().text[:900])
  names = {}
  exec(compile(example, str(PAGE), "exec"), names)
  method = dataclasses.replace(names["method"].method, codebook=eval_tiny.codebook())
  assert len(names["blocks"][1].stats.pages.sharding.device_set) == DEVICES
  assert np.any(names["blocks"][1].stats.pages)
  alone = generate(model.decoder, method, [names["prompt"]], new=8)
  want = np.concatenate([block.tokens[0] for block in alone])
  assert names["answer"] == want.tolist()
