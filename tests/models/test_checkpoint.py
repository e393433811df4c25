import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.models import fetch as fetch_module
from a2ats_jax.models.checkpoint import (
  StoredTensor,
  StoredTensors,
  expected_tensors,
  read_checkpoint,
)
from tests.models.tiny_models import tiny_config, tiny_tensors, write_gguf, write_hf

CONFIGS = [
  tiny_config("llama"),
  tiny_config("llama", tied=True, qkv_bias=True, out_bias=True, mlp_bias=True),
  tiny_config("qwen2"),
  tiny_config("qwen3", layers=1),
  tiny_config("gemma3"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_expected_names_and_shapes(config):
  """Against a list written apart from the package's."""
  assert expected_tensors(config) == {k: v.shape for k, v in tiny_tensors(config).items()}


def stored(tensors: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
  return {
    name: StoredTensor(array.shape, lambda array=array: array) for name, array in tensors.items()
  }


def test_stored_tensors_are_a_mapping_of_the_expected_ones():
  config = tiny_config()
  tensors = tiny_tensors(config)
  mapping = StoredTensors(config, stored(tensors), "test")
  assert len(mapping) == len(tensors)
  assert list(mapping) == list(expected_tensors(config))
  for name, array in mapping.items():
    np.testing.assert_array_equal(array, tensors[name])
  assert "model.rotary_emb.inv_freq" not in mapping
  with pytest.raises(KeyError):
    mapping["nothing"]


def test_nothing_is_read_before_it_is_asked_for():
  config = tiny_config()
  read = []

  def load(name: str, array: np.ndarray) -> np.ndarray:
    read.append(name)
    return array

  entries = {
    name: StoredTensor(array.shape, lambda name=name, array=array: load(name, array))
    for name, array in tiny_tensors(config).items()
  }
  mapping = StoredTensors(config, entries, "test")
  assert "model.norm.weight" in mapping
  assert read == []
  mapping["model.norm.weight"]
  assert read == ["model.norm.weight"]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["gguf", "hf"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, name, value, format):
  config = tiny_config()
  tensors = tiny_tensors(config)
  tensors[name][3, 5] = value
  if format == "gguf":
    model = read_checkpoint(write_gguf(tmp_path / "m.gguf", config, tensors))
  else:
    model = read_checkpoint(write_hf(tmp_path / "m", config, tensors))
  with pytest.raises(UserError, match=f"tensor '{name}' holds values that are not finite"):
    model.tensors[name]
  assert np.isfinite(model.tensors["model.norm.weight"]).all()


@pytest.mark.parametrize("name", list(expected_tensors(tiny_config("qwen3", layers=1))))
def test_each_missing_or_misshapen_tensor_is_named(name):
  config = tiny_config("qwen3", layers=1)
  tensors = tiny_tensors(config)
  array = tensors.pop(name)
  with pytest.raises(UserError, match=f"tensor '{name}' is missing$"):
    StoredTensors(config, stored(tensors), "test")
  tensors[name] = array[1:]
  with pytest.raises(UserError, match=f"tensor '{name}' must be ") as error:
    StoredTensors(config, stored(tensors), "test")
  assert f"{array.shape}, got {array[1:].shape}" in str(error.value)


def test_transposed_weights_are_refused():
  config = tiny_config()
  tensors = tiny_tensors(config)
  name = "model.layers.0.mlp.down_proj.weight"
  tensors[name] = tensors[name].T
  with pytest.raises(UserError, match=r"must be \(32, 64\), got \(64, 32\)"):
    StoredTensors(config, stored(tensors), "test")


# One door.


def test_files_and_folders_are_opened(tmp_path, monkeypatch):
  config = tiny_config()
  tensors = tiny_tensors(config)
  file = write_gguf(tmp_path / "m.gguf", config, tensors)
  folder = write_hf(tmp_path / "org" / "name", config, tensors)
  for where in (file, str(file), folder, str(folder)):
    model = read_checkpoint(where)
    assert model.source == str(where)
    assert model.config == config
  monkeypatch.chdir(tmp_path)
  assert read_checkpoint("org/name").config == config  # a folder goes before the hub
  monkeypatch.setenv("HOME", str(tmp_path))
  assert read_checkpoint("~/m.gguf").config == config


def test_a_known_name_is_fetched_into_the_cache(tmp_path, monkeypatch):
  config = tiny_config()
  asked = []

  def fetch(name, cache, progress):
    asked.append((name, cache))
    progress("fetching")
    return write_gguf(tmp_path / "m.gguf", config, tiny_tensors(config))

  monkeypatch.setattr(fetch_module, "fetch", fetch)
  lines = []
  model = read_checkpoint("smollm2-135m-instruct", tmp_path / "cache", lines.append)
  assert model.config == config
  assert asked == [("smollm2-135m-instruct", tmp_path / "cache")]
  assert lines == ["fetching"]


def test_a_hub_id_goes_to_the_hub(tmp_path, monkeypatch):
  config = tiny_config()
  write_hf(tmp_path / "snapshot", config, tiny_tensors(config))
  hub = SimpleNamespace(snapshot_download=lambda name, **options: str(tmp_path / "snapshot"))
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  monkeypatch.chdir(tmp_path)
  assert read_checkpoint("org/name").config == config


@pytest.mark.parametrize("where", ["no-such-model", "./a/b", "a/b/c", "m.gguf", ""])
def test_what_is_none_of_these_is_refused_in_one_line(where, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError) as error:
    read_checkpoint(where)
  assert "\n" not in str(error.value)
  assert "smollm2-135m-instruct" in str(error.value) or "no config.json" in str(error.value)


def test_the_real_model_is_opened_by_its_name(smollm2_path, smollm2):
  assert smollm2.source == str(smollm2_path)
  assert smollm2.config.layers == 30


def test_a_checkpoint_cannot_be_changed(smollm2):
  with pytest.raises(dataclasses.FrozenInstanceError):
    smollm2.source = "elsewhere"
  with pytest.raises(TypeError):
    smollm2.tensors["model.norm.weight"] = np.zeros(576)
