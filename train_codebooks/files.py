"""Arrays on disk that are whole or absent."""

import io
from pathlib import Path

import numpy as np

from a2ats_jax.files import write_atomically


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """An ``.npz`` file, atomically."""
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  write_atomically(path, buffer.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
  """What :func:`save_arrays` wrote."""
  with np.load(path, allow_pickle=False) as file:
    return {name: file[name] for name in file.files}
