"""Train the codebooks that A2ATS scores far keys with.

.. code-block:: python

  model = load_model("smollm2-135m-instruct")
  book = train(model, TrainOptions(codewords=1024), Path("runs/smollm2-1024"))
"""

from train_codebooks.metric import Metric, log_spaced
from train_codebooks.options import TrainOptions
from train_codebooks.progress import Progress
from train_codebooks.texts import (
  Corpus,
  Text,
  make_corpus,
  pydoc_calibration,
  pydoc_held_out,
  random_identifiers,
  read_text,
)
from train_codebooks.train import train, train_on_arrays

__all__ = [
  "Corpus",
  "Metric",
  "Progress",
  "Text",
  "TrainOptions",
  "log_spaced",
  "make_corpus",
  "pydoc_calibration",
  "pydoc_held_out",
  "random_identifiers",
  "read_text",
  "train",
  "train_on_arrays",
]
