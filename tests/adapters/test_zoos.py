"""Models of zoos under methods give what the zoos give; skipped where a zoo is not installed."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import A2ATS, Budget, UserError, make_codebook
from a2ats_jax.adapters import decode_step, generate, keys_and_queries, prefill
from a2ats_jax.generate import padded
from a2ats_jax.methods.full import Full
from tests.adapters import tiny_zoos

PAGE = Path(__file__).parents[2] / "docs/zoo.md"
NEW = 8
pytestmark = [
  pytest.mark.usefixtures("quick_to_compile"),
  pytest.mark.filterwarnings("ignore"),  # the zoos' own
]


@pytest.fixture(scope="module", params=list(tiny_zoos.BUILD))
def zoo(request, quick_to_compile, _as_the_zoos_expect):
  return tiny_zoos.BUILD[request.param]()


@pytest.fixture(scope="module")
def prompts(zoo):
  """Longer than the window of local layers, of different lengths; 2 begins the text of Gemma."""
  rng = np.random.default_rng(zoo.seed)
  return [[2, *rng.integers(3, zoo.vocab - 1, n).tolist()] for n in (19, 12)]


@pytest.fixture(scope="module")
def method(zoo):
  """A2ATS over everything; its codewords are keys of random text."""
  tokens = np.random.default_rng(2).integers(1, zoo.vocab, (4, 16), np.int32)
  keys, queries = keys_and_queries(zoo.adapted, tokens)
  assert queries.shape[:2] == keys.shape[:2]
  assert queries.shape[2] == 2 * keys.shape[2]
  words = np.swapaxes(keys[:, :16], 1, 2)
  eye = np.broadcast_to(np.eye(8, dtype=np.float32), (*words.shape[:2], 8, 8))
  return A2ATS(
    codebook=make_codebook(*map(jnp.asarray, (words, eye))),
    budget=Budget(ratio=1.0),
    window=4,
    sinks=2,
    page=4,
  )


def test_a_prompt_has_the_zoos_logits(zoo, prompts):
  tokens, lengths = padded(prompts, zoo.vocab)
  logits, _ = prefill(zoo.adapted, Full(), tokens, lengths, new=1)
  want = np.stack([np.asarray(zoo.forward(np.asarray([p])))[0, -1] for p in prompts])
  np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
  rope = dataclasses.replace(zoo.adapted.rope, theta=zoo.adapted.rope.theta * 3)
  wrong = dataclasses.replace(zoo.adapted, rope=rope)
  logits, _ = prefill(wrong, Full(), tokens, lengths, new=1)
  assert np.abs(logits - want).max() > 1e-3 * np.abs(want).max()


def test_budget_one_makes_the_tokens_of_the_zoos_sampler(zoo, prompts, method):
  want = zoo.sample(prompts, NEW)
  assert len({token for row in want for token in row}) > 3
  assert generate(zoo.adapted, Full(), prompts, new=NEW).tolist() == want
  assert generate(zoo.adapted, method, prompts, new=NEW).tolist() == want


@pytest.mark.parametrize(
  "zoo",
  ["tunix-llama3", "tunix-gemma3", "gemma-gemma3", "transformers-llama"],
  indirect=True,
  scope="module",
)
def test_a_small_budget_reads_what_the_reference_reads(zoo, prompts, method):
  """Logits of a step, beside those of the slow definition and of full attention."""
  small = dataclasses.replace(method, budget=Budget(tokens=2), window=2, sinks=1)
  tokens, lengths = padded(prompts, zoo.vocab)
  made = []
  for one in (small, small.reference, method):
    _, state = prefill(zoo.adapted, one, tokens, lengths, new=2)
    for i, token in enumerate((5, 7)):
      step = (np.full((2, 1), token, np.int32), (lengths + i)[:, None])
      logits, state, stats = decode_step(zoo.adapted, one, state, *step)
    made.append((np.asarray(logits), np.asarray(stats.read)))
  (fast, read), (slow, slow_read), (full, _) = made
  np.testing.assert_array_equal(read, slow_read)
  np.testing.assert_allclose(fast, slow, atol=1e-4 * np.abs(slow).max())
  assert np.abs(fast - full).max() > 1e-3 * np.abs(full).max()


# --- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["google-tunix", "gemma", "transformers"])
def test_the_page_makes_the_tokens_of_the_zoos_sampler(package, tmp_path, monkeypatch):
  """The code of a section; the zoo's sampler is run on the model that it leaves."""
  tiny_zoos.installed(package.removeprefix("google-"))
  monkeypatch.chdir(tmp_path)
  section = PAGE.read_text().split(f"\n## {package}\n")[1].split("\n## ")[0]
  names = {}
  for example in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
    exec(compile(example, str(PAGE), "exec"), names)
  model = names["model"]
  zoo = {
    "google-tunix": lambda: tiny_zoos.tunix("llama3", model),
    "gemma": lambda: tiny_zoos.gemma(model, names["params"]),
    "transformers": lambda: tiny_zoos.transformers("Llama", model),
  }[package]()
  tokens = np.where(names["tokens"] < 0, 0, names["tokens"])  # what a zoo shows after a row's end
  assert tokens.tolist() == zoo.sample(names["prompts"], NEW)


