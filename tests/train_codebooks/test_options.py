"""Options that cannot work are refused when they are made."""

import pytest

from a2ats_jax.errors import UserError
from train_codebooks import TrainOptions


@pytest.mark.parametrize(
  "options",
  [
    {"codewords": 0},
    {"codewords": 65537},
    {"tokens": 0},
    {"document_tokens": 0},
    {"batch": 0},
    {"steps": -1},
    {"lloyd_steps": -1},
    {"seed": -1},
    {"identifiers": 1.5},
    {"learning_rate": 0.0},
    {"tolerance": -0.1},
  ],
)
def test_refused(options):
  with pytest.raises(UserError, match=r"training: .*" + str(next(iter(options.values())))):
    TrainOptions(**options)
