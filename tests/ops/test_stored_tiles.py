"""Stored tile sizes: taken at their shape on their device, and refused where they are not that."""

import json
import re

import jax.numpy as jnp
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.ops import lookup, page_fetch, paged_decode, stored_tiles, vq_encode
from a2ats_jax.ops.pages import BytePages, FloatPages
from a2ats_jax.ops.tiles import FetchTiles, PageFormat

KIND = "cpu"  # what this process's device calls itself
FORM = PageFormat(page=8, dim=64, dtype=jnp.dtype(jnp.float32))
FLOATS = FloatPages(jnp.zeros((1, 2, 3, 8, 64)), jnp.zeros((1, 2, 3, 8, 64)))
BYTES = BytePages(FORM.pack(*FLOATS), FORM)
QUERY, MASK = jnp.zeros((1, 1, 4, 64)), jnp.zeros((1, 2, 3, 8), bool)
KEYS, METRIC, WORDS = jnp.zeros((70, 2, 8)), jnp.zeros((2, 8, 8)), jnp.zeros((2, 16, 8))
NORMS = jnp.zeros((2, 16))
IDS = jnp.zeros(5, jnp.int32)
TABLES, PLACES = jnp.zeros((2, 1, 600), jnp.int32), jnp.zeros((2, 1, 7), jnp.int32)

# The op, its kernel's module and function, arguments, and sizes that no choice by shape gives.
KERNELS = {
  "page_fetch, tpu": (page_fetch, "tpu", "page_fetch", (BYTES.data[0, 0], IDS), {"depth": 3}),
  "page_fetch, gpu": (
    page_fetch,
    "gpu",
    "page_fetch",
    (jnp.zeros((4, 2, 512)), IDS),
    {"piece": 128},
  ),
  "paged_decode, bytes": (
    *(paged_decode, "tpu", "packed_decode"),
    (QUERY, BYTES, MASK),
    {"pages": 2},
  ),
  "paged_decode, tpu": (paged_decode, "tpu", "paged_decode", (QUERY, FLOATS, MASK), {"pages": 2}),
  "paged_decode, gpu": (
    *(paged_decode, "gpu", "paged_decode"),
    (QUERY, FLOATS, MASK),
    {"steps": 1, "stages": 3, "splits": 5},
  ),
  "vq_encode, tpu": (
    vq_encode,
    "tpu",
    "vq_encode",
    (KEYS, METRIC, WORDS, NORMS),
    {"keys": 7, "codewords": 9},
  ),
  "vq_encode, gpu": (
    *(vq_encode, "gpu", "vq_encode"),
    (KEYS, METRIC, WORDS, NORMS),
    {"codewords": 8, "stages": 3, "keys": 64},
  ),
  "lookup, tpu": (lookup, "tpu", "lookup", (TABLES, PLACES), {"rows": 3}),
}


class Taken(Exception):
  """Raised in a kernel's place, with the sizes it was called with."""


def take(*args, tiles, **kwargs):
  raise Taken(tiles)


def write(path, lines, **head):
  text = stored_tiles.text_of(lines, kind=KIND)
  path.write_text(json.dumps(json.loads(text) | head))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_the_sizes_of_its_shape_alone(name, tmp_path, monkeypatch):
  op, family, function, args, sizes = KERNELS[name]
  monkeypatch.setattr(stored_tiles, "FOLDER", tmp_path)
  monkeypatch.setattr(getattr(op, family), function, take)

  def taken():
    stored_tiles._read.cache_clear()  # as in a new process
    with pytest.raises(Taken) as call:
      op.IMPLEMENTATIONS[family].run(*args)
    return call.value.args[0]

  line = {"op": name.split(",")[0], "shape": dict(op.shape_of(*args)), "tiles": sizes}
  for key, value in line["shape"].items():
    other = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else 99
    write(stored_tiles.path_of(KIND), [line | {"shape": line["shape"] | {key: other}}])
    assert taken() is None, f"{key} does not matter"
  write(stored_tiles.path_of(KIND), [line])
  assert vars(taken()) == sizes


def test_many_keys_are_one_shape():
  shapes = [
    vq_encode.shape_of(jnp.zeros((n, 1, 8)), METRIC[:1], WORDS[:1], NORMS[:1])
    for n in (4095, 4096, 9000)
  ]
  assert shapes[1] == shapes[2] != shapes[0]


LINE = {"op": "page_fetch", "shape": {"fetched": 5}, "tiles": {"depth": 3}}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda path: path.write_text("{"), "damaged: JSONDecodeError"),
    (lambda path: path.write_text("[]"), "damaged: TypeError"),
    (lambda path: write(path, [{"op": "page_fetch", "shape": {}}]), "damaged: KeyError: 'tiles'"),
    (
      lambda path: write(path, [LINE], device="H100"),
      "expected a2ats-tiles 1 of cpu, got a2ats-tiles 1 H100",
    ),
    (
      lambda path: write(path, [LINE], version=9),
      "expected a2ats-tiles 1 of cpu, got a2ats-tiles 9 cpu",
    ),
    (
      lambda path: write(path, [LINE | {"tiles": {"pages": 3}}]),
      "no sizes of page_fetch: {'pages': 3}",
    ),
    (
      lambda path: write(path, [LINE | {"tiles": {"depth": 0}}]),
      "no sizes of page_fetch: {'depth': 0}",
    ),
  ],
)
def test_another_file_is_refused_in_one_line(change, message, tmp_path, monkeypatch):
  monkeypatch.setattr(stored_tiles, "FOLDER", tmp_path)
  path = stored_tiles.path_of(KIND)
  change(path)
  with pytest.raises(UserError, match=re.escape(message)) as error:
    stored_tiles.find("page_fetch", FetchTiles, {"fetched": 5})
  assert str(error.value).startswith(f"tiles: {path}: ")
  assert str(error.value).endswith("; run a2ats tune again, or remove the file")


def test_a_file_is_named_after_its_device():
  assert stored_tiles.path_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
