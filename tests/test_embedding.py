"""The code of docs/embedding.md runs, and generates what the modules' own attention does."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.methods.base import Geometry, Needs
from a2ats_jax.methods.full import Full
from a2ats_jax.prompt import prefill_by_chunks, prefill_layer
from a2ats_jax.rope import RopeConfig, make_rope, rotate
from tests import independent

PAGE = Path(__file__).parent.parent / "docs/embedding.md"
NEW = 12
pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def page(tmp_path_factory, quick_to_compile):
  """What the page's Python defines, run in an empty directory."""
  names = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path_factory.mktemp("page"))
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
      exec(compile(example, str(PAGE), "exec"), names)
    assert (Path("codebooks") / "codebook.safetensors").exists()
  return names


def dense_tokens(page, logits_of) -> list[list[int]]:
  """Each row alone: the whole sequence again for every token, by the module's own attention."""
  width, rows = page["prompts"].shape[1] + NEW, []
  for prompt, length in zip(page["prompts"], page["lengths"].tolist()):
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :length] = prompt[:length]
    for at in range(length, length + NEW):
      tokens[0, at] = int(logits_of(jnp.asarray(tokens))[0, at - 1].argmax())
    rows.append(tokens[0, length : length + NEW].tolist())
  return rows


@pytest.fixture(scope="module", params=["nnx", "linen"])
def model(request, page):
  """A dense forward pass, and the page's ``generate`` for a method."""
  if request.param == "nnx":
    forward = jax.jit(lambda tokens: page["model"](tokens))
    parts = [partial(page[name], page["model"]) for name in ("prefill", "decode")]
  else:
    forward = jax.jit(lambda tokens: page["linen"].apply(page["variables"], tokens)[0])
    parts = [page["linen_prefill"], page["linen_decode"]]

  def generate(method):
    return page["generate"](*parts, page["prompts"], page["lengths"], method, NEW).tolist()

  return forward, generate


def test_equals_the_dense_module_when_all_is_read(page, model):
  forward, generate = model
  want = dense_tokens(page, forward)
  assert len({token for row in want for token in row}) > 4
  assert generate(page["method"]) == want


def test_reads_what_the_reference_reads(page, model):
  """A small budget: the same tokens as the slow definition, and not those of the dense module."""
  _, generate = model
  method = dataclasses.replace(page["method"], budget=Budget(tokens=2), window=2, sinks=1)
  assert generate(method) == generate(method.reference)
  assert generate(method) != generate(page["method"])


def test_the_page_shows_its_own_result(page):
  parts = [partial(page[name], page["model"]) for name in ("prefill", "decode")]
  got = page["generate"](*parts, page["prompts"], page["lengths"], Full(), NEW)
  np.testing.assert_array_equal(page["tokens"], got)


def test_layers_scanned_equal_layers_unrolled(page):
  """As the page stacks them, with pages in host memory in the carry."""
  model, method, lengths = page["model"], page["method"], page["lengths"]
  geometry = Geometry(batch=2, layers=2, heads=4, kv_heads=2, head_dim=8, prompt=40, new=4)
  token, logits = jnp.asarray([[7], [9]]), []
  for decode in (page["CachedModel"].decode, page["scanned_decode"]):
    _, state = page["prefill"](model, page["prompts"], lengths, method, method.init(geometry))
    out, _ = jax.jit(decode)(model, token, lengths[:, None], method, state)
    logits.append(np.asarray(out))
  np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_halves_turn_an_interleaved_embedding_into_ours(page):
  """Logits of pairs (2j, 2j + 1), written out with complex numbers."""
  rng, rope = np.random.default_rng(0), make_rope(RopeConfig(head_dim=8))
  q, k = rng.normal(size=(2, 1, 5, 1, 8)).astype(np.float32)
  turn = np.exp(1j * np.arange(5)[:, None] * np.asarray(rope.inv_freq)[None])

  def interleaved(x):
    return (x[0, :, 0, 0::2] + 1j * x[0, :, 0, 1::2]) * turn

  want = np.real(interleaved(q) @ np.conj(interleaved(k)).T)
  positions = jnp.arange(5)[None]
  ours = [rotate(page["halves"](jnp.asarray(x)), positions, rope)[0, :, 0] for x in (q, k)]
  np.testing.assert_allclose(ours[0] @ ours[1].T, want, atol=1e-4)


