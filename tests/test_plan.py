"""The plan's arithmetic: by hand, against the states of the methods, and against compiled steps."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from a2ats_jax import cli, plan
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.generate import decode_step, geometry_of, pad_prompts, prefill
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.full import Full
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.plan_known import CHIPS, MODELS, Chip, find_chip, find_model
from a2ats_jax.plan_report import amount, notes, rows, table
from a2ats_jax.rope import RopeConfig
from tests import tiny
from tests.models.tiny_models import tiny_config, tiny_tensors, write_gguf, write_hf

LLAMA = MODELS["llama-3.1-8b"]
SEGMENTS = FarPosition.segments(8)


def paged(**changes) -> plan.Paged:
  options = {
    "budget": Budget(ratio=0.03),
    "codewords": 4096,
    "far": FarPosition.constant(),
    "tail": "none",
  }
  return plan.Paged(**(options | changes))


def llama(**changes) -> plan.Case:
  return plan.Case(**({"config": LLAMA, "batch": 1, "prompt": 131072, "new": 0} | changes))


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "numbers"),
  [
    # What their publishers count.
    ("llama-3.1-8b", 8_030_261_248),
    ("qwen2.5-7b", 7_615_616_512),
    ("mistral-7b", 7_248_023_552),
    ("smollm2-135m", 134_515_008),
  ],
)
def test_weights_of_public_models(name, numbers):
  case = plan.Case(config=MODELS[name], batch=1, prompt=1, new=0)
  assert sum(plan.weights(case).values()) == 2 * numbers  # bfloat16
  case = dataclasses.replace(case, dtype="float32", batch=7)
  assert sum(plan.weights(case).values()) == 4 * numbers  # one copy for all rows


def test_full_attention_of_llama_at_128k_by_hand():
  # keys and values, 32 layers, 8 KV heads, 131072 tokens, 128 numbers of 2 bytes
  assert plan.full_state(llama()) == {"keys and values": 2 * 32 * 8 * 131072 * 128 * 2}
  of = plan.estimate(llama(), None)
  assert of.device == {"weights": 16060522496, "keys and values": 17179869184}
  assert (of.host, of.moved, of.read) == (0, 0, 1.0)
  # Temporary: one layer's output projection and MLP, (4096 4096 + 3 4096 14336) 2 = 385875968;
  # one layer's keys and values, 17179869184 / 32 = 536870912; logits of every slot,
  # 32 131072 4 = 16777216; the output, 128256 4 = 513024.
  assert of.temporary == 385875968 + 536870912 + 16777216 + 513024
  # Read: all but the embedding table, of which one row: 16060522496 - 128256 4096 2 + 4096 2
  # = 15009857536; and the cache.
  assert of.traffic == {"weights": 15009857536, "keys and values": 17179869184}
  # Operations: 2 for each number of the linear maps, (8030261248 - 525336576 - 65 4096) 2
  # = 15009316864; and 4 of 32 layers, 32 heads, 131072 slots, 128 numbers = 68719476736.
  assert of.flops == 15009316864 + 68719476736


def test_a2ats_of_llama_at_128k_by_hand():
  m = paged(far=SEGMENTS, tail="centroid")
  case = llama(new=128)
  # Slots: 131072 for the prompt and 128 after it, 8200 pages of 16; 32 8 = 256 KV heads of a row.
  # A page: 2 16 128 2 = 8192 bytes.
  assert plan.page_bytes(case, m) == 8192
  assert plan.pages(case, m) == 256 * 8200 * 8192 == 17196646400
  # Later tokens: ceil((128 + 64) / 64) segments of 64 = 192. Cells: 8 4096 + 192 = 32960.
  # Ring: 64 + 16 = 80 tokens. Cuts: 9. The index holds 129 tiles of 8 rows of 128 slots, 132096.
  assert plan.paged_state(case, m) == {
    "counts and first pages of cells": 2 * 256 * 32960 * 4,
    "cell and rank of every slot": 256 * 2 * 132096 * 4,
    "page edges": 256 * 2 * 8192 * 4,
    "sinks and recent tokens": 256 * (2 * 88 * 128 * 2 + 80 * 4),
    "codes of later tokens": 256 * 192 * 4,
    "value sums of codewords": 256 * (4096 * 128 + 4096) * 4,
    "row tables": (9 + 1) * 4,
  }
  # Codebooks: 256 heads of 4096 codewords twice, an offset of each and a 128 x 128 matrix, float32.
  assert plan.codebooks(case, m) == 256 * (2 * 4096 * 128 + 4096 + 128 * 128) * 4 == 1094713344
  of = plan.estimate(case, m)
  assert of.host == 17196646400
  assert of.device_bytes < plan.estimate(case, None).device_bytes / 1.8


def test_a_step_of_a2ats_by_hand():
  # L = 2, H = 4, K = 2, D = 8, E = 16, MLP 24, V = 100, untied, float32; B = 3, T = 1000, C = 32.
  config = plan_config(layers=2, heads=4, kv_heads=2, head_dim=8, width=16, mlp_width=24, vocab=100)
  case = plan.Case(
    config=config, batch=3, prompt=1000, new=0, dtype="float32", cache_dtype="float32"
  )
  m = paged(budget=Budget(tokens=50), codewords=32, page=4, window=10, sinks=2, union=1.5)
  # 50 tokens, times 1.5 = 75; on pages, times 2 = 150, which is 38 pages of 4 (rounded up). A page
  # is 2 4 8 4 = 256 bytes. 50 tokens fill 13 pages of 4, which is a block, and 39 pages are thought
  # to be needed: 3 blocks of each of 6 heads, a third of which is a stage of 6; three stages.
  assert plan.chosen(case, m) == plan.Chosen(tokens=75.0, pages=38, moved=3 * 6 * 13)
  # A stage of 2048 bytes holds a block of 8 pages, of which a head needs 5: 30 stages.
  m = dataclasses.replace(m, stage=2048)
  assert plan.chosen(case, m) == plan.Chosen(tokens=75.0, pages=38, moved=240)
  of = plan.estimate(case, m)
  assert of.moved == 2 * 3 * 2 * 40 * 256 == 122880
  assert of.read == (75 + 2 + 10) / 1001
  # A layer: q 16 32, k and v 16 16 each, o 32 16, MLP 3 16 24: 2688 numbers and norms of 32.
  # Read: (2 2720 + 16 + 100 16 + 3 rows of 16) 4 = 28416.
  assert of.traffic["weights"] == (2 * 2720 + 16 + 1600 + 48) * 4
  assert of.traffic["codebooks"] == 2 * 2 * (2 * 32 * 8 + 32 + 64) * 4
  # Counts and first pages of 32 cells, edges of 250 pages in 256 places, and cells and ranks of 40
  # pages of 4; 12 heads.
  assert of.traffic["index"] == 12 * (2 * 32 + 2 * 256 + 40 * 8) * 4
  assert of.traffic["score tables"] == 2 * (2 * 3 * 4) * 32 * 4  # written and read, 24 query heads
  # Ring: 12 + 4 = 16 places; keys and values of 18 places, and 16 codes.
  assert of.traffic["sinks and recent tokens"] == 12 * (2 * 18 * 8 + 16) * 4
  assert of.traffic["value sums of codewords"] == 0  # no tail
  assert of.traffic["fetched pages"] == 2 * 122880
  # Linear maps 2 3 (2 2688 + 1600); scores 24 2 32 8; attention 24 4 (40 4 + 18) 8; codes of the
  # new keys, 12 2 (8 + 32) 8.
  assert of.flops == 41856 + 12288 + 136704 + 7680
  # The same with pages on the device: nothing is moved, and they are read once more.
  here = plan.estimate(case, dataclasses.replace(m, placement="device"))
  assert (here.host, here.moved) == (0, 0)
  assert here.traffic["fetched pages"] == 3 * 122880
  assert here.device["pages"] == of.host == 12 * 250 * 256


def test_tokens_chosen():
  case = llama()  # 131073 tokens cached, 3% of which are 3932; G = 4

  def tokens(**changes) -> float:
    return plan.chosen(case, paged(**changes)).tokens

  assert tokens(union=1.0) == 3932
  assert tokens(union=2.5) == 9830
  assert tokens(union=9.0) == 4 * 3932  # at most what four heads are granted
  assert tokens(budget=Budget(ratio=0.03, per="kv_head"), union=4.0) == 3932
  assert tokens(budget=Budget(ratio=1.0)) == 131073 - 64 - 8  # no more than there are
  assert plan.chosen(case, paged(budget=Budget(tokens=0))).moved == 0
  assert plan.chosen(case, paged(budget=Budget(ratio=1.0))).pages == 8192
  assert plan.chosen(case, paged(fetch=100)).pages == 100
  short = plan.Case(config=LLAMA, batch=1, prompt=20, new=4)
  assert plan.chosen(short, paged()).tokens == 0


def test_rooflines_by_hand():
  chip = Chip(memory=1e10, memory_rate=1e12, link_rate=1e10, flops=1e14, source="", link="")
  of = plan.Estimate(
    device={},
    temporary=0,
    host=0,
    traffic={"weights": 3 * 10**9, "cache": 10**9},
    moved=5 * 10**7,
    flops=10**11,
    read=1.0,
  )
  # 4e9 bytes at 1e12 are 4 ms; 1e11 operations at 1e14 are 1 ms; 5e7 bytes at 1e10 are 5 ms.
  assert of.device_seconds(chip) == pytest.approx(4e-3)
  assert of.seconds(chip) == pytest.approx(9e-3)
  assert of.ideal_seconds(chip) == pytest.approx(5e-3)
  busy = dataclasses.replace(of, flops=10**12)  # 10 ms
  assert busy.seconds(chip) == pytest.approx(15e-3)
  assert busy.ideal_seconds(chip) == pytest.approx(10e-3)


def test_the_largest_batch_of_full_attention_by_hand():
  # A row of the device: cache 17179869184; temporary 536870912 + 16777216 + 513024: 17734030336.
  # Whatever the batch: weights 16060522496 and a layer's late ones 385875968: 16446398464.
  chip = find_chip("h100")
  assert plan.largest_batch(llama(), None, chip) == 3  # (80e9 - 16446398464) / 17734030336 = 3.58
  fitting = dataclasses.replace(chip, memory=16446398464.0 + 5 * 17734030336)
  assert plan.largest_batch(llama(), None, fitting) == 5
  below = dataclasses.replace(chip, memory=fitting.memory - 1)
  assert plan.largest_batch(llama(), None, below) == 4
  assert plan.largest_batch(llama(), None, find_chip("tpu-v5e")) == 0


@pytest.mark.parametrize("device", CHIPS)
@pytest.mark.parametrize("prompt", [4096, 131072])
def test_one_more_row_does_not_fit(device, prompt):
  m, chip = paged(far=SEGMENTS, tail="centroid", codewords=1024), CHIPS[device]
  case = llama(prompt=prompt, new=128)
  most = plan.largest_batch(case, m, chip)
  sizes = [
    plan.estimate(dataclasses.replace(case, batch=batch), m).device_bytes
    for batch in (max(most, 1), most + 1)
  ]
  assert sizes[0] <= chip.memory or most == 0
  assert sizes[1] > chip.memory
  if most:
    host = float(plan.estimate(case, m).host)
    assert plan.largest_batch(case, m, chip, host=host) == 1
    assert plan.largest_batch(case, m, chip, host=host - 1) == 0


# --- against the methods' states ------------------------------------------------------------------


def plan_config(**changes) -> ModelConfig:
  """Of moderate size: weights, cache and codebooks each weigh."""
  sizes = {
    "architecture": "llama",
    "vocab": 1000,
    "layers": 6,
    "heads": 8,
    "kv_heads": 2,
    "width": 256,
    "mlp_width": 512,
    "context": 1 << 20,
    "rope": RopeConfig(head_dim=changes.pop("head_dim", 64)),
  }
  return ModelConfig(**(sizes | changes))


def nbytes(tree) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def book_of(config: ModelConfig, size: int) -> Codebook:
  lead = (config.layers, config.kv_heads)
  words = jnp.zeros((*lead, size, config.head_dim))
  metric = jnp.zeros((*lead, config.head_dim, config.head_dim))
  return Codebook(words, metric, words, jnp.zeros((*lead, size)))


def method_of(m: plan.Paged, config: ModelConfig) -> A2ATS:
  names = {field.name for field in dataclasses.fields(A2ATS)} - {"codebook", "split"}
  return A2ATS(codebook=book_of(config, m.codewords), **{name: getattr(m, name) for name in names})


def geometry(case: plan.Case):
  shape = geometry_of(case.config, batch=case.batch, prompt=case.prompt, new=case.new)
  return dataclasses.replace(shape, dtype=jnp.dtype(case.cache_dtype))


def test_the_options_are_the_methods():
  """An option that A2ATS gains is one that the plan has to know."""
  ours = {field.name: field.default for field in dataclasses.fields(plan.Paged)}
  theirs = {field.name: field.default for field in dataclasses.fields(A2ATS)}
  assert set(ours) - {"codewords", "union", "spread"} == set(theirs) - {"codebook", "split"}
  assert all(ours[name] in (theirs[name], dataclasses.MISSING) for name in theirs if name in ours)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weights_are_the_decoders(family):
  """With biases, norms of queries and keys, and tied heads."""
  config = tiny.tiny_config(family)
  case = plan.Case(config=config, batch=1, prompt=1, new=0, dtype="float32")
  decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  assert sum(plan.weights(case).values()) == nbytes(decoder)


STATES = {
  "published": {},
  "segments": {"far": SEGMENTS, "tail": "centroid"},
  "arrival": {"order": "arrival", "far": SEGMENTS},
  "constant, arrival": {"order": "arrival"},
  "odd page": {"page": 7, "window": 33, "sinks": 5},
  "no sinks": {"sinks": 0, "page": 1, "window": 1},
  "span": {"far": FarPosition.segments(3, 10), "page": 8, "codewords": 5},
  "device": {"placement": "device", "far": SEGMENTS},
  "4 bits": {"bits": 4, "far": SEGMENTS},
}


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("prompt", "new"), [(512, 64), (997, 31), (5, 1), (64, 0)])
@pytest.mark.parametrize("options", STATES.values(), ids=STATES)
def test_states_to_the_byte(options, prompt, new, cache_dtype):
  m = paged(**({"codewords": 16} | options))
  config = tiny.tiny_config()
  case = plan.Case(config=config, batch=3, prompt=prompt, new=new, cache_dtype=cache_dtype)
  method = method_of(m, config)
  hosted = []

  def leaves():  # lists: described leaves do not pass the type checks of a pytree's fields
    state = method.init(geometry(case))
    hosted.append(state.store.host)
    return jax.tree.leaves(state.store), jax.tree.leaves(state)

  pages, every = jax.eval_shape(leaves)
  stored = nbytes(pages)
  assert hosted == [m.host]
  assert plan.pages(case, m) == stored
  assert sum(plan.paged_state(case, m).values()) == nbytes(every) - stored
  assert plan.codebooks(case, m) == nbytes(method.codebook)
  of = plan.estimate(case, m)
  assert of.host == (stored if m.host else 0)
  assert of.device.get("pages", 0) == (0 if m.host else stored)
  full = jax.eval_shape(lambda: jax.tree.leaves(Full().init(geometry(case))))
  assert sum(plan.full_state(case).values()) == nbytes(full)


# --- against compiled steps -----------------------------------------------------------------------

COMPILED = {
  "full": (None, 2048, 64),
  "full, odd": (None, 3001, 17),
  "published": ({}, 2048, 64),
  "plus": ({"far": SEGMENTS, "tail": "centroid"}, 2048, 64),
  "plus, odd": ({"far": SEGMENTS, "tail": "centroid", "page": 8, "window": 50}, 2049, 33),
  "large codebooks": ({"codewords": 1024, "tail": "centroid"}, 2048, 64),
  "per KV head": (
    {
      "codewords": 1024,
      "far": SEGMENTS,
      "tail": "centroid",
      "budget": Budget(ratio=0.03, per="kv_head"),
    },
    2048,
    64,
  ),
  "large stages": ({"stage": 16 << 20}, 8192, 64),
  "arrival": ({"order": "arrival", "far": SEGMENTS}, 8192, 64),
  "many new": ({"far": SEGMENTS, "tail": "centroid"}, 1024, 1024),
  "fetch bound": ({"far": SEGMENTS, "tail": "centroid", "fetch": 64}, 2048, 64),
  "device": ({"placement": "device", "far": SEGMENTS}, 2048, 64),
  "4 bits": ({"bits": 4, "far": SEGMENTS, "tail": "centroid"}, 2048, 64),
}


def compiled_bytes(case: plan.Case, m: plan.Paged | None) -> tuple[int, int]:
  """Device bytes of the compiled step: its arguments without host pages, and the rest."""
  config, dtype = case.config, jnp.dtype(case.dtype)
  method = Full() if m is None else method_of(m, config)
  decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
  decoder = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), decoder)
  trees = [jax.tree.structure(decoder), jax.tree.structure(method)]
  host = 0

  def empty() -> list[jax.Array]:
    nonlocal host
    state = method.init(geometry(case))
    host = state.store.pages.size * state.store.pages.dtype.itemsize if m and m.host else 0
    trees.append(jax.tree.structure(state))
    return jax.tree.leaves(state)

  # Shapes alone do, but for pages in host memory: where they lie is seen on an array only.
  state = empty() if m and m.host else jax.eval_shape(empty)

  def step(*leaves):  # lists: lowering fills pytrees with descriptions that no type check lets by
    whole = [jax.tree.unflatten(tree, some) for tree, some in zip(trees, leaves)]
    return decode_step(*whole, *leaves[len(trees) :])

  token = jax.ShapeDtypeStruct((case.batch, 1), jnp.int32)
  lowered = jax.jit(step, donate_argnums=2).lower(
    jax.tree.leaves(decoder), jax.tree.leaves(method), state, token, token
  )
  memory = lowered.compile().memory_analysis()
  output = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes - host, memory.temp_size_in_bytes + output


@pytest.mark.parametrize(("options", "prompt", "new"), COMPILED.values(), ids=COMPILED)
def test_within_five_percent_of_the_compiled_step(options, prompt, new):
  """Of all device bytes; arguments within a kilobyte, temporary memory within an eighth or so."""
  small = {"codewords": 256, "stage": 1 << 18}  # of the size that the rest has here
  m = None if options is None else paged(**(small | options))
  case = plan.Case(
    config=plan_config(),
    batch=4,
    prompt=prompt,
    new=new,
    dtype="float32",
    cache_dtype="float32",
  )
  arguments, rest = compiled_bytes(case, m)
  of = plan.estimate(case, m)
  assert sum(of.device.values()) == pytest.approx(arguments, abs=1024)
  assert of.device_bytes == pytest.approx(arguments + rest, rel=0.05)
  assert of.temporary == pytest.approx(rest, rel=0.15)


LARGE = {
  "full": (None, 1, "float32"),
  "plus": ({}, 1, "float32"),
  "full, half the bytes": (None, 4, "bfloat16"),
  "plus, half the bytes": ({}, 4, "bfloat16"),
  "per KV head": ({"budget": Budget(tokens=1024, per="kv_head")}, 4, "bfloat16"),
}


@pytest.mark.parametrize(("options", "batch", "dtype"), LARGE.values(), ids=LARGE)
def test_within_one_percent_at_128k_of_llama(options, batch, dtype):
  """Of the step that would run, compiled and not run: pages are on the device, to need no array."""
  plus = {"codewords": 256, "far": SEGMENTS, "tail": "centroid", "placement": "device"}
  m = None if options is None else paged(**(plus | options))
  case = llama(new=128, batch=batch, dtype=dtype, cache_dtype=dtype)
  of, (arguments, rest) = plan.estimate(case, m), compiled_bytes(case, m)
  assert of.device_bytes == pytest.approx(arguments + rest, rel=0.01)
  assert of.temporary == pytest.approx(rest, rel=0.05)


@pytest.mark.parametrize("stage", [1 << 14, 16 << 20])
def test_a_real_step_moves_these_bytes(stage):
  """With every token granted nothing is assumed: the pages of all far tokens, in whole stages."""
  m = paged(budget=Budget(ratio=1.0), codewords=8, spread=1.0, stage=stage)
  decoder = tiny.tiny_model()
  sizes = {"dtype": "float32", "cache_dtype": "float32"}
  case = plan.Case(config=decoder.config, batch=2, prompt=512, new=4, **sizes)
  method = method_of(m, decoder.config)
  tokens, lengths = pad_prompts(tiny.prompts(512, 512), decoder.config, new=4)
  _, state = prefill(decoder, method, tokens, lengths, new=4)
  token, position = jnp.zeros((2, 1), jnp.int32), jnp.asarray(lengths)[:, None]
  _, _, stats = decode_step(decoder, method, state, token, position)
  # 512 + 1 - 64 - 8 = 441 far tokens, 440 of them on 28 pages.
  assert plan.chosen(case, m).pages == 28
  assert int(stats.pages.max()) == int(stats.pages.min()) == 28
  assert float(stats.moved.sum()) == plan.estimate(case, m).moved


# --- names, rows and mistakes ---------------------------------------------------------------------


def test_chips_and_what_replaces_their_numbers():
  chip = find_chip("h100", link_rate=55e9)
  assert (chip.link_rate, chip.link) == (55e9, "as given")
  assert (chip.memory_rate, chip.source) == (3350e9, CHIPS["h100"].source)
  assert "as given" in find_chip("h100", memory=94e9).source
  own = find_chip("custom", memory=1e9, memory_rate=2e9, link_rate=3e9, flops=4e9)
  assert (own.memory, own.memory_rate, own.link_rate, own.flops) == (1e9, 2e9, 3e9, 4e9)
  assert all("assumed" in chip.link for name, chip in CHIPS.items() if name.startswith("tpu"))
  with pytest.raises(UserError, match=r"unknown name 'h900'; known: tpu-v5e, .*, custom"):
    find_chip("h900")
  with pytest.raises(UserError, match="missing: --memory-gbs, --tflops"):
    find_chip("custom", memory=1e9, link_rate=3e9)
  for bad in (-1.0, math.nan, math.inf):
    with pytest.raises(UserError, match="--tflops must be a number above 0"):
      find_chip("h100", flops=bad)


def test_models_and_what_replaces_their_numbers():
  sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "width": 16, "mlp_width": 24}
  config = find_model("custom", vocab=100, **sizes)
  assert (config.layers, config.head_dim, config.vocab, config.tied) == (2, 8, 100, False)
  with pytest.raises(UserError, match="missing: --vocab"):
    find_model("custom", **sizes)
  assert find_model("llama-3.1-8b", layers=16, head_dim=64, vocab=0) == dataclasses.replace(
    LLAMA, layers=16, rope=dataclasses.replace(LLAMA.rope, head_dim=64)
  )
  with pytest.raises(UserError, match=r"known shape \(llama-3.1-8b, .*, custom\)"):
    find_model("llama-9")
  with pytest.raises(UserError, match="not a multiple"):
    find_model("llama-3.1-8b", kv_heads=5)


def test_methods_as_the_registry_writes_them():
  budget = Budget(tokens=64)
  text = "a2ats:far=segments(3):page=8:order=arrival:sinks=4"
  spec, m = plan.read_method(text, budget=budget, codewords=77, union=3.0, spread=1.5)
  assert spec.name == "a2ats"
  assert m == plan.Paged(
    budget=budget,
    codewords=77,
    far=FarPosition.segments(3),
    tail="none",
    page=8,
    order="arrival",
    sinks=4,
    union=3.0,
    spread=1.5,
  )
  assert plan.read_method("full", budget=budget, codewords=1)[1] is None
  with pytest.raises(UserError, match="oracle keeps the whole cache on the device"):
    plan.read_method("oracle", budget=budget, codewords=1)
  with pytest.raises(UserError, match="unknown option"):
    plan.read_method("a2ats:pages=3", budget=budget, codewords=1)


@pytest.mark.parametrize(
  "changes",
  [
    {"codewords": 0},
    {"codewords": 65537},
    {"union": 0.5},
    {"spread": math.nan},
    {"page": 0},
    {"window": 0},
    {"stage": 0},
  ],
  ids=str,
)
def test_options_out_of_range(changes):
  with pytest.raises(UserError, match=str(next(iter(changes.values())))):
    paged(**changes)


@pytest.mark.parametrize(
  "changes",
  [{"batch": 0}, {"prompt": 0}, {"new": -1}, {"dtype": "int8"}, {"prompt": 16777216}],
  ids=str,
)
def test_cases_out_of_range(changes):
  with pytest.raises(UserError, match=str(next(iter(changes.values())))):
    llama(**changes)


def test_rows_add_up():
  chip, case = CHIPS["h100"], llama(new=128, batch=2)
  spec, m = plan.read_method("a2ats:tail=centroid", budget=Budget(ratio=0.03), codewords=1024)
  full, row = rows(case, spec, m, model="llama-3.1-8b", device="h100", chip=chip)
  assert (full["method"], row["method"]) == ("full", "a2ats")
  assert full.keys() == row.keys()
  for one, of in ((full, plan.estimate(case, None)), (row, plan.estimate(case, m))):
    parts = ("weights", "cache", "codebook", "index", "near", "sums", "temp")
    assert sum(one[f"{name}_bytes"] for name in parts) == one["device_bytes"] == of.device_bytes
    assert one["ms"] == pytest.approx(of.seconds(chip) * 1e3)
    assert one["tokens_per_s"] == pytest.approx(2 / of.seconds(chip))
    best = plan.estimate(
      dataclasses.replace(case, batch=one["max_batch"]), m if one is row else None
    )
    assert one["max_batch_host_bytes"] == best.host
    assert one["max_batch_ms"] == pytest.approx(best.seconds(chip) * 1e3)
    assert one["max_batch_tokens_per_s"] == pytest.approx(one["max_batch"] / best.seconds(chip))
  assert row["ratio"] == pytest.approx(full["ms"] / row["ms"])
  assert rows(case, spec, None, model="m", device="d", chip=chip)[0]["method"] == "full"
  drawn = table([full, row])
  assert [column.header for column in drawn.columns] == ["", "full", "a2ats"]
  said = " ".join(notes(case, spec, m, chip))
  assert "context of 131,072 tokens, fewer" in said
  assert "PCIe Gen5 x16, nominal" in said


def test_a_chip_that_is_too_small():
  spec, m = plan.read_method("a2ats", budget=Budget(ratio=0.03), codewords=1024)
  for row in rows(llama(), spec, m, model="m", device="d", chip=CHIPS["tpu-v5e"]):
    assert (row["fits"], row["max_batch"], row["max_batch_ms"]) == (False, 0, None)


@pytest.mark.parametrize(
  ("size", "text"),
  [(0, "0"), (12, "12 B"), (1234, "1.23 kB"), (17179869184, "17.18 GB"), (2.5e12, "2.50 TB")],
)
def test_amounts(size, text):
  assert amount(size) == text


# --- the command ----------------------------------------------------------------------------------


def run(capfd, *arguments) -> tuple[int, str, str]:
  """Exit code, stdout and stderr of ``a2ats plan``."""
  code = 0
  try:
    cli.main(["plan", *(str(a) for a in arguments)])
  except SystemExit as e:
    code = int(e.code or 0)
  out, err = capfd.readouterr()
  return code, out, err


def printed(capfd, *arguments) -> list[dict]:
  code, out, err = run(capfd, *arguments, "--json")
  assert code == 0, err
  return [json.loads(line) for line in out.splitlines()]


def test_help_has_units(capfd):
  code, out, _ = run(capfd, "--help")
  text = " ".join(out.replace("│", " ").split())
  assert code == 0
  for words in ("Tokens of each prompt", "10^9 bytes a second", "10^12 a second", "Host memory in"):
    assert words in text
  for name in (*CHIPS, *MODELS):
    assert name in text


def test_the_command_prints_rows(capfd):
  common = ("--T", 32768, "--batch", 2, "--device", "h200", "--codewords", 1024)
  full, row = printed(capfd, *common, "--budget", "1024/kv")
  assert (full["method"], full["batch"], full["T"], full["device"]) == ("full", 2, 32768, "h200")
  # 2 32 8 (32768 + 128) 128 numbers of 2 bytes, 2 rows; the same in pages of the host.
  assert full["cache_bytes"] == row["host_bytes"] == 2 * 2 * 32 * 8 * 32896 * 128 * 2
  # 1024 tokens on twice as many slots: 128 pages of 8192 bytes, 8 blocks of
  # each of 16 heads; 32 blocks are a stage.
  assert (row["pages"], row["moved_bytes"]) == (128, 2 * 32 * 8 * 128 * 8192)
  assert row["budget"] == "1024/kv"
  assert "tail=centroid" in row["options"]
  (alone,) = printed(capfd, *common, "--method", "full")
  assert alone == full


def test_the_command_prints_a_table(capfd):
  code, out, err = run(capfd, "--T", 8192, "--batch", 4, "--dtype", "float32")
  assert (code, err) == (0, "")
  out = " ".join(out.split())  # notes are wrapped
  assert "llama-3.1-8b, 8,192 tokens of prompt and 128 new ones, batch 4, float32" in out
  assert "a2ats-plus" in out
  assert "tokens/s" in out
  assert "PCIe Gen5 x16, nominal" in out
  code, out, _ = run(capfd, "--device", "tpu-v5e")
  assert code == 0
  assert "assumed: 16 GB/s a chip" in " ".join(out.split())


def test_numbers_of_the_users_own(capfd):
  sizes = ("--layers", 2, "--heads", 4, "--kv-heads", 2, "--head-dim", 8, "--width", 16)
  sizes = (*sizes, "--mlp-width", 24, "--vocab", 100)
  chip = ("--device", "custom", "--memory-gb", 1, "--memory-gbs", 2, "--link-gbs", 3, "--tflops", 4)
  (row,) = printed(capfd, "--model", "custom", *sizes, *chip, "--method", "full", "--T", 99)
  # Layers 2 2720, final norm 16, two tables of 100 16; bfloat16.
  assert row["weights_bytes"] == (2 * 2720 + 16 + 2 * 1600) * 2
  assert row["memory_bytes"] == 10**9
  assert row["ms"] == pytest.approx(row["traffic_bytes"] / 2e9 * 1e3)
  (half,) = printed(capfd, "--method", "full", "--layers", 16, "--cache-dtype", "float32")
  (whole,) = printed(capfd, "--method", "full")
  assert half["cache_bytes"] == whole["cache_bytes"]  # half the layers, twice the bytes


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_models_from_files(capfd, tmp_path, kind):
  config = tiny_config(tied=True)
  tensors = tiny_tensors(config)
  path = tmp_path / "model.gguf" if kind == "gguf" else tmp_path
  (write_gguf if kind == "gguf" else write_hf)(path, config, tensors)
  (row,) = printed(capfd, "--model", path, "--method", "full", "--T", 64, "--dtype", "float32")
  assert row["weights_bytes"] == 4 * sum(tensor.size for tensor in tensors.values())


def test_one_of_eight_devices_by_hand(capfd):
  common = ("--T", 32768, "--batch", 8, "--mesh", "2x4", "--codewords", 1024, "--host-gb", 512)
  full, row = printed(capfd, *common, "--budget", "1024/kv")
  # A quarter of all numbers but the norms', of which there are 65 4096; bfloat16.
  assert full["weights_bytes"] == row["weights_bytes"] == 2 * (8029995008 // 4 + 266240)
  # 4 rows, 2 KV heads; 2 32 4 2 (32768 + 128) 128 numbers of 2 bytes.
  assert full["cache_bytes"] == row["host_bytes"] == 2 * 32 * 4 * 2 * 32896 * 128 * 2
  assert row["moved_bytes"] == 32 * 4 * 2 * 128 * 8192
  # Twice a layer and once for the vocabulary: 4096 numbers of 4 rows.
  assert full["collective_bytes"] == row["collective_bytes"] == 65 * 4 * 4096 * 2
  assert (row["batch"], row["mesh"]) == (8, "2x4")
  assert row["tokens_per_s"] == pytest.approx(8 / row["ms"] * 1e3)
  # A row of all devices has 2 32 8 32896 128 2 = 4311744512 bytes of pages: 118.7 of them fit.
  assert row["max_batch"] == 118
  code, out, _ = run(capfd, *common)
  assert code == 0
  assert "added up with other devices 2.13 MB 2.13 MB" in " ".join(out.split())
  code, _, err = run(capfd, *common, "--mesh", "3x1")
  assert code
  assert "mesh: 8 rows cannot be cut into 3 equal parts" in err


def test_host_memory_bounds_the_batch(capfd):
  _, row = printed(capfd, "--host-gb", 256)
  assert row["max_batch"] == 14  # 256e9 / 17196646400 = 14.9
  assert row["max_batch_host_bytes"] == 14 * 17196646400


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (("--device", "h900"), ("device", "h900", "h100", "tpu7x", "custom")),
    (("--device", "custom", "--tflops", "1"), ("custom", "--memory-gb", "--link-gbs")),
    (("--link-gbs=-1",), ("--link-gbs", "above 0")),
    (("--model", "no-such"), ("no-such", "llama-3.1-8b", "custom")),
    (("--model", "custom", "--layers", "2"), ("custom", "--heads", "--vocab")),
    (("--layers=-1",), ("layers", "-1")),
    (("--kv-heads", "5"), ("32", "5")),
    (("--head-dim", "7"), ("head", "7")),
    (("--method", "oracle"), ("oracle", "whole cache", "a2ats-plus")),
    (("--method", "a2ats-plus:page=0"), ("page", "0")),
    (("--method", "nothing"), ("nothing", "known")),
    (("--budget", "7.5"), ("budget", "7.5")),
    (("--codewords", "0"), ("codewords", "0")),
    (("--union", "0.5"), ("union", "0.5")),
    (("--spread", "nan"), ("spread", "nan")),
    (("--batch", "0"), ("batch", "0")),
    (("--T", "0"), ("prompt", "0")),
    (("--T", "20000000"), ("20000128", "16777216")),
    (("--host-gb=-1",), ("host_gb", "-1")),
  ],
  ids=lambda value: " ".join(value),
)
def test_mistakes_end_in_one_line(capfd, options, words):
  code, out, err = run(capfd, *options)
  assert (code, out) == (2, "")
  assert err.startswith("a2ats: ")
  assert err.count("\n") == 1
  for word in words:
    assert word in err
