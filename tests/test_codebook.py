"""Nearest codewords against brute force, and files that load or are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax import codebook
from a2ats_jax.codebook import (
  HEADER,
  TENSORS,
  encode,
  item_scores,
  load_codebooks,
  make_codebook,
  save_codebooks,
  score_table,
)
from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig
from tests import cases, independent

jit_encode = jax.jit(encode)


def integers(rng, *shape) -> np.ndarray:
  """Small whole numbers: float32 sums of their products are exact, so ties are ties."""
  return rng.integers(-2, 3, size=shape).astype(np.float32)


def brute_force(keys, book):
  codes, margins = cases.encode_rows(np.asarray(keys)[None], _leading(book))
  return codes[0], margins[0]


def _leading(book):
  return jax.tree.map(lambda x: x[None], book)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_encode_equals_brute_force(seed):
  """Under a metric of each head's own, keys at random."""
  rng = np.random.default_rng(seed)
  book = cases.books(cases.PAIRS, seed).layer(1)
  keys = rng.normal(size=(2, 13, 2, 8)).astype(np.float32)
  want, margins = brute_force(keys, book)
  got = jit_encode(jnp.asarray(keys), book)
  assert got.dtype == jnp.uint16
  agree = np.asarray(got) == want
  assert np.all(agree | (margins < 1e-4))
  assert agree.mean() > 0.9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ties_go_to_the_lowest_index(seed):
  """Whole numbers and codewords that occur twice: every tie is exact."""
  rng = np.random.default_rng(seed)
  words = integers(rng, 2, 5, 3)
  words = np.concatenate([words, words[:, ::-1]], axis=1)
  whitener = np.tril(integers(rng, 2, 3, 3)) + 3 * np.eye(3, dtype=np.float32)
  book = make_codebook(jnp.asarray(words), jnp.asarray(whitener))
  keys = integers(rng, 2, 13, 2, 3)
  want, margins = brute_force(keys, book)
  assert np.any(margins == 0)
  np.testing.assert_array_equal(jit_encode(jnp.asarray(keys), book), want)


def test_offsets_by_hand():
  """``(1, 2) L = (7, 4)`` and ``(0, 1) L = (3, 2)``: halves of 65 and 13."""
  words, lower = jnp.asarray([[[1.0, 2.0], [0.0, 1.0]]]), jnp.asarray([[[1.0, 0.0], [3.0, 2.0]]])
  np.testing.assert_array_equal(make_codebook(words, lower).offsets, [[32.5, 6.5]])


def test_encode_takes_the_offsets_that_are_kept():
  """A step squares no codeword: no sum but the matrix products, and other offsets tell."""
  book = make_codebook(jnp.asarray([[[1.0], [2.0]]]), jnp.ones((1, 1, 1)))
  keys = jnp.full((1, 1, 1, 1), 2.0)
  assert encode(keys, book).item() == 1
  assert encode(keys, dataclasses.replace(book, offsets=jnp.asarray([[0.0, 9.0]]))).item() == 0
  assert "reduce_sum" not in str(jax.make_jaxpr(encode)(keys, book))


def test_the_metric_decides():
  """The nearest codeword in plain distance is not the nearest under H."""
  words = jnp.asarray([[[1.0, 0.0], [0.0, 3.0]]])
  keys = jnp.zeros((1, 1, 1, 2))
  plain = make_codebook(words, jnp.eye(2)[None])
  stretched = make_codebook(words, jnp.asarray([[[10.0, 0.0], [0.0, 1.0]]]))
  assert encode(keys, plain).item() == 0
  assert encode(keys, stretched).item() == 1


