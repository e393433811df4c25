"""A finished run that others are compared with."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from a2ats_jax.models.model import Model
from tests.train_codebooks.cases import OPTIONS, random_corpus, tiny_model
from train_codebooks import Corpus, train


@dataclasses.dataclass(frozen=True)
class Finished:
  """A run that nothing disturbed."""

  directory: Path
  codewords: np.ndarray
  whitener: np.ndarray
  calls: tuple[tuple[str, int, int], ...]


@pytest.fixture(scope="session")
def model() -> Model:
  return tiny_model()


@pytest.fixture(scope="session")
def corpus() -> Corpus:
  return random_corpus()


@pytest.fixture(scope="session")
def finished(model, corpus, tmp_path_factory) -> Finished:
  directory = tmp_path_factory.mktemp("finished") / "run"
  calls = []

  def note(phase, done, total, /, **figures):
    calls.append((phase, done, total))

  # one device here and all of them elsewhere: equality with this run covers the sharding too
  book = train(
    model, OPTIONS, directory, corpus=corpus, progress=note, devices=jax.local_devices()[:1]
  )
  return Finished(directory, np.asarray(book.codewords), np.asarray(book.whitener), tuple(calls))
