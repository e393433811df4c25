"""The real model and its golden numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from a2ats_jax.models.checkpoint import Checkpoint, read_checkpoint
from a2ats_jax.models.fetch import fetch

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
  """The real SmolLM2-135M-Instruct, fetched once into the user's cache."""
  return fetch("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
  """The same, opened by its name."""
  return read_checkpoint("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def golden() -> dict:
  return json.loads((DATA / "smollm2-135m-instruct.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
  with np.load(DATA / "smollm2-135m-instruct.npz") as arrays:
    return dict(arrays)
