"""The README's Python runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from a2ats_jax import load_model
from a2ats_jax.codebook import make_codebook, save_codebooks

README = Path(__file__).parent.parent / "README.md"


def test_links_lead_somewhere_and_nothing_is_left_to_fill_in():
  text = README.read_text()
  assert "@@" not in text
  for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
    assert (README.parent / target).exists(), target


def test_the_example_runs(tmp_path, monkeypatch, capsys):
  """With the real model; random codebooks stand in for those that `make demo` trains."""
  (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  model = load_model("smollm2-135m-instruct")
  config = model.config
  shape, dim = (config.layers, config.kv_heads), config.head_dim
  words = np.random.default_rng(0).normal(size=(*shape, 32, dim))
  metric = jnp.broadcast_to(jnp.eye(dim), (*shape, dim, dim))
  save_codebooks(
    tmp_path / "runs/demo/codebooks",
    make_codebook(jnp.asarray(words, jnp.float32), metric),
    fingerprint=model.fingerprint,
    rope=config.rope,
    training={},
  )
  monkeypatch.chdir(tmp_path)
  exec(compile(example, str(README), "exec"), {})
  assert "Paris" in capsys.readouterr().out
