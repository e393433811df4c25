"""What every registered method has to hold, whatever it keeps."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods import registry
from a2ats_jax.methods.base import AcrossHeads, needs_of
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.sharded import shard_method
from a2ats_jax.sharding import make_mesh
from a2ats_jax.store import KVStore
from tests import cases
from tests.methods.examples import EXAMPLES

SHAPE = dataclasses.replace(cases.PAIRS, heads=6, new=56)  # three query heads a KV head
LENGTHS = [40, 1, 13]
NAMES = [name for name in registry.METHODS if name != "a2ats-reference"]


@cache
def drawn() -> cases.Cache:
  return cases.draw_cache(SHAPE, seed=3, lengths=LENGTHS, rope="yarn")


def build(name: str, options: str, budget: str):
  spec = registry.parse_method(":".join(filter(None, (name, options))))
  book = drawn().book
  return registry.build(spec, budget=Budget.parse(budget), codebooks={"default": book})


def example(name: str):
  it = EXAMPLES[name]
  return build(name, it.options, it.budget)


def steps_of(method, state: Any, first: int, count: int, at_once: int):
  """Outputs and statistics of some steps over every layer, ``at_once`` tokens a call."""
  outs, figures = [], []
  for step in range(first, first + count, at_once):
    positions = cases.step_positions(drawn(), step, at_once)
    for layer in range(SHAPE.layers):
      q, k, v = cases.tokens_at(drawn(), layer, positions)
      out, state, stats, _ = cases.attend(
        method, state, q, k, v, jnp.asarray(positions), drawn().rope, jnp.asarray(layer, jnp.int32)
      )
      outs.append(np.asarray(out))
      figures.append(stats)
  return outs, figures, state


def joined(parts: list[np.ndarray]) -> np.ndarray:
  """``[L, B, S, ...]`` out of calls that alternate between layers."""
  return np.stack([np.concatenate(parts[layer :: SHAPE.layers], axis=1) for layer in range(2)])


def test_every_method_has_an_example():
  assert set(EXAMPLES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_equals_full_attention_when_nothing_is_left_out(name):
  """Budget 1, 16 bits, nothing pruned: more than fifty steps of ragged rows."""
  it = EXAMPLES[name]
  method = build(name, it.exact, "1")
  want, _, _ = steps_of(Full(), cases.prefilled(Full(), drawn()), 0, 52, 4)
  got, figures, _ = steps_of(method, cases.prefilled(method, drawn()), 0, 52, 4)
  for one, two in zip(got, want, strict=True):
    np.testing.assert_allclose(one, two, atol=it.tolerance, rtol=0)
  for stats in figures:
    np.testing.assert_array_equal(stats.read, np.broadcast_to(stats.length[..., None], (3, 4, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_at_once_equal_one_by_one(name):
  """So that teacher-forced evaluation measures what decoding does; also across boundaries."""
  method = example(name)
  start = cases.prefilled(method, drawn())
  together, many, _ = steps_of(method, start, 0, 48, 8)
  alone, single, _ = steps_of(method, start, 0, 48, 1)
  np.testing.assert_allclose(joined(together), joined(alone), atol=5e-5, rtol=0)
  for field in ("length", "selected", "read", "read_bytes"):
    np.testing.assert_allclose(
      joined([getattr(x, field) for x in many]),
      joined([getattr(x, field) for x in single]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_possible(name):
  """A step reads its own token at least and no more than there are; bytes are read for it."""
  method = example(name)
  outs, figures, _ = steps_of(method, cases.prefilled(method, drawn()), 0, 48, 8)
  assert all(np.all(np.isfinite(out)) for out in outs)
  for stats in figures:
    assert np.all(np.asarray(stats.read) >= 1)
    assert np.all(stats.read <= stats.length[..., None])
    assert np.all(stats.selected <= stats.read)
    assert np.all(stats.read_bytes > 0)
    assert np.all((stats.tail >= 0) & (stats.tail <= 1))
  if EXAMPLES[name].exact != EXAMPLES[name].options or registry.METHODS[name].takes_budget:
    least = np.min(figures[-1].read_bytes[0])
    whole = int(figures[-1].length[0, -1]) * 2 * SHAPE.head_dim * 4
    assert name.startswith("a2ats") or least < whole  # so short a cache has a longer index


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_neither_stored_nor_attended(name):
  """A row of padding gives zeros, counts nothing, and later steps do not know of it."""
  method = example(name)
  start = cases.prefilled(method, drawn())
  layer = jnp.asarray(1, jnp.int32)
  positions = cases.step_positions(drawn(), 0)
  q, k, v = cases.tokens_at(drawn(), 1, positions)
  none = positions.copy()
  none[0] = -1
  args = (drawn().rope, layer)
  out, paused, stats, _ = cases.attend(method, start, q, k, v, jnp.asarray(none), *args)
  assert not np.any(out[0])
  for field in dataclasses.fields(stats):
    assert not np.any(np.asarray(getattr(stats, field.name))[0]), field.name
  want, _, _, _ = cases.attend(method, start, q, k, v, jnp.asarray(positions), *args)
  np.testing.assert_allclose(out[1:], want[1:], atol=cases.TOLERANCE, rtol=0)
  resumed = positions.copy()
  resumed[1:] = -1
  got, _, _, _ = cases.attend(method, paused, q, k, v, jnp.asarray(resumed), *args)
  np.testing.assert_allclose(got[0], want[0], atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_know_of_each_other(name):
  """A row's output is the same whatever the other rows hold, NaN included."""
  method = example(name)
  want, _, _ = steps_of(method, cases.prefilled(method, drawn()), 0, 8, 8)
  other = drawn()
  k, v = other.k.copy(), other.v.copy()
  k[:, 0], v[:, 0] = np.nan, np.nan
  poisoned = dataclasses.replace(other, k=k, v=v)
  state = cases.prefilled(method, poisoned)
  positions = cases.step_positions(other, 0, 8)
  for layer in range(SHAPE.layers):
    tokens = cases.tokens_at(poisoned, layer, positions)
    out, state, _, _ = cases.attend(
      method, state, *tokens, jnp.asarray(positions), other.rope, jnp.asarray(layer, jnp.int32)
    )
    np.testing.assert_allclose(np.asarray(out)[1:], want[layer][1:], atol=cases.TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_donation_and_a_round_trip_to_disk(name, tmp_path):
  """Every leaf is an array: a saved state goes on as the one in memory does."""
  method = example(name)
  start = cases.prefilled(method, drawn())
  want, _, _ = steps_of(method, start, 0, 8, 4)
  leaves, tree = jax.tree.flatten(start)
  np.savez(tmp_path / "state.npz", *[np.asarray(x) for x in leaves])
  with np.load(tmp_path / "state.npz") as saved:
    again = [
      jax.device_put(saved[key], x.sharding) for key, x in zip(saved.files, leaves, strict=True)
    ]
  state = jax.tree.unflatten(tree, again)
  donating = jax.jit(
    lambda state, q, k, v, p, rope, layer: method.attend(
      state, q, k, v, positions=p, rope=rope, layer=layer
    ),
    donate_argnums=0,
  )
  got = []
  for step in (0, 4):
    positions = cases.step_positions(drawn(), step, 4)
    for layer in range(SHAPE.layers):
      tokens = cases.tokens_at(drawn(), layer, positions)
      out, state, _ = donating(
        state, *tokens, jnp.asarray(positions), drawn().rope, jnp.asarray(layer, jnp.int32)
      )
      got.append(np.asarray(out))
  for one, two in zip(got, want, strict=True):
    np.testing.assert_allclose(one, two, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_state_can_be_given_away(name):
  """As the first layer of a prefill does: every array has memory of its own."""
  method = example(name)
  state = method.init(SHAPE.geometry)
  where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
  assert len(set(where)) == len(where)
  absorb = jax.jit(lambda state, prompt: method.absorb(state, prompt, layer=0), donate_argnums=0)
  absorb(state, cases.prompt_layer(drawn(), 0, needs_of(method)))


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_docstring_says(name):
  """Bytes of live buffers, not of an estimate."""
  state = example(name).init(SHAPE.geometry)
  host = 0
  stores = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KVStore))
  for store in stores:
    if isinstance(store, KVStore) and store.host:
      host += store.pages.nbytes
  device = sum(x.nbytes for x in jax.tree.leaves(state)) - host
  assert (device, host) == EXAMPLES[name].bytes(SHAPE.geometry)