# --- prefill_layer ------------------------------------------------------------------------------


def drawn(length: int, batch: int = 2):
  rng = np.random.default_rng(length)
  return [
    jnp.asarray(rng.normal(size=(batch, length, heads, 8)), jnp.float32) for heads in (4, 2, 2)
  ]


class Keep:
  """A method whose state is what it absorbed, and that asks for everything."""

  name = "keep"
  needs = Needs(queries=4, sums=True)

  def init(self, geometry):
    return None

  def absorb(self, state, prompt, *, layer):
    return prompt

  def attend(self, *args, **options):
    raise NotImplementedError


@pytest.mark.parametrize("length", [1, 5, 8, 19])
def test_a_prompt_of_any_length(length):
  """Chunks of 8 where the length is no multiple: output and what is absorbed, row by row."""
  q, k, v = drawn(length)
  lengths = jnp.asarray([length, max(1, length - 3)], jnp.int32)
  rope = make_rope(RopeConfig(head_dim=8))
  (out, _, _), prompt = prefill_by_chunks(
    Keep(),
    None,
    (q, k, v),
    project=lambda piece: piece,
    finish=lambda piece, out: (out, *piece[1:]),
    lengths=lengths,
    rope=rope,
    layer=0,
    chunk=8,
  )
  whole, _ = prefill_layer(Keep(), None, q, k, v, lengths=lengths, rope=rope, layer=0)
  np.testing.assert_allclose(out, whole, atol=1e-5)
  inv_freq = np.asarray(rope.inv_freq)
  positions = jnp.broadcast_to(jnp.arange(length), (2, length))
  np.testing.assert_allclose(prompt.rotated, rotate(k, positions, rope), atol=1e-6)
  np.testing.assert_array_equal(prompt.keys, k)
  np.testing.assert_array_equal(prompt.values, v)
  rotated = np.asarray(rotate(q, positions, rope))
  for row, count in enumerate(lengths.tolist()):
    one = (np.asarray(x)[row, :count].astype(np.float64) for x in (q, k, v))
    want = independent.causal_attention(*one, inv_freq, 1.0)
    np.testing.assert_allclose(np.asarray(out)[row, :count], want, atol=2e-5)
    np.testing.assert_allclose(prompt.sums[row].sum(-1), count, rtol=1e-5)  # a query gives one
    for place in range(4):
      at = count - 4 + place
      want = rotated[row, at] if at >= 0 else np.zeros((4, 8))
      np.testing.assert_allclose(prompt.queries[row, place], want, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda q, k, v: (q, k, v[..., :4]), r"got \(2, 5, 4, 8\), \(2, 5, 2, 8\) and \(2, 5, 2, 4\)"),
    (lambda q, k, v: (q[:, :4], k, v), "expected q"),
    (lambda q, k, v: (q[..., :4], k, v), "expected q"),
    (lambda q, k, v: (q[:, :, :3], k, v), "3 query heads are not a multiple of 2 KV heads"),
  ],
  ids=["values", "tokens", "size", "heads"],
)
def test_shapes_that_are_no_prompt_are_refused(change, match):
  q, k, v = change(*drawn(5))
  with pytest.raises(Exception, match=match) as e:
    prefill_layer.__wrapped__(
      Full(),
      None,
      q,
      k,
      v,
      lengths=jnp.asarray([5, 5]),
      rope=make_rope(RopeConfig(head_dim=8)),
      layer=0,
    )
  assert isinstance(e.value, UserError)
