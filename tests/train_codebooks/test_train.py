"""Whole runs: records, interruptions, refusals."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from a2ats_jax import codebook
from a2ats_jax.errors import UserError
from tests.train_codebooks.cases import OPTIONS, byte_tokenizer, random_corpus, tiny_model
from train_codebooks import Corpus, Metric, train
from train_codebooks.collect import KEYS, MOMENTS


class Stop(Exception):
  """Raised by a listener in place of a kill."""


def stop_at(phase, nth):
  """A listener that raises at the n-th call of a phase, and the calls it saw."""
  calls = []

  def listen(name, done, total, /, **figures):
    calls.append((name, done, total))
    if name == phase and sum(c[0] == phase for c in calls) == nth:
      raise Stop

  return listen, calls


def assert_same(book, finished):
  np.testing.assert_array_equal(np.asarray(book.whitener), finished.whitener)
  np.testing.assert_array_equal(np.asarray(book.codewords), finished.codewords)


@pytest.fixture
def run(model, corpus):
  """Train with the shared model, text and options on one device."""

  def go(directory, *, options=OPTIONS, model=model, corpus=corpus, save_seconds=0.0, **more):
    return train(
      model,
      options,
      directory,
      corpus=corpus,
      save_seconds=save_seconds,
      devices=jax.local_devices()[:1],
      **more,
    )

  return go


def test_same_on_all_devices(model, corpus, finished, tmp_path):
  book = train(model, OPTIONS, tmp_path, corpus=corpus)
  np.testing.assert_allclose(book.codewords, finished.codewords, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(np.asarray(book.whitener), finished.whitener)


def test_loads_and_says_what_it_was_trained_on(model, corpus, finished):
  book, header = codebook.load_codebooks(
    finished.directory,
    fingerprint=model.fingerprint,
    layers=2,
    kv_heads=2,
    rope=model.config.rope,
  )
  assert book.codewords.shape == (2, 2, 16, 8)
  record = header["training"]
  assert record["options"]["metric"]["distances"] == [40]
  assert record["tokens"] == corpus.tokens == 566
  assert record["tokens_sha256"] == corpus.sha256
  assert record["texts"] == [{"name": "random", "sha256": "0", "tokens": 1}]
  assert 0 < record["loss"] < 1
  assert np.mean(record["loss_by_head"]) == pytest.approx(record["loss"], abs=1e-6)
  assert record["loss"] <= record["loss_after_seeding_and_lloyd_alone"]
  assert np.shape(record["alive_by_head"]) == (2, 2)
  assert np.all(np.array(record["perplexity_by_head"]) <= 16)
  assert set(record["versions"]) == {"jax", "jaxlib", "optax", "flax", "python"}


def test_leaves_nothing_but_the_result(finished):
  names = {p.name for p in finished.directory.iterdir()}
  assert names == {
    ".lock",
    "codebook.json",
    "codebook.safetensors",
    "config.yaml",
    "losses.jsonl",
    "training.png",
  }


def test_progress_covers_every_phase(finished, corpus):
  phases = list(dict.fromkeys(phase for phase, _, _ in finished.calls))
  assert phases == ["collect", "seed", "adam", "lloyd", "plain", "order"]
  assert ("collect", corpus.tokens, corpus.tokens) in finished.calls
  assert ("adam", 10, 10) in finished.calls
  assert ("lloyd", 4, 4) in finished.calls
  assert ("order", 4, 4) in finished.calls


def test_losses_are_lines_of_json(finished):
  rows = [
    json.loads(line) for line in (finished.directory / "losses.jsonl").read_text().splitlines()
  ]
  assert [(r["phase"], r["step"]) for r in rows] == [
    *(("adam", i) for i in range(10)),
    *(("lloyd", i) for i in range(4)),
    *(("plain", i) for i in range(4)),
  ]
  lloyd = [r["loss"] for r in rows if r["phase"] == "lloyd"]
  assert lloyd == sorted(lloyd, reverse=True)
  assert all(0 < r["alive"] <= 1 for r in rows if r["phase"] != "adam")


def test_codewords_are_means_of_the_keys_they_encode(corpus, run, tmp_path):
  """Through the library's own encode, which knows nothing of normalised space."""
  options = dataclasses.replace(OPTIONS, steps=0, lloyd_steps=100)  # until nothing moves
  listen, _ = stop_at("seed", 1)
  with pytest.raises(Stop):
    run(tmp_path, options=options, progress=listen)
  shape = (2, 2, corpus.tokens, 8)
  keys = np.fromfile(tmp_path / KEYS, jnp.bfloat16).reshape(shape).astype(np.float32)
  book = run(tmp_path, options=options)
  for layer in range(2):
    codes = codebook.encode(jnp.asarray(keys[layer].swapaxes(0, 1)[None]), book.layer(layer))
    for head in range(2):
      of_head = np.asarray(codes)[0, :, head]
      means = np.stack([keys[layer, head][of_head == c].mean(axis=0) for c in range(16)])
      np.testing.assert_allclose(book.codewords[layer, head], means, atol=1e-4)


