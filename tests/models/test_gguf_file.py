import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax.errors import UserError
from a2ats_jax.models.gguf_file import read_gguf
from a2ats_jax.models.gguf_header import read_header
from a2ats_jax.rope import RopeConfig
from tests.models.tiny_models import gguf_name, tiny_config, tiny_tensors, write_gguf


def one_line(error: pytest.ExceptionInfo) -> str:
  message = str(error.value)
  assert "\n" not in message
  return message


def test_config_of_the_real_model(smollm2):
  assert dataclasses.asdict(smollm2.config) == {
    "architecture": "llama",
    "vocab": 49152,
    "layers": 30,
    "heads": 9,
    "kv_heads": 3,
    "width": 576,
    "mlp_width": 1536,
    "context": 8192,
    "rope": dataclasses.asdict(RopeConfig(head_dim=64, theta=100000.0)),
    "norm_eps": 1e-5,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
    "post_norms": False,
    "activation": "silu",
    "embedding_scale": 1.0,
    "query_scale": 1.0,
    "tied": True,
    "local": None,
  }


def test_first_key_projection_equals_the_independent_one(smollm2, golden, golden_arrays):
  """Embedding, RMS norm and k_proj in numpy: wrong rows, scales or permutation would show."""
  model = smollm2
  x = model.tensors["model.embed_tokens.weight"][golden["prompt_ids"][:16]]
  x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.config.norm_eps)
  x = x * model.tensors["model.layers.0.input_layernorm.weight"]
  keys = x @ model.tensors["model.layers.0.self_attn.k_proj.weight"].T
  np.testing.assert_allclose(keys, golden_arrays["k_proj_0"], rtol=0, atol=5e-5)


def test_every_weight_of_the_real_model_is_float32_and_finite(smollm2):
  count = 0
  for array in smollm2.tensors.values():
    assert array.dtype == np.float32
    count += array.size
  assert count == 134_515_008


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_in_hugging_face_order(tmp_path, arch, tied):
  config = tiny_config(arch, tied=tied)
  tensors = tiny_tensors(config)
  model = read_gguf(write_gguf(tmp_path / "m.gguf", config, tensors))
  assert model.config == config
  assert set(model.tensors) == set(tensors)
  for name, expected in tensors.items():
    np.testing.assert_array_equal(model.tensors[name], expected, err_msg=name)


def test_biases_are_unpermuted_too(tmp_path):
  config = tiny_config("llama", qkv_bias=True, out_bias=True, mlp_bias=True)
  tensors = tiny_tensors(config)
  model = read_gguf(write_gguf(tmp_path / "m.gguf", config, tensors))
  assert model.config == config
  for name in tensors:
    np.testing.assert_array_equal(model.tensors[name], tensors[name], err_msg=name)


def test_weights_can_be_written_to(tmp_path):
  config = tiny_config()
  model = read_gguf(write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config)))
  model.tensors["model.norm.weight"][:] = 7.0
  assert not (model.tensors["model.norm.weight"] == 7.0).any()


# Number formats, read block by block from their published layouts.


def half(block: bytes) -> float:
  return float(np.frombuffer(block, "<f2")[0])


def q4_1(block: bytes) -> list[float]:
  scale, low = half(block[:2]), half(block[2:4])
  return [scale * (b & 15) + low for b in block[4:]] + [scale * (b >> 4) + low for b in block[4:]]


def q8_0(block: bytes) -> list[float]:
  return [half(block[:2]) * (b - 256 if b > 127 else b) for b in block[2:]]