def test_the_whitener_multiplies_from_the_right():
  """``z = k L`` with L lower triangular: H = L L^T, not L^T L."""
  lower = np.array([[1.0, 0.0], [5.0, 1.0]], np.float32)
  words = np.array([[[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]], np.float32)
  keys = np.array([0.5, 0.4], np.float32).reshape(1, 1, 1, 2)
  right = independent.encode(keys[0, :, 0], words[0], lower @ lower.T)[0][0]
  wrong = independent.encode(keys[0, :, 0], words[0], lower.T @ lower)[0][0]
  assert right != wrong
  book = make_codebook(jnp.asarray(words), jnp.asarray(lower)[None])
  assert encode(jnp.asarray(keys), book).item() == right


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 1300])
def test_blocks_of_tokens(tokens):
  """Lengths around and not a multiple of the block: the last tokens are coded like the first."""
  rng = np.random.default_rng(tokens)
  book = cases.books(cases.PAIRS, 3).layer(0)
  some = rng.normal(size=(1, 50, 2, 8)).astype(np.float32)
  want = np.asarray(jit_encode(jnp.asarray(some), book))
  repeats = -(-tokens // 50)
  keys = np.tile(some, (1, repeats, 1, 1))[:, :tokens]
  got = jit_encode(jnp.asarray(keys), book)
  np.testing.assert_array_equal(got, np.tile(want, (1, repeats, 1))[:, :tokens])


def test_encode_builds_no_tokens_by_codewords_array():
  """Distances exist for one block at a time."""
  tokens, size = 4096, 256
  shape = dataclasses.replace(cases.SINGLES, codewords=size)
  book = cases.books(shape).layer(0)
  keys = jax.ShapeDtypeStruct((1, tokens, 2, 6), jnp.float32)
  compiled = jax.jit(lambda keys: encode(keys, book)).lower(keys).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  assert 0 < memory < tokens * size * 2 * 4 / 2


@pytest.mark.parametrize("shape", [(1, 3, 3, 8), (1, 3, 2, 6)])
def test_encode_refuses_other_shapes(shape):
  with pytest.raises(ValueError, match="encode"):
    encode(jnp.zeros(shape), cases.books(cases.PAIRS).layer(0))


def test_encode_refuses_all_layers_at_once():
  with pytest.raises(ValueError, match="encode"):
    encode(jnp.zeros((1, 3, 2, 8)), cases.books(cases.PAIRS))


def test_score_table_is_the_query_times_each_codeword():
  """Cell ``z C + c`` of query head h: segment z's query times codeword c of KV head ``h // G``."""
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(2, 3, 2, 4, 8)).astype(np.float32)
  words = rng.normal(size=(2, 5, 8)).astype(np.float32)
  got = score_table(jnp.asarray(queries), jnp.asarray(words))
  assert got.shape == (2, 3, 4, 10)
  for b, s, h, z, c in np.ndindex(2, 3, 4, 2, 5):
    want = queries[b, s, z, h] @ words[h // 2, c]
    np.testing.assert_allclose(got[b, s, h, z * 5 + c], want, atol=1e-5)


@pytest.mark.parametrize("each", [5, 0])
def test_item_scores_are_the_query_of_a_tokens_segment_times_its_codeword(each):
  """Token ``z each + i`` of KV head ``h // G``: segment z's query times the token's codeword."""
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(2, 3, 4, 6, 8)).astype(np.float32)
  words = rng.normal(size=(2, 2, 4 * each, 8)).astype(np.float32)
  got = item_scores(jnp.asarray(queries), jnp.asarray(words))
  assert got.shape == (2, 3, 6, 4 * each)
  for b, s, h, z, i in np.ndindex(2, 3, 6, 4, each):
    want = queries[b, s, z, h] @ words[b, h // 3, z * each + i]
    np.testing.assert_allclose(got[b, s, h, z * each + i], want, atol=1e-5)


@pytest.mark.parametrize("size", [0, codebook.MAX_CODEWORDS + 1])
def test_sizes_beyond_the_code_type_are_refused(size):
  with pytest.raises(UserError, match="codewords"):
    make_codebook(jnp.zeros((1, size, 2)), jnp.zeros((1, 2, 2)))


# --- files --------------------------------------------------------------------------------------

ROPE = RopeConfig(head_dim=8, theta=500.0, scaling="llama3", factor=8.0, original_context=64)
SAVED = {"fingerprint": "abc", "rope": ROPE}
WANTED = SAVED | {"layers": 2, "kv_heads": 2}


@pytest.fixture
def saved(tmp_path):
  save_codebooks(tmp_path / "book", cases.books(cases.PAIRS), training={"steps": 3}, **SAVED)
  return tmp_path / "book"


def edit_header(directory, **changes):
  header = json.loads((directory / HEADER).read_text())
  (directory / HEADER).write_text(json.dumps(header | changes))


def rewrite_tensors(directory, tensors, **changes):
  """Other tensors with the right hash: only their contents are wrong."""
  save = codebook.hashlib.sha256
  data = safetensors.numpy.save(tensors)
  (directory / TENSORS).write_bytes(data)
  edit_header(directory, sha256=save(data).hexdigest(), **changes)


def test_round_trip(saved):
  book, header = load_codebooks(saved, **WANTED)
  want = cases.books(cases.PAIRS)
  np.testing.assert_array_equal(book.codewords, want.codewords)
  np.testing.assert_array_equal(book.whitener, want.whitener)
  np.testing.assert_allclose(book.whitened, want.whitened, atol=1e-6)
  assert header["training"] == {"steps": 3}
  assert sorted(path.name for path in saved.iterdir()) == sorted([HEADER, TENSORS])


@pytest.mark.parametrize(
  ("change", "both"),
  [
    ({"fingerprint": "abd"}, ["model_fingerprint", "abc", "abd"]),
    ({"layers": 3}, ["layers", "2", "3"]),
    ({"kv_heads": 4}, ["kv_heads", "2", "4"]),
    ({"rope": dataclasses.replace(ROPE, theta=501.0)}, ["rope", "500.0", "501.0"]),
    ({"rope": dataclasses.replace(ROPE, head_dim=16)}, ["8", "16"]),
    ({"rope": dataclasses.replace(ROPE, factor=4.0)}, ["rope", "8.0", "4.0"]),
  ],
)
def test_another_model_is_refused(saved, change, both):
  """The message names what differs and both values."""
  with pytest.raises(UserError) as error:
    load_codebooks(saved, **(WANTED | change))
  for text in both:
    assert text in str(error.value)


@pytest.mark.parametrize("name", [HEADER, TENSORS])
def test_a_missing_file_is_refused(saved, name):
  (saved / name).unlink()
  with pytest.raises(UserError, match=name):
    load_codebooks(saved, **WANTED)


def test_a_missing_directory_is_refused(tmp_path):
  with pytest.raises(UserError, match="nowhere"):
    load_codebooks(tmp_path / "nowhere", **WANTED)


def test_a_file_instead_of_a_directory_is_refused(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="file"):
    load_codebooks(tmp_path / "file", **WANTED)


def test_a_damaged_byte_is_refused(saved):
  data = bytearray((saved / TENSORS).read_bytes())
  data[-3] ^= 1
  (saved / TENSORS).write_bytes(bytes(data))
  with pytest.raises(UserError, match="hash"):
    load_codebooks(saved, **WANTED)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_tensors_are_refused(saved, kept):
  data = (saved / TENSORS).read_bytes()
  (saved / TENSORS).write_bytes(data[:kept])
  with pytest.raises(UserError, match="hash"):
    load_codebooks(saved, **WANTED)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3"])
def test_an_unreadable_header_is_refused(saved, data):
  (saved / HEADER).write_bytes(data)
  with pytest.raises(UserError, match=HEADER):
    load_codebooks(saved, **WANTED)


@pytest.mark.parametrize("change", [{"version": 2}, {"version": None}, {"format": "other"}])
def test_another_format_is_refused(saved, change):
  edit_header(saved, **change)
  with pytest.raises(UserError, match="format"):
    load_codebooks(saved, **WANTED)


def test_numbers_that_are_not_finite_are_refused(saved):
  for name in ("codewords", "whitener"):
    tensors = safetensors.numpy.load((saved / TENSORS).read_bytes())
    tensors[name][0, 0, 0, 0] = np.nan
    rewrite_tensors(saved, tensors)
    with pytest.raises(UserError, match="finite"):
      load_codebooks(saved, **WANTED)
    tensors[name][0, 0, 0, 0] = 0
    rewrite_tensors(saved, tensors)


@pytest.mark.parametrize(
  "tensors",
  [
    {},
    {"codewords": np.zeros((2, 2, 6, 8), np.float32)},
    {
      "codewords": np.zeros((2, 2, 5, 8), np.float32),
      "whitener": np.zeros((2, 2, 8, 8), np.float32),
    },
    {
      "codewords": np.zeros((2, 2, 6, 8), np.float32),
      "whitener": np.zeros((2, 1, 8, 8), np.float32),
    },
  ],
  ids=["none", "one", "fewer codewords", "fewer metrics"],
)
def test_other_tensors_are_refused(saved, tensors):
  rewrite_tensors(saved, tensors)
  with pytest.raises(UserError, match="codewords"):
    load_codebooks(saved, **WANTED)


def test_not_safetensors_is_refused(saved):
  (saved / TENSORS).write_bytes(b"not a tensor file")
  digest = codebook.hashlib.sha256(b"not a tensor file").hexdigest()
  edit_header(saved, sha256=digest)
  with pytest.raises(UserError, match=TENSORS):
    load_codebooks(saved, **WANTED)


class Killed(BaseException):
  """Stands for a process that ends in the middle of a write."""


@pytest.mark.parametrize("again", [False, True], ids=["new", "over an older one"])
def test_cut_off_before_the_header_never_loads(tmp_path, monkeypatch, again):
  """Tensors without their header are no codebook, whether or not an old header lies there."""
  if again:
    save_codebooks(tmp_path, cases.books(cases.PAIRS, 1), training={}, **SAVED)
  write = codebook.write_atomically

  def killed(path, data):
    if path.name == HEADER:
      raise Killed
    write(path, data)

  monkeypatch.setattr(codebook, "write_atomically", killed)
  with pytest.raises(Killed):
    save_codebooks(tmp_path, cases.books(cases.PAIRS, 2), training={}, **SAVED)
  assert (tmp_path / TENSORS).exists()
  with pytest.raises(UserError, match="codebook"):
    load_codebooks(tmp_path, **WANTED)


def test_cut_off_within_a_write_keeps_the_older_codebook(saved, monkeypatch):
  """A write that fails midway leaves the old file, and no temporary one."""

  def full(descriptor):
    raise OSError(28, "no space left")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="no space"):
    save_codebooks(saved, cases.books(cases.PAIRS, 2), training={}, **SAVED)
  book, _ = load_codebooks(saved, **WANTED)
  np.testing.assert_array_equal(book.codewords, cases.books(cases.PAIRS).codewords)
  assert sorted(path.name for path in saved.iterdir()) == sorted([HEADER, TENSORS])