@pytest.mark.parametrize("save_seconds", [0.0, 1e9], ids=["every-step", "phase-ends"])
@pytest.mark.parametrize(
  ("phase", "nth"),
  [("seed", 2), ("adam", 2), ("adam", 3), ("lloyd", 2), ("plain", 1), ("plain", 3), ("order", 2)],
)
def test_cut_off_and_resumed_equals_unbroken(run, finished, tmp_path, phase, nth, save_seconds):
  listen, _ = stop_at(phase, nth)
  with pytest.raises(Stop):
    run(tmp_path, progress=listen, save_seconds=save_seconds)
  assert not (tmp_path / "codebook.json").exists()
  again, calls = stop_at(None, 0)
  assert_same(run(tmp_path, progress=again, save_seconds=save_seconds), finished)
  losses = (tmp_path / "losses.jsonl").read_text()
  assert losses == (finished.directory / "losses.jsonl").read_text()
  if phase != "seed" and save_seconds == 0:  # it went on, it did not start over
    assert ("collect", 48, 566) not in calls
    assert ("adam", 4, 10) not in calls


def test_cut_off_while_collecting(run, finished, tmp_path, monkeypatch):
  monkeypatch.setattr("train_codebooks.collect._BATCH", 128)
  for nth in (2, 4):
    listen, _ = stop_at("collect", nth)
    with pytest.raises(Stop):
      run(tmp_path, progress=listen)
  again, calls = stop_at(None, 0)
  book = run(tmp_path, progress=again)
  assert calls[0][0] == "collect"
  assert calls[0][1] > 96, "the first batches were run again"
  # the sums of moments are taken in another order than in one large batch
  np.testing.assert_allclose(np.asarray(book.codewords), finished.codewords, rtol=1e-4, atol=1e-4)
  other = tmp_path / "unbroken"
  np.testing.assert_array_equal(run(other).codewords, book.codewords)


@pytest.mark.parametrize("name", ["moments.npz", "training.png", "codebook.safetensors"])
def test_cut_off_inside_a_write(run, finished, tmp_path, monkeypatch, name):
  """The rename that completes a file never happens."""
  real = os.replace

  def replace(source, target, **more):
    if Path(target).name == name:
      raise Stop
    real(source, target, **more)

  monkeypatch.setattr(os, "replace", replace)
  with pytest.raises(Stop):
    run(tmp_path)
  assert not (tmp_path / "codebook.json").exists()
  monkeypatch.undo()
  assert_same(run(tmp_path), finished)
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".codebook")]


def test_full_disk_is_an_os_error_and_leaves_nothing_that_loads(
  run, finished, tmp_path, monkeypatch
):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(OSError, match="No space"):
    run(tmp_path)
  with pytest.raises(UserError, match="missing"):
    codebook.load_codebooks(
      tmp_path, fingerprint="", layers=2, kv_heads=2, rope=tiny_model().config.rope
    )
  monkeypatch.undo()
  assert_same(run(tmp_path), finished)


def test_a_finished_run_returns_at_once(run, finished, tmp_path):
  shutil.copytree(finished.directory, tmp_path / "run")
  before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
  listen, calls = stop_at(None, 0)
  assert_same(run(tmp_path / "run", progress=listen), finished)
  assert calls == []
  after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
  assert {k: v for k, v in after.items() if k != ".lock"} == {
    k: v for k, v in before.items() if k != ".lock"
  }


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"options": dataclasses.replace(OPTIONS, steps=11)}, "options.steps was 10 and is now 11"),
    (
      {"options": dataclasses.replace(OPTIONS, metric=Metric(kind="plain"))},
      "options.metric.kind was 'query' and is now 'plain'",
    ),
    ({"model": tiny_model(1)}, "model.fingerprint was"),
    ({"corpus": random_corpus(1)}, "calibration.tokens_sha256 was"),
  ],
  ids=["option", "metric", "model", "text"],
)
def test_another_run_is_refused(run, finished, changes, named):
  with pytest.raises(UserError, match=named):
    run(finished.directory, **changes)


def test_a_foreign_codebook_is_never_replaced(run, finished, tmp_path):
  shutil.copytree(finished.directory, tmp_path / "run")
  (tmp_path / "run" / "config.yaml").unlink()
  with pytest.raises(UserError, match=r"without config\.yaml"):
    run(tmp_path / "run")
  (tmp_path / "run" / "config.yaml").write_text("{")
  with pytest.raises(UserError, match="not readable YAML"):
    run(tmp_path / "run")


@pytest.mark.parametrize("damage", [b"", b"PK", b"x" * 4000])
def test_damaged_moments_are_collected_again(run, finished, tmp_path, damage):
  listen, _ = stop_at("seed", 1)
  with pytest.raises(Stop):
    run(tmp_path, progress=listen)
  (tmp_path / MOMENTS).write_bytes(damage)
  assert_same(run(tmp_path), finished)


