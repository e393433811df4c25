"""Models over a mesh of eight devices: what they generate, say to each other, keep and hold."""

import dataclasses
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec

from a2ats_jax import forward, plan
from a2ats_jax import generate as loops
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods import registry
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.sharded import shard_method
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.models.sharded import shard_decoder
from a2ats_jax.plan_mesh import Cut, read_cut
from a2ats_jax.prefix import continue_prefix, read_prefix
from a2ats_jax.prefix_file import load_prefix, save_prefix
from a2ats_jax.sharding import make_mesh
from tests import tiny
from tests.eval import tiny as eval_tiny
from tests.lowered import collectives, lower_step
from tests.test_plan import geometry, method_of, paged, plan_config

PAGE = Path(__file__).parent.parent / "docs/sharding.md"
PROMPTS = (70, 33, 12, 64)
NEW = 24
# Beside these, tests/methods/test_every_method.py holds the attention of every method to the same.
QUANTISED = "a2ats-plus:window=6:sinks=2:page=4:bits=8"  # in two processes
METHODS = {
  "snapkv": "snapkv:window=5:kernel=3",  # needs the last queries
  "h2o": "h2o",  # needs attention sums
}


def built(text: str):
  rng = np.random.default_rng(0)
  words = jnp.asarray(rng.normal(size=(3, 2, 16, 16)), jnp.float32)
  book = make_codebook(words, jnp.broadcast_to(jnp.eye(16), (3, 2, 16, 16)))
  spec = registry.parse_method(text)
  return registry.build(spec, budget=Budget(tokens=12), codebooks={"default": book})


def joined(blocks) -> np.ndarray:
  return np.concatenate([block.tokens for block in blocks], axis=1)


def made(decoder, method) -> np.ndarray:
  """Greedy tokens."""
  return joined(loops.generate(decoder, method, tiny.prompts(*PROMPTS), new=NEW, block=8))


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("text", METHODS.values(), ids=METHODS)
def test_generates_what_one_device_generates(text):
  """Four ragged rows and two KV heads over four devices; every program is compiled once."""
  decoder, method = tiny.tiny_model(), built(text)
  want = made(decoder, method)
  assert len(set(want.flatten().tolist())) > 20
  programs = (forward.layer_over_prompt, loops.decode_block)
  before = [program._cache_size() for program in programs]
  mesh = make_mesh(batch=2, heads=2)
  got = made(shard_decoder(decoder, mesh), shard_method(method, mesh))
  np.testing.assert_array_equal(got, want)
  assert [program._cache_size() for program in programs] == [n + 1 for n in before]