@pytest.mark.usefixtures("quick_to_compile")
@pytest.mark.parametrize("name", NAMES)
def test_over_a_mesh_equals_one_device(name):
  """A row and a KV head on each of six devices; of methods that mix heads, a row on each of three.

  But for bytes moved, where a device waits for the pages of its own heads alone, and for MagicPIG's
  bytes read: what its heads share lies on every device.
  """
  method = example(name)
  mixed = isinstance(method, AcrossHeads)
  if mixed:
    with pytest.raises(UserError, match=f"{name} cannot be cut over KV heads: .*; cut the batch"):
      shard_method(method, make_mesh(heads=2))
  mesh = make_mesh(batch=3, heads=1 if mixed else 2)
  sharded = shard_method(method, mesh)
  want, figures, _ = steps_of(method, cases.prefilled(method, drawn()), 0, 16, 8)
  got, stats, state = steps_of(sharded, cases.prefilled(sharded, drawn()), 0, 16, 8)
  for one, two in zip(got, want, strict=True):
    np.testing.assert_allclose(one, two, atol=cases.TOLERANCE, rtol=0)
  for one, two in zip(stats, figures, strict=True):
    for field in dataclasses.fields(two):
      got, want = (np.asarray(getattr(x, field.name)) for x in (one, two))
      if field.name == "moved":
        assert np.all(got <= want)
      elif field.name == "read_bytes" and name == "magicpig":
        assert np.all(got > want)
      else:
        np.testing.assert_allclose(got, want, atol=cases.TOLERANCE, rtol=0, err_msg=field.name)
  g, heads = SHAPE.geometry, mesh.shape["heads"]
  part = dataclasses.replace(g, batch=1, heads=g.heads // heads, kv_heads=g.kv_heads // heads)
  held = {"device": 0, "pinned_host": 0}
  for x in jax.tree.leaves(state):
    held[x.sharding.memory_kind] += x.addressable_data(0).nbytes
  assert tuple(held.values()) == EXAMPLES[name].bytes(part)