def test_a_damaged_checkpoint_is_refused_by_name(run, tmp_path):
  listen, _ = stop_at("lloyd", 1)
  with pytest.raises(Stop):
    run(tmp_path, progress=listen, save_seconds=0.0)
  for path in (tmp_path / "checkpoints" / "lloyd").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  with pytest.raises(UserError, match="damaged; remove the directory"):
    run(tmp_path)


def test_a_directory_in_use_is_refused(run, tmp_path):
  def listen(*_, **__):
    with pytest.raises(UserError, match="another run is at work"):
      run(tmp_path)
    raise Stop

  with pytest.raises(Stop):
    run(tmp_path, progress=listen)


def test_fewer_tokens_than_codewords(run, tmp_path):
  with pytest.raises(UserError, match=r"16 codewords need .* got 12"):
    run(tmp_path, corpus=random_corpus(lengths=(12,)))
  assert not list(tmp_path.iterdir())


def test_as_many_tokens_as_codewords(run, tmp_path):
  book = run(tmp_path, corpus=random_corpus(lengths=(16,)))
  assert np.isfinite(book.codewords).all()


def test_the_same_token_over_and_over(run, tmp_path):
  """Keys of layer 0 are all alike: no scale, fewer distinct keys than codewords."""
  corpus = Corpus(documents=(np.full(40, 7, np.int32),) * 2)
  assert np.isfinite(run(tmp_path, corpus=corpus).codewords).all()


def test_a_model_that_gives_nan(run, tmp_path):
  model = tiny_model()
  graph, state = nnx.split(model.decoder)
  state["layers"]["k"]["kernel"] = state["layers"]["k"]["kernel"].replace(
    jnp.full_like(state["layers"]["k"]["kernel"][...], jnp.nan)
  )
  broken = dataclasses.replace(model, decoder=nnx.merge(graph, state))
  with pytest.raises(UserError, match="layer 0 gives a non-finite key"):
    run(tmp_path, model=broken)


@pytest.mark.parametrize(
  "options",
  [
    dataclasses.replace(OPTIONS, steps=0),
    dataclasses.replace(OPTIONS, lloyd_steps=0),
    dataclasses.replace(OPTIONS, steps=6, guard=False, seeding="sampled"),
    dataclasses.replace(OPTIONS, metric=Metric(kind="plain")),
    dataclasses.replace(OPTIONS, batch=10_000),
  ],
  ids=["lloyd-alone", "adam-alone", "sampled", "plain", "large-batch"],
)
def test_every_option_trains(run, tmp_path, options):
  book = run(tmp_path, options=options)
  assert np.isfinite(book.codewords).all()
  if options.metric.kind == "plain":
    np.testing.assert_array_equal(book.whitener[0, 0], np.eye(8))


def test_text_through_a_tokenizer(tmp_path):
  """No documents given: the options say which text, cut and recorded."""
  (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
  model = dataclasses.replace(tiny_model(), tokenizer=byte_tokenizer("<s>"))
  options = dataclasses.replace(
    OPTIONS, text_files=(str(tmp_path / "a.txt"),), steps=0, lloyd_steps=1
  )
  train(model, options, tmp_path / "run")
  record = json.loads((tmp_path / "run" / "codebook.json").read_text())["training"]
  assert [t["name"] for t in record["texts"]] == ["a.txt", "identifiers seed 0"]
  (tmp_path / "a.txt").write_text("Another text. " * 30)
  with pytest.raises(UserError, match=r"calibration\.texts was"):
    train(model, options, tmp_path / "run")


_CHILD = """
import sys
from pathlib import Path
import jax
from tests.train_codebooks.cases import OPTIONS, random_corpus, tiny_model
from train_codebooks import train
train(tiny_model(), OPTIONS, Path(sys.argv[1]), corpus=random_corpus(), save_seconds=0.0,
      devices=jax.local_devices()[:1])
"""


def test_killed_in_the_middle_of_a_save(run, finished, tmp_path):
  """SIGKILL while orbax has a checkpoint half written."""
  root = Path(__file__).parents[2]
  environment = os.environ | {"PYTHONPATH": str(root)}
  directory = tmp_path / "run"
  with (tmp_path / "log").open("w") as log:
    child = subprocess.Popen(
      [sys.executable, "-c", _CHILD, str(directory)], cwd=root, env=environment, stderr=log
    )
    caught, deadline = False, time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline and not caught:
      saves = list((directory / "checkpoints").glob("adam/*tmp*"))
      if saves:
        child.send_signal(signal.SIGKILL)
        caught = True
    child.wait()
  assert caught, (tmp_path / "log").read_text()
  assert child.returncode == -signal.SIGKILL
  assert not (directory / "codebook.json").exists()
  (directory / ".codebook.json.12345").write_text("half a he")  # what a cut-off write leaves
  assert_same(run(directory), finished)
  assert not list(directory.glob(".codebook*"))
