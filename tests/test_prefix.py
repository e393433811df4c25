"""A document read once and asked many questions, from memory and from a file."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from a2ats_jax import generate, prefix, prefix_file
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.methods import registry
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.layout import fork, layout
from a2ats_jax.prefix import continue_prefix, read_prefix
from a2ats_jax.prefix_file import load_prefix, save_prefix
from a2ats_jax.sampling import Sampling
from tests import tiny
from tests.eval import tiny as eval_tiny

PAGE = Path(__file__).parent.parent / "docs/prefix.md"

# Small enough that 40 tokens and 30 later ones cross every boundary.
METHODS = {
  "full": "",
  "a2ats-plus": "far=segments(2,8):window=4:sinks=2:page=4",
  "kivi": "bits=4:group=4:residual=8",
  "snapkv": "window=5:kernel=3",
  "clusterkv": "clusters=5:sinks=2:every=8:fresh=2:page=4",
  "quest": "page=4",
}
ROWLESS = {
  "magicpig": "tables=6:bits=3:sinks=2:window=6:page=4"
}  # has an array that all rows share
DOCUMENT, *QUESTIONS = tiny.prompts(40, 3, 18, 7, seed=5)
NEW, ROOM = 8, 27


pytestmark = pytest.mark.usefixtures("quick_to_compile")


@functools.cache
def codebook(seed: int = 0):
  words = np.random.default_rng(seed).normal(size=(3, 2, 8, 16)).astype(np.float32)
  eye = np.broadcast_to(np.eye(16, dtype=np.float32), (3, 2, 16, 16))
  return make_codebook(jnp.asarray(words), jnp.asarray(eye))


def build(name: str, budget: str = "0.25", seed: int = 0):
  text = ":".join(filter(None, [name, (METHODS | ROWLESS)[name]]))
  return registry.build(
    registry.parse_method(text),
    budget=Budget.parse(budget),
    codebooks={"default": codebook(seed)},
  )


def read(method, room: int = ROOM):
  return read_prefix(tiny.tiny_model(), method, DOCUMENT, new=room)


def asked(document, questions=QUESTIONS, new=NEW, **options) -> np.ndarray:
  blocks = continue_prefix(tiny.tiny_model(), document, questions, new=new, block=4, **options)
  return np.concatenate([block.tokens for block in blocks], axis=1)


def alone(method, question) -> list[int]:
  """A fresh prefill, the question token by token, then the likeliest tokens, one row."""
  decoder = tiny.tiny_model()
  tokens, lengths = generate.pad_prompts([DOCUMENT], decoder.config, new=ROOM)
  _, state = generate.prefill(decoder, method, tokens, lengths, new=ROOM)
  fed, made = list(question), []
  for place in range(len(DOCUMENT), len(DOCUMENT) + len(question) + NEW - 1):
    logits, state, _ = generate.decode_step(
      decoder, method, state, jnp.asarray([[fed.pop(0)]]), jnp.asarray([[place]], jnp.int32)
    )
    if not fed:
      made.append(int(logits[0, 0].argmax()))
      fed.append(made[-1])
  return made


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_and_forked_document_answers_as_a_fresh_one(name, tmp_path):
  """Three questions of different lengths at once; a second batch finds the document as it was."""
  method, path = build(name), tmp_path / "document"
  want = [alone(method, question) for question in QUESTIONS]
  assert len({tuple(row) for row in want}) == 3
  document = read(method)
  save_prefix(path, document, fingerprint="tiny")
  loaded = load_prefix(path, method, fingerprint="tiny")
  np.testing.assert_array_equal(loaded.tokens, DOCUMENT)
  for one, two in zip(jax.tree.leaves(document.state), jax.tree.leaves(loaded.state), strict=True):
    assert one.sharding.memory_kind == two.sharding.memory_kind
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
  assert asked(loaded).tolist() == want
  assert asked(document, QUESTIONS[::-1]).tolist() == want[::-1]


def test_pages_are_loaded_to_where_they_belong(tmp_path):
  """Some array of a paged method lies in host memory, others do not."""
  method, path = build("a2ats-plus"), tmp_path / "document"
  save_prefix(path, read(method), fingerprint="tiny")
  state = load_prefix(path, method, fingerprint="tiny").state
  assert state.store.pages.sharding.memory_kind == "pinned_host"
  assert state.near.k.sharding.memory_kind == "device"


@pytest.mark.parametrize("name", ["a2ats-plus", "clusterkv", "magicpig"])
def test_a_fork_is_a_batch_of_the_one_row(name):
  """In the shapes and dtypes that the method gives a batch, with memory of its own."""
  method, document = build(name), read(build(name))
  state = fork(method, document.state, document.geometry, rows=3)
  wanted, structure = layout(method, dataclasses.replace(document.geometry, batch=3))
  assert jax.tree.structure(state) == structure
  for leaf, x in zip(wanted, jax.tree.leaves(state), strict=True):
    assert (leaf.shape, leaf.dtype) == (x.shape, x.dtype), leaf.name
  single = fork(method, document.state, document.geometry, rows=1)
  for x in jax.tree.leaves(single):
    x.delete()
  assert not any(x.is_deleted() for x in jax.tree.leaves(document.state))
  assert all(np.asarray(x).shape == x.shape for x in jax.tree.leaves(document.state))


def test_draws_and_stops_are_those_of_a_prompt(tmp_path):
  """With full attention: document and question prompted together draw the same tokens."""
  options = {"sampling": Sampling(temperature=1.5), "seed": 3, "streams": [4, 1, 2]}
  whole = [DOCUMENT + question for question in QUESTIONS]
  blocks = generate.generate(tiny.tiny_model(), Full(), whole, new=NEW, **options)
  want = np.concatenate([block.tokens for block in blocks], axis=1)
  document = read(Full())
  np.testing.assert_array_equal(asked(document, **options), want)
  row, stop = want[0].tolist(), want[0, 2]
  got = asked(document, stop=[int(stop)], **options)[0].tolist()
  end = row.index(stop) + 1
  assert got[:end] == row[:end]
  assert set(got[end:]) <= {-1}


@pytest.mark.parametrize(
  ("questions", "new", "match"),
  [
    ([[1] * 20], 8, "a question of 20 tokens and 8 new ones exceed its room of 27"),
    ([], 1, "at least one token each"),
    ([[1], []], 1, "at least one token each"),
    ([[1], [97]], 1, r"lie in \[0, 97\), got 1 to 97"),
    ([[1]], 0, "new: expected at least 1"),
  ],
  ids=["room", "none", "empty", "vocabulary", "new"],
)
def test_impossible_questions_are_refused(questions, new, match):
  with pytest.raises(UserError, match=match):
    asked(read(Full()), questions, new=new)


def test_exactly_the_room_is_enough():
  assert asked(read(Full()), [[1] * 19], new=8).shape == (1, 8)


def test_no_room_is_refused():
  with pytest.raises(UserError, match="new: expected room for at least 1 token, got 0"):
    read(Full(), room=0)


def test_a_model_of_another_shape_is_refused():
  document = read(Full())
  wide = dataclasses.replace(document, geometry=dataclasses.replace(document.geometry, kv_heads=4))
  with pytest.raises(UserError, match="made for kv_heads 4; this model has kv_heads 2"):
    asked(wide)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory, quick_to_compile):
  """A file of a document under KIVI."""
  path = tmp_path_factory.mktemp("saved") / "document"
  save_prefix(path, read(build("kivi")), fingerprint="tiny")
  return path


@pytest.mark.parametrize(
  ("method", "fingerprint", "match"),
  [
    (build("kivi"), "other", "another model: model was tiny and is now other"),
    (Full(), "tiny", "another method: name was kivi and is now full"),
    (dataclasses.replace(build("kivi"), bits=2), "tiny", "another method: bits was 4 and is now 2"),
  ],
  ids=["model", "method", "option"],
)
def test_a_file_of_another_run_is_refused(saved, method, fingerprint, match):
  with pytest.raises(UserError, match=match) as e:
    load_prefix(saved, method, fingerprint=fingerprint)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [{"seed": 1}, {"budget": "0.5"}], ids=["codebook", "budget"])
def test_other_codebooks_and_budgets_are_refused(tmp_path, change):
  save_prefix(tmp_path / "document", read(build("a2ats-plus")), fingerprint="tiny")
  with pytest.raises(UserError, match=r"another method: (codebook|budget) was .* and is now"):
    load_prefix(tmp_path / "document", build("a2ats-plus", **change), fingerprint="tiny")


def rewritten(source, path, change):
  """A copy of a file whose header and arrays went through a function; its hash is made anew."""
  with safetensors.safe_open(source, framework="numpy") as file:
    header = json.loads(file.metadata()["a2ats"])
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  change(header, arrays)
  text = json.dumps(header)
  metadata = {"a2ats": text, "sha256": prefix_file._hash(text, arrays)}
  safetensors.numpy.save_file(arrays, path, metadata=metadata)


def test_geometry_that_does_not_fit_the_arrays_is_refused(saved, tmp_path):
  path = tmp_path / "document"
  rewritten(saved, path, lambda header, arrays: None)
  load_prefix(path, build("kivi"), fingerprint="tiny")
  rewritten(saved, path, lambda header, arrays: header["geometry"].update(new=400))
  with pytest.raises(UserError, match=r"expected .*keys.* as .*, got .*another version"):
    load_prefix(path, build("kivi"), fingerprint="tiny")
  rewritten(saved, path, lambda header, arrays: header.update(version=2))
  with pytest.raises(UserError, match="expected format version 1, got 2"):
    load_prefix(path, build("kivi"), fingerprint="tiny")


def test_a_damaged_file_is_refused(saved, tmp_path):
  """One byte of an array, one of the header, an end cut off, no safetensors, nothing, a folder."""
  whole, path, load = saved.read_bytes(), tmp_path / "document", build("kivi")

  def refused(data: bytes | None, match: str) -> None:
    if data is not None:
      path.write_bytes(data)
    with pytest.raises(UserError, match=match):
      load_prefix(path, load, fingerprint="tiny")

  refused(whole[:-1] + bytes([whole[-1] ^ 1]), "it is damaged")
  assert whole.count(b'\\"new\\": 27') == 1
  refused(whole.replace(b'\\"new\\": 27', b'\\"new\\": 26'), "it is damaged")
  for length in (0, 7, 200, len(whole) // 2, len(whole) - 1):
    refused(whole[:length], "is not a whole safetensors file")
  refused(b"hello there, this is text", "is not a whole safetensors file")
  safetensors.numpy.save_file({"x": np.zeros(1)}, path)
  refused(None, "expected format 'a2ats-prefix'")
  path.unlink()
  refused(None, "no such file")
  path.mkdir()
  refused(None, "is not a whole safetensors file")


def test_a_write_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
  """And nothing beside it."""
  path = tmp_path / "document"
  path.write_bytes(saved.read_bytes())

  def full_disk(arrays, where, metadata):
    where.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  document = read(Full())
  with monkeypatch.context() as patched:
    patched.setattr(prefix_file.safetensors.numpy, "save_file", full_disk)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
      save_prefix(path, document, fingerprint="tiny")
  assert os.listdir(tmp_path) == ["document"]
  load_prefix(path, build("kivi"), fingerprint="tiny")
  with pytest.raises(UserError, match="cannot be written"):
    save_prefix(tmp_path / "nowhere" / "document", document, fingerprint="tiny")
  save_prefix(path, document, fingerprint="tiny")
  load_prefix(path, Full(), fingerprint="tiny")


def test_the_header_says_what_it_is(saved):
  with safetensors.safe_open(saved, framework="numpy") as file:
    header = json.loads(file.metadata()["a2ats"])
  assert header["method"]["name"] == "kivi"
  assert header["geometry"]["prompt"] == 64
  assert header["geometry"]["dtype"] == "float32"
  assert header["tokens"] == 40
  assert len(header["tokens_sha256"]) == 64
  assert set(header["versions"]) == {"a2ats_jax", "jax", "jaxlib"}
  assert max(map(len, QUESTIONS)) > prefix.PIECE  # a question in two pieces was tried


def test_the_page_runs(tmp_path, monkeypatch):
  """With a tiny model in place of the real one."""
  (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  monkeypatch.setattr("a2ats_jax.load_model", lambda name: eval_tiny.model())
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(compile(example, str(PAGE), "exec"), names)
  assert [len(answer) for answer in names["answers"]] == [8, 8]
  prompts = [names["tokens"] + question for question in names["asked"]]
  blocks = generate.generate(eval_tiny.model().decoder, Full(), prompts, new=8)
  want = np.concatenate([block.tokens for block in blocks], axis=1)
  assert names["answers"] == want.tolist()