# --- what is not adapted, and rows that end -------------------------------------------------------


def test_a_row_ends_with_its_stop_token():
  zoo = tiny_zoos.tunix("llama3")
  prompts = [[2, 9, 4, 17, 30], [2, 33]]
  free = generate(zoo.adapted, Full(), prompts, new=NEW)
  stop = int(free[0, 2])
  got = generate(zoo.adapted, Full(), prompts, new=NEW, stop=[stop])
  ends = [row.index(stop) + 1 if stop in row else NEW for row in free.tolist()]
  assert ends[0] < NEW
  width = max(ends)
  want = [row[:n] + [-1] * (width - n) for row, n in zip(free.tolist(), ends)]
  assert got.tolist() == want
  with pytest.raises(UserError, match=r"token ids must lie in \[0, 61\), got 61 to 61"):
    generate(zoo.adapted, Full(), [[61]], new=1)
  with pytest.raises(UserError, match="row 1 is empty"):
    generate(zoo.adapted, Full(), [[3], []], new=1)


def test_soft_caps_and_models_of_windows_alone_are_refused():
  config = tiny_zoos.gemma_config(attn_logits_soft_cap=50.0)
  from gemma import gm

  from a2ats_jax.adapters.gemma import from_gemma

  with pytest.raises(UserError, match="soft-caps its attention logits at 50"):
    from_gemma(gm.nn.Transformer(config=config), {})
  with pytest.raises(UserError, match=r"expected a gm.nn.Transformer \(Gemma 3\), got int"):
    from_gemma(3, {})
  zoo = tiny_zoos.gemma()
  local = dataclasses.replace(zoo.adapted, layers=zoo.adapted.layers[:1])
  with pytest.raises(UserError, match="nothing to retrieve from"):
    generate(local, Full(), [[3]], new=1)


def test_models_of_other_kinds_are_refused():
  tiny_zoos.installed("transformers")
  tiny_zoos.installed("tunix")
  from a2ats_jax.adapters.transformers import from_transformers
  from a2ats_jax.adapters.tunix import from_tunix

  with pytest.raises(UserError, match="a FlaxLlamaForCausalLM or FlaxGemmaForCausalLM, got int"):
    from_transformers(3)
  with pytest.raises(UserError, match="expected a Llama3, Qwen2, Qwen3 or Gemma3, got int"):
    from_tunix(3)


def test_a_query_scale_that_is_not_the_head_sizes():
  """E / H is 16 where D is 8."""
  config = tiny_zoos.gemma_config(embed_dim=64)
  from gemma import gm

  config = dataclasses.replace(config, attention_types=(gm.nn.AttentionType.GLOBAL,))
  model, tokens = gm.nn.Transformer(config=config, dtype=np.float32), np.asarray([[2, 5, 9, 4]])
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  zoo = tiny_zoos.gemma(model, tiny_zoos.random_like(shapes))
  logits, _ = prefill(zoo.adapted, Full(), *padded(tokens.tolist(), 14), new=1)
  np.testing.assert_allclose(logits, zoo.forward(tokens)[:, -1], atol=1e-4)
