"""The picture and the figures of a run."""

import io

import matplotlib.image
import numpy as np
import pytest

from train_codebooks import report
from train_codebooks.fit import Fitted, Polished


def fitted(steps=5, plain=True) -> Fitted:
  draw = np.random.default_rng(0)
  counts = draw.integers(0, 9, (6, 16)).astype(np.float32)
  run = Polished(
    codewords=np.zeros((6, 16, 2), np.float32),
    counts=counts,
    losses=np.sort(draw.random((3, 6)), axis=0)[::-1].copy(),
    alive=np.array([0.5, 0.9, 1.0]),
  )
  return Fitted(
    codewords=run.codewords,
    counts=counts,
    loss=run.losses[-1],
    adam=draw.random((6, steps)).astype(np.float32),
    lloyd=run,
    plain=run if plain else None,
    fallback=(3,),
  )


def test_perplexity_by_hand():
  counts = np.array([[4, 4, 4, 4], [9, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]], np.float32)
  np.testing.assert_allclose(report.perplexity(counts), [4, 1, 2, 1])


@pytest.mark.parametrize(("steps", "plain"), [(5, True), (0, False)])
def test_picture_is_a_png_with_something_on_it(steps, plain):
  png = report.draw(fitted(steps, plain), layers=3)
  assert png.startswith(b"\x89PNG\r\n")
  image = matplotlib.image.imread(io.BytesIO(png))
  assert image.shape[0] > 300
  assert image.shape[1] > 800
  assert np.unique(image[..., :3].reshape(-1, 3), axis=0).shape[0] > 50


def test_drawing_touches_no_global_state():
  import matplotlib.pyplot as plt

  report.draw(fitted(), layers=3)
  assert plt.get_fignums() == []


def test_summary_is_by_layer():
  out = report.summary(fitted(), layers=3)
  assert np.shape(out["loss_by_head"]) == (3, 2)
  assert out["heads_where_lloyd_alone_was_better"] == [3]
  assert report.summary(fitted(plain=False), layers=3)["loss_after_seeding_and_lloyd_alone"] is None


def test_files_are_written(tmp_path):
  report.write(tmp_path, fitted(), layers=3)
  assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
  assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 5 + 3 + 3