@pytest.mark.usefixtures("quick_to_compile")
def test_two_processes_generate_what_one_device_generates(tmp_path):
  """Two devices each, and the KV heads of every row in different processes."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  root = Path(__file__).parents[1]
  logs = [tmp_path / f"{process}.log" for process in range(2)]
  children = []
  try:
    for process, log in enumerate(logs):
      arguments = (process, port, tmp_path / f"{process}.npy")
      with log.open("w") as written:
        children.append(
          subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", *map(str, arguments)],
            cwd=root,
            stdout=written,
            stderr=written,
          )
        )
    want = made(tiny.tiny_model(), built(QUANTISED))
    assert len(set(want.flatten().tolist())) > 20
    for child, log in zip(children, logs):
      assert child.wait(timeout=300) == 0, log.read_text()
  finally:
    for child in children:
      child.kill()
      child.wait()
  for process in range(2):
    np.testing.assert_array_equal(np.load(tmp_path / f"{process}.npy"), want)


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize(
  "text",
  [
    "magicpig:tables=6:bits=3:sinks=2:window=6:page=4",
    "a2ats-plus:far=segments(2):sinks=2:window=6:page=4",
  ],
  ids=["magicpig", "a2ats-plus"],
)
def test_a_prefix_goes_from_mesh_to_mesh(text, tmp_path):
  """Read on one device, saved, loaded over two, saved, and loaded on one."""
  decoder, method = tiny.tiny_model(), built(text)
  mesh = make_mesh(heads=2)
  over = (shard_decoder(decoder, mesh), shard_method(method, mesh))
  document, *questions = tiny.prompts(40, 5, 3)

  def answers(decoder, prefix):
    return joined(continue_prefix(decoder, prefix, questions, new=12, block=12))

  one = read_prefix(decoder, method, document, new=20)
  want = answers(decoder, one)
  save_prefix(tmp_path / "one", one, fingerprint="m")
  two = load_prefix(tmp_path / "one", over[1], fingerprint="m")
  np.testing.assert_array_equal(answers(over[0], two), want)
  save_prefix(tmp_path / "two", two, fingerprint="m")
  files = [safetensors.numpy.load_file(tmp_path / name) for name in ("one", "two")]
  assert files[0].keys() == files[1].keys()
  for name, x in files[0].items():
    np.testing.assert_array_equal(files[1][name], x, err_msg=name)
  here = read_prefix(*over, document, new=20)
  # A program returns an array without elements whole, whatever was asked for.
  places = [[x.sharding for x in jax.tree.leaves(prefix.state) if x.size] for prefix in (two, here)]
  assert places[0] == places[1]
  assert {place.memory_kind for place in places[0]} == {"device", "pinned_host"}
  np.testing.assert_array_equal(answers(over[0], here), want)


@pytest.mark.usefixtures("quick_to_compile")
def test_the_page_runs(monkeypatch):
  """On a tiny model: its answers are those of one device, its logits over the mesh."""
  (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  model = eval_tiny.model()
  monkeypatch.setattr("a2ats_jax.load_model", lambda name: model)
  names = {}
  exec(compile(example, str(PAGE), "exec"), names)
  blocks = loops.generate(model.decoder, names["method"].method, names["prompts"], new=8)
  assert names["answers"] == joined(blocks).tolist()
  assert names["logits"].sharding.spec == PartitionSpec("batch", "heads")


# --- the compiled step ----------------------------------------------------------------------------

PLUS = {
  "codewords": 256,
  "stage": 1 << 18,
  "far": FarPosition.segments(8),
  "tail": "centroid",
}


def compiled(case: plan.Case, m: plan.Paged | None, cut: Cut):
  method = Full() if m is None else method_of(m, case.config)
  mesh = make_mesh(batch=cut.batch, heads=cut.heads)
  step, host = lower_step(case.config, method, geometry(case), mesh, dtype=case.dtype)
  return step.compile(), host


@pytest.mark.parametrize(("options", "text"), [(PLUS, "2x2"), (None, "4x2")], ids=["plus", "full"])
def test_the_plan_is_what_a_device_of_the_compiled_step_holds(options, text):
  """Within five percent of all device bytes, and exactly for host pages and what is added up."""
  cut, m = read_cut(text), None if options is None else paged(**options)
  sizes = {"dtype": "float32", "cache_dtype": "float32"}
  case = plan.Case(config=plan_config(), batch=4, prompt=2048, new=64, **sizes)
  step, host = compiled(case, m, cut)
  of, memory = plan.estimate(cut.part(case), m), step.memory_analysis()
  arguments = memory.argument_size_in_bytes - host
  beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert of.host == host
  assert sum(of.device.values()) == pytest.approx(arguments, abs=1024)
  assert of.device_bytes == pytest.approx(arguments + beside, rel=0.05)
  found = collectives(step.as_text(), layers=case.config.layers)
  assert found == {"all-reduce": cut.collective_bytes(case)}


def test_what_devices_say_does_not_grow_with_the_context():
  """Twice a layer a hidden state of every row; a cut vocabulary once more."""
  for tokens, vocab in ((64, 97), (512, 97), (64, 96)):
    config = tiny.tiny_config(vocab=vocab)
    shape = forward.geometry_of(config, batch=4, prompt=tokens, new=8)
    mesh = make_mesh(batch=2, heads=2)
    step, _ = lower_step(config, Full(), shape, mesh, dtype=jnp.float32)
    found = collectives(step.compile().as_text(), layers=3)
    assert found == {"all-reduce": (2 * 3 + (vocab == 96)) * 2 * 48 * 4}


# --- mistakes -------------------------------------------------------------------------------------


def test_what_a_mesh_cannot_cut():
  decoder, mesh = tiny.tiny_model(), make_mesh(batch=2, heads=4)
  with pytest.raises(UserError, match="2 KV heads cannot be cut into 4 equal parts"):
    shard_decoder(decoder, mesh)
  with pytest.raises(UserError, match="codebooks of 2 KV heads cannot be cut into 4"):
    shard_method(built("a2ats"), mesh)
  shape = forward.geometry_of(decoder.config, batch=3, prompt=8, new=1)
  with pytest.raises(UserError, match="3 rows cannot be cut into 2 equal parts"):
    shard_method(Full(), make_mesh(batch=2)).init(shape)
  with pytest.raises(UserError, match="2 KV heads cannot be cut into 4 equal parts"):
    shard_method(Full(), mesh).init(dataclasses.replace(shape, batch=2))
  with pytest.raises(UserError, match=r"3 x 3 .* needs .* 9 together; there are 8"):
    make_mesh(batch=3, heads=3)
  with pytest.raises(UserError, match="expected BATCHxHEADS such as 2x4, got '2x0'"):
    read_cut("2x0")
  case = plan.Case(config=decoder.config, batch=3, prompt=8, new=1)
  with pytest.raises(UserError, match="3 rows cannot be cut into 2 equal parts"):
    Cut(2, 1).part(case)
  gemma = tiny.tiny_config("gemma3")
  with pytest.raises(UserError, match="models with local layers cannot be cut"):
    Cut(2, 1).part(dataclasses.replace(case, config=gemma, batch=2))
  shape = forward.geometry_of(gemma, batch=2, prompt=8, new=1)
  with pytest.raises(UserError, match="models with local layers cannot be cut"):
    shard_method(Full(), make_mesh(batch=2)).init(shape)


def test_weights_lie_where_they_are_used():
  """Of one of two devices: half of each projection, of the MLP and of a vocabulary of 96."""
  config = tiny.tiny_config("all biases", vocab=96)
  decoder = Decoder(config, rngs=nnx.Rngs(0))
  sharded = shard_decoder(decoder, make_mesh(heads=2))
  held = sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(sharded))
  case = plan.Case(config=config, batch=1, prompt=1, new=0, dtype="float32")
  assert held == sum(plan.weights(Cut(1, 2).part(case)).values())
