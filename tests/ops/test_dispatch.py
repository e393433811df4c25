"""The choice of an implementation: what is asked for runs, or says why it cannot."""

import importlib

import jax.numpy as jnp
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.ops import dispatch
from a2ats_jax.ops.pages import BytePages, FloatPages
from a2ats_jax.ops.tiles import PageFormat

OPS = ("page_fetch", "paged_decode", "vq_encode")


def arguments(op: str) -> tuple:
  return {
    "page_fetch": (jnp.zeros((3, 2, 128)), jnp.zeros(2, jnp.int32)),
    "paged_decode": (
      jnp.zeros((1, 1, 2, 64)),
      FloatPages(jnp.zeros((1, 1, 2, 8, 64)), jnp.zeros((1, 1, 2, 8, 64))),
      jnp.zeros((1, 1, 2, 8), bool),
    ),
    "vq_encode": (jnp.zeros((4, 1, 8)), jnp.eye(8)[None], jnp.ones((1, 3, 8)), jnp.ones((1, 3))),
  }[op]


def implementation(name: str, said: list, reasons: tuple[str, ...] = ()) -> dispatch.Implementation:
  return dispatch.Implementation(
    run=lambda *args: said.append(name), hindrances=lambda backend, *args: list(reasons)
  )


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_for_another_backend_says_why(op):
  """On the CPU the reference runs; a kernel by name is refused in one line."""
  function = getattr(importlib.import_module(f"a2ats_jax.ops.{op}"), op)
  function(*arguments(op))
  function(*arguments(op), implementation=dispatch.REFERENCE)
  with pytest.raises(UserError, match=f"{op}: implementation 'gpu' cannot run: it needs an NVIDIA"):
    function(*arguments(op), implementation="gpu")
  with pytest.raises(UserError, match=f"{op}: implementation 'tpu' cannot run: it needs a TPU"):
    function(*arguments(op), implementation="tpu")
  with pytest.raises(UserError, match=f"{op}: unknown implementation 'cpu'; known: auto, "):
    function(*arguments(op), implementation="cpu")


def test_bytes_are_for_a_tpu():
  """Pages of bytes and pages of floats: each kernel says which it cannot take."""
  form = PageFormat(page=8, dim=64, dtype=jnp.dtype(jnp.float32))
  q, pages, mask = arguments("paged_decode")
  packed = BytePages(form.pack(*pages), form)
  kernels = importlib.import_module("a2ats_jax.ops.paged_decode").IMPLEMENTATIONS
  assert kernels["tpu"].hindrances("tpu", q, packed, mask) == []
  assert kernels["tpu"].hindrances("tpu", q, pages, mask) == []
  assert "pages must be floats, got bytes" in kernels["gpu"].hindrances("gpu", q, packed, mask)
  kernels = importlib.import_module("a2ats_jax.ops.page_fetch").IMPLEMENTATIONS
  ids = jnp.zeros(2, jnp.int32)
  assert kernels["tpu"].hindrances("tpu", packed.data[0, 0], ids) == []
  assert kernels["tpu"].hindrances("tpu", *arguments("page_fetch")) != []
  assert kernels["gpu"].hindrances("gpu", packed.data[0, 0], ids) != []
  kernels = importlib.import_module("a2ats_jax.ops.page_write").IMPLEMENTATIONS
  assert kernels["tpu"].hindrances("tpu", packed.data[0, 0], ids, packed.data[0, 0]) == []
  assert kernels["tpu"].hindrances("cpu", packed.data[0, 0], ids, packed.data[0, 0]) != []


def test_the_first_that_nothing_hinders_runs():
  said: list[str] = []
  table = {
    "fast": implementation("fast", said, ("too large", "wrong type")),
    "slower": implementation("slower", said),
    dispatch.REFERENCE: implementation("reference", said),
  }
  dispatch.call("op", table, dispatch.AUTO, 1)
  dispatch.call("op", table, "reference", 1)
  assert said == ["slower", "reference"]
  with pytest.raises(UserError, match="'fast' cannot run: too large; wrong type"):
    dispatch.call("op", table, "fast", 1)
