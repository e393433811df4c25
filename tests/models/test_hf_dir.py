import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.models.gguf_file import read_gguf
from a2ats_jax.models.hf_dir import HUB_FILES, hub_folder, is_hub_id, read_hf_dir
from a2ats_jax.rope import RopeConfig
from tests.models.tiny_models import SPECIALS, tiny_config, tiny_tensors, write_gguf, write_hf

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def refusal(path) -> str:
  with pytest.raises(UserError) as error:
    read_hf_dir(path)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture
def write(tmp_path):
  """Writes a tiny folder of a family with keys of ``config.json`` replaced."""

  def write(family="llama", **changes):
    config = tiny_config(family)
    return write_hf(tmp_path / "model", config, tiny_tensors(config), changes=changes)

  return write


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tied", "shards"), [(False, 1), (True, 1), (False, 3)])
def test_every_family_is_read(tmp_path, family, tied, shards):
  config = tiny_config(family, tied=tied)
  tensors = tiny_tensors(config)
  model = read_hf_dir(write_hf(tmp_path, config, tensors, shards=shards))
  assert model.config == config
  assert model.source == str(tmp_path)
  assert set(model.tensors) == set(tensors)
  for name, expected in tensors.items():
    assert model.tensors[name].dtype == np.float32
    np.testing.assert_array_equal(model.tensors[name], expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_both_formats_give_the_same_model(tmp_path, family):
  config = tiny_config(family)
  tensors = tiny_tensors(config)
  one = read_hf_dir(write_hf(tmp_path / "hf", config, tensors))
  two = read_gguf(write_gguf(tmp_path / "m.gguf", config, tensors))
  assert one.config == two.config
  assert list(one.tensors) == list(two.tensors)
  for name in one.tensors:
    np.testing.assert_array_equal(one.tensors[name], two.tensors[name])


@pytest.mark.parametrize(
  ("family", "changes", "expected"),
  [
    ("llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    ("llama", {"mlp_bias": True}, {"mlp_bias": True}),
    ("qwen3", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
  ],
)
def test_biases(tmp_path, family, changes, expected):
  config = tiny_config(family, **expected)
  model = read_hf_dir(write_hf(tmp_path, config, tiny_tensors(config), changes=changes))
  assert model.config == config


def test_head_size_and_kv_heads_have_defaults(tmp_path):
  config = tiny_config("llama", kv_heads=4)
  changes = {"head_dim": None, "num_key_value_heads": None}
  assert (
    read_hf_dir(write_hf(tmp_path, config, tiny_tensors(config), changes=changes)).config == config
  )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types_become_float32(tmp_path, dtype):
  config = tiny_config()
  tensors = {name: array.astype(dtype) for name, array in tiny_tensors(config).items()}
  model = read_hf_dir(write_hf(tmp_path, config, tensors))
  for name, stored in tensors.items():
    assert model.tensors[name].dtype == np.float32
    np.testing.assert_array_equal(model.tensors[name], stored.astype(np.float32))


def test_bfloat16_needs_no_library_imported_before(tmp_path):
  config = tiny_config()
  tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in tiny_tensors(config).items()}
  write_hf(tmp_path, config, tensors)
  code = (
    "import sys; from a2ats_jax.models.hf_dir import read_hf_dir; "
    "print(float(read_hf_dir(sys.argv[1]).tensors['model.norm.weight'][0]))"
  )
  command = [sys.executable, "-c", code, str(tmp_path)]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert float(done.stdout) == float(tensors["model.norm.weight"][0])


# Rotary embedding, by the older keys and the newer one.

LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
  ("kind", "options", "expected"),
  [
    ("default", {}, {}),
    ("linear", {"factor": 2}, {"scaling": "linear", "factor": 2.0}),
    ("llama3", LLAMA3, {"scaling": "llama3", "factor": 8.0, "original_context": 32}),
    ("yarn", YARN, {"scaling": "yarn", "factor": 4.0, "original_context": 32}),
    ("yarn", {"factor": 4.0}, {"scaling": "yarn", "factor": 4.0, "original_context": 128}),
    (
      "yarn",
      {"original_max_position_embeddings": 32},
      {"scaling": "yarn", "factor": 4.0, "original_context": 32},
    ),
    (
      "yarn",
      YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5},
      {
        "scaling": "yarn",
        "factor": 4.0,
        "original_context": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
      },
    ),
  ],
)
def test_rope_scaling(write, key, kind, options, expected):
  values = {"rope_type": kind, **options}
  if key == "rope_parameters":
    path = write(rope_parameters={"rope_theta": 5e5, **values}, rope_theta=None)
  else:
    path = write(rope_scaling=values, rope_theta=5e5)
  assert read_hf_dir(path).config.rope == RopeConfig(head_dim=8, theta=5e5, **expected)


