"""The Mosaic GPU decode attention, interpreted on the CPU with race detection."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from a2ats_jax import attention
from a2ats_jax.errors import UserError
from a2ats_jax.ops.paged_decode import gpu, reference
from tests.ops import tails

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
# Sums of up to a hundred products of size one in float32, in two orders.
TOLERANCE = 2e-5


class Shape(NamedTuple):
  batch: int
  kv_heads: int
  group: int
  fetched: int
  page: int
  head_dim: int
  dtype: Any
  tiles: gpu.Tiles | None = None


def cut(steps: int, stages: int, splits: int) -> gpu.Tiles:
  return gpu.Tiles(steps=steps, stages=stages, splits=splits)


SHAPES = {
  "default tiles": Shape(2, 2, 2, 3, 16, 128, jnp.bfloat16),
  "odd": Shape(1, 1, 3, 5, 7, 64, jnp.float32, cut(1, 2, 1)),
  "prime, split": Shape(1, 2, 1, 7, 5, 64, jnp.bfloat16, cut(1, 2, 2)),
  "more splits than blocks": Shape(1, 1, 1, 3, 8, 128, jnp.float32, cut(2, 1, 9)),
  "wide head": Shape(1, 1, 2, 1, 11, 256, jnp.float32, cut(1, 2, 2)),
  "wide head, bfloat16": Shape(1, 1, 1, 1, 6, 256, jnp.bfloat16, cut(1, 3, 1)),
  "one small page": Shape(1, 1, 8, 1, 3, 64, jnp.float32, cut(1, 2, 1)),
}
WRONG = SHAPES["odd"]


def arguments(shape: Shape) -> tuple[jax.Array, ...]:
  """Random pages; logits of several units, half of the tokens in the mask."""
  rng = np.random.default_rng(11)
  block = (shape.batch, shape.kv_heads, shape.fetched, shape.page)
  heads = shape.kv_heads * shape.group
  q = jnp.asarray(3 * rng.normal(size=(shape.batch, 1, heads, shape.head_dim)), jnp.float32)
  k, v = (jnp.asarray(rng.normal(size=(*block, shape.head_dim)), shape.dtype) for _ in range(2))
  return q, k, v, jnp.asarray(rng.random(block) < 0.5)


def run(
  shape: Shape,
  args: tuple[jax.Array, ...],
  fault: Any = None,
  tail: attention.Tail | None = None,
) -> attention.Part:
  return gpu.paged_decode(*args, tail=tail, tiles=shape.tiles, interpret=INTERPRET, _fault=fault)


def exact(args: tuple[jax.Array, ...], tail: attention.Tail | None = None) -> attention.Part:
  """The reference in float32 throughout, as the kernel."""
  q, k, v, mask = args
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  return reference.paged_decode(q, k, v, mask, tail=tail)


def tail_for(shape: Shape, codewords: int, level: float = 2.0) -> attention.Tail:
  return tails.draw(
    np.random.default_rng(codewords),
    batch=shape.batch,
    kv_heads=shape.kv_heads,
    group=shape.group,
    dim=shape.head_dim,
    codewords=codewords,
    level=level,
  )


def close(part: attention.Part, expected: attention.Part) -> bool:
  return all(
    np.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)
    for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True)
  )


@pytest.mark.parametrize("name", SHAPES)
def test_equals_reference(name):
  args = arguments(SHAPES[name])
  part = run(SHAPES[name], args)
  assert close(part, exact(args))
  # The reference rounds weights to the dtype of the values, by less than one part in 2**8.
  q, k, v, mask = args
  rounded = attention.finish(reference.paged_decode(q.astype(k.dtype), k, v, mask))
  if k.dtype == jnp.bfloat16:
    part = run(SHAPES[name], (q.astype(k.dtype), k, v, mask))
    off = np.max(np.abs(attention.finish(part) - rounded))
    assert off <= 2**-8 * np.max(np.abs(v.astype(jnp.float32)))


def test_no_token_counts():
  """A KV head without any, and one whose only token is the very last."""
  shape = Shape(1, 2, 1, 3, 5, 64, jnp.float32, cut(1, 2, 2))
  q, k, v, mask = arguments(shape)
  mask = jnp.zeros_like(mask).at[0, 1, -1, -1].set(True)
  part = run(shape, (q, k, v, mask))
  assert close(part, exact((q, k, v, mask)))
  assert np.array_equal(part.total[0, 0], [0, 1])
  assert np.array_equal(part.peak[0, 0, 0], -np.inf)
  assert np.array_equal(part.out[0, 0, 1], v[0, 1, -1, -1])


@pytest.mark.parametrize("fault", ["last page", "mask", "scale", "stale"])
def test_wrong_kernel_fails(fault):
  args = arguments(WRONG)
  assert not close(run(WRONG, args, fault), exact(args))


@settings(max_examples=6, deadline=None)
@given(
  group=st.sampled_from([1, 3, 4]),
  head_dim=st.sampled_from([64, 128, 256]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  codewords=st.sampled_from([1, 8, 37, 64]),
  level=st.sampled_from([-300.0, -2.0, 3.0, 300.0]),
  splits=st.sampled_from([1, 3]),
  seen=st.booleans(),
)
def test_a_tail(group, head_dim, dtype, codewords, level, splits, seen):
  """Also without a token, and where some CTAs have codewords alone."""
  shape = Shape(1, 2, group, 2, 7, head_dim, dtype, cut(1, 2, splits))
  q, k, v, mask = arguments(shape)
  args, tail = (q, k, v, mask & seen), tail_for(shape, codewords, level)
  assert close(run(shape, args, tail=tail), exact(args, tail))


@pytest.mark.parametrize(
  "fault",
  [
    "last page",
    "mask",
    "scale",
    "stale",
    "last codewords",
    "tail scale",
    "no tail total",
    "tail total again",
  ],
)
def test_wrong_kernel_fails_with_a_tail(fault):
  """Two CTAs; the peak of the tokens is above that of the tail for some heads."""
  shape = WRONG._replace(tiles=cut(1, 2, 2))
  args, tail = arguments(shape), tail_for(shape, 37)
  assert close(run(shape, args, tail=tail), exact(args, tail))
  assert not close(run(shape, args, fault, tail), exact(args, tail))


@pytest.mark.skipif(
  jax.__version_info__ < (0, 12), reason="the interpreter of jax 0.11 sees fewer races"
)
@pytest.mark.parametrize("fault", ["wait", "fence"])
def test_race_is_reported(fault):
  """Reads before the copy has come; a copy over a block that is still read."""
  args = arguments(WRONG)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    jax.block_until_ready(run(WRONG, args, fault))


def test_tiles_by_shape():
  """Llama 3.1 8B with 128 pages of 16 tokens: 128 CTAs, blocks of 8 KiB."""
  llama: dict[str, int] = {"heads": 8, "group": 4, "tokens": 2048, "head_dim": 128, "itemsize": 2}
  assert gpu.Tiles.of(**llama) == cut(4, 4, 16)
  assert gpu.Tiles.of(**llama | {"group": 8}).steps == 2
  assert gpu.Tiles.of(**llama | {"heads": 1024}).splits == 1
  assert gpu.Tiles.of(**llama | {"tokens": 1}).splits == 1
  assert gpu.Tiles.of(**llama | {"tokens": 88, "codewords": 1024}).splits == 8


def test_bad_tiles_are_refused():
  with pytest.raises(UserError, match="stages must be at least 1, got 0"):
    cut(1, 0, 1)
  args = arguments(WRONG)
  with pytest.raises(UserError, match="shared memory must be at most 228352, got"):
    gpu.paged_decode(*args, tiles=cut(16, 16, 1))
  with pytest.raises(UserError, match="at most 256 tokens, got 512"):
    gpu.paged_decode(*args, tiles=cut(64, 1, 1))


def test_hindrances():
  q, k, v, mask = arguments(WRONG)
  assert gpu.hindrances("gpu", q, k, v, mask) == []
  assert gpu.hindrances("cpu", q, k, v, mask) == ["it needs an NVIDIA GPU, and the backend is cpu"]
  many = jnp.repeat(q, 3, axis=2)
  small = [x[..., :32].astype(jnp.float16) for x in (k, v)]
  reasons = gpu.hindrances("gpu", many[..., :32], *small, mask)
  assert len(reasons) == 3
  assert "query heads of a KV head must be at most 8, got 9" in reasons