def q4_k(block: bytes) -> list[float]:
  big_scale, big_low, packed, nibbles = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
  scales = [packed[j] & 63 for j in range(4)]
  lows = [packed[4 + j] & 63 for j in range(4)]
  scales += [packed[8 + j] & 15 | packed[j] >> 6 << 4 for j in range(4)]
  lows += [packed[8 + j] >> 4 | packed[4 + j] >> 6 << 4 for j in range(4)]
  values = []
  for j in range(8):
    run = nibbles[32 * (j // 2) : 32 * (j // 2) + 32]
    quants = [b >> 4 if j % 2 else b & 15 for b in run]
    values += [big_scale * scales[j] * q - big_low * lows[j] for q in quants]
  return values


def q6_k(block: bytes) -> list[float]:
  low, high, scales, big = block[:128], block[128:192], block[192:208], half(block[208:210])
  values = []
  for i in range(256):
    part, inside = divmod(i, 128)
    row, column = divmod(inside, 32)
    nibble = low[64 * part + 32 * (row % 2) + column]
    nibble = nibble >> 4 if row >= 2 else nibble & 15
    top = high[32 * part + column] >> 2 * row & 3
    scale = scales[i // 16]
    values.append(big * (scale - 256 if scale > 127 else scale) * ((nibble | top << 4) - 32))
  return values


def write_tensor(path: Path, kind: str, rows: np.ndarray) -> Path:
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tensor("x", rows, raw_dtype=gguf.GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize(
  ("kind", "block", "width", "halves", "reader"),
  [
    ("Q4_1", 32, 20, (0, 2), q4_1),
    ("Q8_0", 32, 34, (0,), q8_0),
    ("Q4_K", 256, 144, (0, 2), q4_k),
    ("Q6_K", 256, 210, (208,), q6_k),
  ],
)
def test_dequantisation_against_a_plain_reading(tmp_path, kind, block, width, halves, reader):
  rng = np.random.default_rng(1)
  data = rng.integers(0, 256, (6, 2 * width), np.uint8)
  for start in (*halves, *(width + at for at in halves)):
    scale = rng.normal(size=(6, 1)).astype("<f2")
    data[:, start : start + 2] = scale.view(np.uint8)
  _, tensors = read_header(write_tensor(tmp_path / "x.gguf", kind, data))
  assert tensors["x"].shape == (6, 2 * block)
  got = tensors["x"].read()
  for row in range(6):
    raw = data[row].tobytes()
    expected = reader(raw[:width]) + reader(raw[width:])
    np.testing.assert_allclose(got[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("kind", "error"),
  [
    ("F32", 0.0),
    ("F16", 2.0**-11),
    ("BF16", 2.0**-8),
    ("Q8_0", 1 / 127),
    ("Q5_0", 1 / 16),
    ("Q5_1", 1 / 16),
    ("Q4_0", 1 / 8),
    ("Q4_1", 1 / 8),
  ],
)
def test_dequantised_values_are_within_one_step(tmp_path, kind, error):
  """Steps are of a 32-block whose values lie between -1 and 1."""
  values = np.random.default_rng(2).uniform(-1, 1, (4, 64)).astype(np.float32)
  rows = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
  if kind in ("F32", "F16"):
    rows = values.astype(np.float16 if kind == "F16" else np.float32)
  _, tensors = read_header(write_tensor(tmp_path / "x.gguf", kind, rows))
  assert tensors["x"].kind == kind
  distance = np.abs(tensors["x"].read() - values).max()
  assert distance <= error
  assert distance >= error / 40  # coarser formats do lose something: the type was not ignored


def test_five_bit_k_blocks(tmp_path):
  """Q5_K is Q4_K with a fifth bit, which adds 16 steps of its sub-block."""
  rng = np.random.default_rng(3)
  four = rng.integers(0, 256, (1, 144), np.uint8)
  four[:, :4] = np.array([[0.5, 0.25]], "<f2").view(np.uint8)
  plain = np.array(q4_k(four.tobytes()))
  steps = np.array(q4_k(bytes(four[0, :16]) + b"\x11" * 128)) - np.array(
    q4_k(bytes(four[0, :16]) + b"\x00" * 128)
  )
  bits = rng.integers(0, 256, 32, np.uint8)
  five = np.concatenate([four[:, :16], bits[None], four[:, 16:]], axis=1)
  _, tensors = read_header(write_tensor(tmp_path / "x.gguf", "Q5_K", five))
  fifth = np.concatenate([bits >> j & 1 for j in range(8)])
  np.testing.assert_allclose(tensors["x"].read()[0], plain + 16 * steps * fifth, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_NL", "MXFP4"])
def test_other_tensor_types_are_refused_by_name(tmp_path, kind):
  _, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  path = write_tensor(tmp_path / "x.gguf", kind, np.zeros((2, width), np.uint8))
  with pytest.raises(UserError, match=f"tensor 'x' of type {kind} is not supported") as error:
    read_header(path)
  assert "Q4_1" in one_line(error)


# What the metadata says.


@pytest.fixture
def write(tmp_path):
  """Writes a tiny llama with changed metadata (keys without the ``llama.`` prefix)."""

  def write(extra=None, drop=(), config=None, **metadata):
    config = config if config is not None else tiny_config()
    tensors = {name: a for name, a in tiny_tensors(config).items() if name not in drop}
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    own = ("general", "tokenizer")
    keys = {k if k.startswith(own) else f"llama.{k}": v for k, v in keys.items()}
    return write_gguf(tmp_path / "m.gguf", config, tensors, metadata=keys, extra=extra)

  return write


@pytest.mark.parametrize("arch", ["gemma2", "smollm3", "llama4", "mamba"])
def test_other_architectures_are_refused_by_name(write, arch):
  with pytest.raises(
    UserError, match="is not supported; supported: llama, qwen2, qwen3, gemma3"
  ) as error:
    read_gguf(write(general__architecture=arch))
  assert f"architecture '{arch}'" in one_line(error)


def test_rope_scaling_linear(write):
  path = write(rope__scaling__type="linear", rope__scaling__factor=4.0)
  assert read_gguf(path).config.rope == RopeConfig(head_dim=8, scaling="linear", factor=4.0)


def test_rope_scaling_yarn(write):
  path = write(
    rope__scaling__type="yarn",
    rope__scaling__factor=4.0,
    rope__scaling__original_context_length=32,
  )
  expected = RopeConfig(head_dim=8, scaling="yarn", factor=4.0, original_context=32)
  assert read_gguf(path).config.rope == expected


@pytest.mark.parametrize(
  ("metadata", "message"),
  [
    ({"rope__scaling__type": "longrope"}, "rope scaling 'longrope' is not supported"),
    (
      {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__attn_factor": 0.5,
      },
      "rope.scaling.attn_factor is not supported",
    ),
    ({"rope__dimension_count": 4}, "llama.rope.dimension_count must equal the head size 8, got 4"),
    ({"attention__value_length": 4}, "llama.attention.value_length must equal the head size 8"),
    ({"attention__sliding_window": 64}, "sliding-window attention is not supported"),
    ({"expert_count": 8}, "mixtures of experts are not supported"),
    ({"attention__head_count": [4, 4]}, "llama.attention.head_count must be a int"),
    ({"block_count": "two"}, "llama.block_count must be a int, got 'two'"),
    ({"context_length": None}, "GGUF metadata lacks llama.context_length"),
    ({"rope__freq_base": math.nan}, "llama.rope.freq_base must be a float, got nan"),
    ({"attention__head_count": 0}, "heads must be at least 1, got 0"),
    ({"attention__head_count_kv": 3}, "4 query heads are not a multiple of 3 KV heads"),
    ({"block_count": 2**31}, "2147483648 layers stated, only"),
    ({"block_count": 3}, "tensor 'model.layers.2.input_layernorm.weight' is missing and 8 more"),
    ({"block_count": 1}, "tensors not part of 'llama': 'model.layers.1.input_layernorm.weight'"),
    ({"embedding_length": 16}, r"'model.embed_tokens.weight' must be \(264, 16\), got \(264, 32\)"),
    ({"tokenizer__ggml__model": "rwkv"}, "tokenizer 'rwkv' is not supported"),
    ({"tokenizer__ggml__pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
    ({"tokenizer__ggml__bos_token_id": 400}, "bos token 400 is not among 263 tokens"),
    ({"tokenizer__ggml__merges": ["h e", "zz q"]}, "damaged vocabulary"),
    ({"tokenizer__ggml__merges": ["he"]}, "merge 'he' is not a pair"),
    ({"tokenizer__ggml__tokens": ["a", "a"]}, r"2 tokens \(1 distinct\) and 263 token types"),
    ({"tokenizer__ggml__tokens": None}, "a vocabulary of 0 tokens"),
  ],
)
def test_metadata_that_cannot_work_is_refused(write, metadata, message):
  with pytest.raises(UserError, match=message) as error:
    read_gguf(write(**metadata))
  one_line(error)


def test_a_sliding_window_as_long_as_the_context_is_none(write):
  assert read_gguf(write(attention__sliding_window=128)).config.context == 128


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
  """llama.cpp's table, as its converter computes it: by wavelength, one plane at a time."""
  divisors = []
  for j in range(head_dim // 2):
    wavelength = 2 * math.pi * theta ** (2 * j / head_dim)
    if wavelength < 8192 / 4:
      divisors.append(1.0)
    elif wavelength > 8192 / 1:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_table(write, factor):
  config = tiny_config(rope=RopeConfig(head_dim=64, theta=500000.0))
  path = write(config=config, extra={"rope_freqs.weight": llama3_divisors(64, 500000.0, factor)})
  assert read_gguf(path).config.rope == RopeConfig(
    head_dim=64, theta=500000.0, scaling="llama3", factor=factor, original_context=8192
  )


@pytest.mark.parametrize(
  "divisors",
  [
    np.ones(3, np.float32),
    np.array([1, 2, 3, 4], np.float32),
    np.zeros(4, np.float32),
    np.full(4, np.nan, np.float32),
    np.full(4, np.inf, np.float32),
  ],
)
def test_another_table_of_divisors_is_refused(write, divisors):
  with pytest.raises(UserError, match=r"rope_freqs\.weight|scaling factor must be positive"):
    read_gguf(write(extra={"rope_freqs.weight": divisors}))


@pytest.mark.parametrize(
  "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named(write, name):
  with pytest.raises(UserError, match="is missing") as error:
    read_gguf(write(drop=[name]))
  assert name in one_line(error) or gguf_name(name) in one_line(error)


def test_an_unknown_tensor_is_named(write):
  with pytest.raises(UserError, match=r"not part of 'llama': 'blk\.0\.ssm_in\.weight'"):
    read_gguf(write(extra={"blk.0.ssm_in.weight": np.zeros(4, np.float32)}))


# Damage.


def test_what_is_not_a_gguf_file_is_refused(tmp_path):
  for content in (b"", b"GGU", b"PK\x03\x04" * 20, b"FUGG" + bytes(100)):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match="not a GGUF file"):
      read_gguf(tmp_path / "x.gguf")
  with pytest.raises(UserError, match="No such file"):
    read_gguf(tmp_path / "none.gguf")
  with pytest.raises(UserError, match="Is a directory"):
    read_gguf(tmp_path)


def test_other_versions_and_byte_orders_are_refused(tmp_path):
  for version in (b"\x01\0\0\0", b"\x04\0\0\0", b"\0\0\0\x03"):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + version + bytes(100))
    with pytest.raises(UserError, match="is not supported; supported: 2, 3"):
      read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("keep", [4, 7, 20, 100, 5000, 1_000_000, -1])
def test_the_real_file_cut_short_is_refused(smollm2_path, tmp_path, keep):
  """Some cuts fall into the header, some into the vocabulary, some into the weights."""
  size = smollm2_path.stat().st_size
  keep = keep if keep > 0 else size - 1
  with smollm2_path.open("rb") as file:
    (tmp_path / "cut.gguf").write_bytes(file.read(keep))
  with pytest.raises(UserError, match="truncated or damaged") as error:
    read_gguf(tmp_path / "cut.gguf")
  one_line(error)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory) -> Path:
  config = tiny_config(layers=1, vocab=263, width=8, heads=2, kv_heads=1, mlp_width=8)
  path = tmp_path_factory.mktemp("gguf") / "m.gguf"
  return write_gguf(path, config, tiny_tensors(config))


def read_all(content: bytes) -> None:
  """Reads a file to its last tensor; a clean refusal counts, any other exception fails."""
  with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
    file.write(content)
    file.flush()
    model = read_gguf(file.name)
    for array in model.tensors.values():
      assert np.isfinite(array).all()


def test_the_undamaged_tiny_file_is_read(tiny_file):
  read_all(tiny_file.read_bytes())


def test_every_tensor_offset_is_checked(tiny_file):
  tiny_bytes = tiny_file.read_bytes()
  at = tiny_bytes.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 2 * 8 + 4
  damaged = bytearray(tiny_bytes)
  damaged[at : at + 8] = (2**40).to_bytes(8, "little")
  with pytest.raises(UserError, match=r"tensor 'blk\.0\.ffn_down\.weight' ends at byte") as error:
    read_all(bytes(damaged))
  one_line(error)


@settings(max_examples=100, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(tiny_file, fraction):
  content = tiny_file.read_bytes()
  with pytest.raises(UserError) as error:
    read_all(content[: int(fraction * len(content))])
  one_line(error)


@settings(max_examples=300, deadline=None)
@given(
  changes=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 1, 8, 9, 127, 128, 255])),
    min_size=1,
    max_size=4,
  )
)
def test_damaged_bytes_end_in_a_clean_refusal_or_finite_weights(tiny_file, changes):
  damaged = bytearray(tiny_file.read_bytes())
  for fraction, value in changes:
    damaged[4 + int(fraction * (len(damaged) - 4))] = value
  with contextlib.suppress(UserError):
    read_all(bytes(damaged))