def test_the_oldest_name_of_the_rope_type(write):
  path = write(rope_scaling={"type": "linear", "factor": 2.0})
  assert read_hf_dir(path).config.rope.scaling == "linear"


def test_theta_beside_newer_parameters_and_by_default(write):
  assert read_hf_dir(
    write(rope_parameters={"rope_type": "default"}, rope_theta=7.0)
  ).config.rope == (RopeConfig(head_dim=8, theta=7.0))
  assert read_hf_dir(write(rope_theta=None)).config.rope.theta == 10000.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_other_rope_types_are_refused_by_name(write, kind):
  message = refusal(write(rope_scaling={"rope_type": kind, "factor": 2.0}))
  assert f"rope type '{kind}' is not supported; supported: default, linear, llama3, yarn" in message


# Attention windows.


@pytest.mark.parametrize(
  ("family", "changes"),
  [
    ("mistral", {"sliding_window": 64}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True}),
    ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}),
  ],
)
def test_a_window_in_use_is_refused(write, family, changes):
  assert "sliding_window 64 below the context of 128" in refusal(write(family, **changes))


@pytest.mark.parametrize(
  ("family", "changes"),
  [
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": False}),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}),
    ("llama", {"sliding_window": 64}),
  ],
)
def test_a_window_not_in_use_is_not(write, family, changes):
  assert read_hf_dir(write(family, **changes)).config.architecture == family


# Refusals.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; supported: llama"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "32"}, "hidden_size must be a int, got '32'"),
    ({"hidden_size": 32.0}, "hidden_size must be a int, got 32.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a int, got True"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a float, got inf"),
    ({"rope_scaling": [1]}, "rope_scaling must be a dict"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": None}}, "low_freq_factor is"),
    ({"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0}}, "'mscale' is not supported"),
    ({"rope_parameters": {"full_attention": {}}}, "option 'full_attention' is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
    ({"num_hidden_layers": 10**9}, "1000000000 layers stated"),
    ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing and 8 more"),
    ({"tie_word_embeddings": False, "vocab_size": 100}, "must be (100, 32), got (264, 32)"),
    ({"num_attention_heads": 0}, "heads must be at least 1"),
    ({"eos_token_id": 999}, "eos_token_id 999 is not in the vocabulary"),
    ({"eos_token_id": [2, "x"]}, "eos_token_id 'x' is not in the vocabulary"),
  ],
)
def test_a_configuration_that_cannot_work_is_refused(write, changes, message):
  assert message in refusal(write(**changes))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(write, file):
  path = write()
  (path / file).unlink()
  assert f"no {file}" in refusal(path)


@pytest.mark.parametrize(
  "file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}"])
def test_damaged_json_is_refused_by_file(write, file, content):
  path = write()
  (path / file).write_bytes(content)
  assert file in refusal(path)


def test_missing_and_damaged_shards(tmp_path):
  config = tiny_config()
  write_hf(tmp_path, config, tiny_tensors(config), shards=2)
  shard = tmp_path / "model-00002-of-00002.safetensors"
  content = shard.read_bytes()
  shard.write_bytes(content[:-1])
  assert f"{shard}: damaged or unreadable" in refusal(tmp_path)
  shard.write_bytes(b"")
  assert f"{shard}: damaged or unreadable" in refusal(tmp_path)
  shard.unlink()
  assert str(shard) in refusal(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
  config = tiny_config()
  write_hf(tmp_path / "model", config, tiny_tensors(config), shards=2)
  index = tmp_path / "model" / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
  assert "'../other.safetensors' is not the name of a file in this folder" in refusal(
    tmp_path / "model"
  )


def test_integer_weights_are_refused_by_name(tmp_path):
  config = tiny_config()
  tensors = tiny_tensors(config)
  tensors["model.norm.weight"] = np.zeros(32, np.int8)
  message = refusal(write_hf(tmp_path, config, tensors))
  assert "tensor 'model.norm.weight' of type I8 is not supported" in message


def test_unknown_tensors_are_refused_and_harmless_ones_ignored(tmp_path):
  config = tiny_config()
  tensors = tiny_tensors(config)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
  write_hf(tmp_path, config, tensors)
  assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in read_hf_dir(tmp_path).tensors
  for name in ("a", "b", "c", "d"):
    tensors[f"vision.{name}"] = np.ones(4, np.float32)
  write_hf(tmp_path, config, tensors)
  message = refusal(tmp_path)
  assert "not part of 'llama': 'vision.a', 'vision.b', 'vision.c' and 1 more" in message


def test_a_tied_head_that_is_stored_too_is_ignored(tmp_path):
  config = tiny_config(tied=True)
  tensors = tiny_tensors(dataclasses.replace(config, tied=False))
  model = read_hf_dir(write_hf(tmp_path, config, tensors))
  assert "lm_head.weight" not in model.tensors
  assert model.config.tied


# Tokenizer files.


def test_special_tokens_and_template_come_from_the_tokenizer_files(write):
  path = write(eos_token_id=[2, 1])
  options = {
    "bos_token": {"content": SPECIALS[1]},
    "eos_token": SPECIALS[2],
    "pad_token": SPECIALS[0],
    "chat_template": "{{ pad_token }}{{ messages[0].content }}{{ eos_token }}",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(options))
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
  tokenizer = read_hf_dir(path).tokenizer
  assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab) == (1, (2, 0, 1), 259)
  rendered = tokenizer.render_chat([{"role": "user", "content": "hi"}])
  assert rendered == "<|endoftext|>hi<|im_end|>"
  ids = tokenizer.encode(rendered, special=False)
  assert (ids[0], len(ids), ids[-1]) == (0, 4, 2)
  assert tokenizer.decode(ids) == "hi"


def test_named_templates_and_a_template_file(write):
  path = write()
  named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
  (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
  assert read_hf_dir(path).tokenizer.template == "D"
  (path / "chat_template.jinja").write_text("F")
  assert read_hf_dir(path).tokenizer.template == "F"
  (path / "chat_template.jinja").write_bytes(b"\xff")
  assert "chat_template.jinja" in refusal(path)


def test_a_template_that_is_not_text_is_refused(write):
  path = write()
  (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))
  assert "chat_template must be text" in refusal(path)


def test_more_tokens_than_rows_are_refused(tmp_path):
  config = tiny_config(vocab=200)
  message = refusal(write_hf(tmp_path, config, tiny_tensors(config)))
  assert "the tokenizer has 259 tokens, the embedding only 200 rows" in message


# The hub.


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("org/name", True),
    ("HuggingFaceTB/SmolLM2-135M", True),
    ("name", False),
    ("a/b/c", False),
    ("../name", False),
    ("./name", False),
    ("/name", False),
    ("org/", False),
    ("org/na me", False),
  ],
)
def test_what_a_hub_id_looks_like(name, expected):
  assert is_hub_id(name) is expected


def test_without_the_extra_the_hub_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UserError, match=r"pip install 'a2ats_jax\[hub\]'"):
    hub_folder("org/name")


def test_only_the_needed_files_are_asked_for(monkeypatch, tmp_path):
  asked = {}

  def snapshot_download(name, **options):
    asked.update(options, name=name)
    return str(tmp_path)

  hub = SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  assert hub_folder("org/name", tmp_path / "cache") == tmp_path
  assert asked == {
    "name": "org/name",
    "allow_patterns": list(HUB_FILES),
    "cache_dir": tmp_path / "cache",
  }


def test_a_failed_hub_download_is_one_line(monkeypatch):
  def snapshot_download(name, **options):
    raise OSError("401 Client Error.\n\nRepository not found")

  hub = SimpleNamespace(snapshot_download=snapshot_download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  with pytest.raises(UserError, match=r"cannot fetch 'org/name' from the hub: 401 Client Error\.$"):
    hub_folder("org/name")
