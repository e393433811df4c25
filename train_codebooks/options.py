"""What a training run is asked to do."""

import dataclasses
from typing import Literal

from a2ats_jax.codebook import MAX_CODEWORDS
from a2ats_jax.errors import UserError
from train_codebooks.metric import Metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
  """Everything that decides what codebook comes out; recorded with the run.

  The defaults fit SmolLM2 135M on a laptop. The released A2ATS uses 4096 codewords and about 80K
  tokens, a fifth of them identifiers.

  Attributes:
    codewords: C, of every layer and KV head.
    tokens: calibration tokens at most; fewer when the text ends.
    identifiers: share of the tokens that are random UUIDs. They look like what needle benchmarks
      ask for, so results belong beside those of a run with 0.
    text_files: UTF-8 files to calibrate on; none means half of the reference text in CPython.
    document_tokens: longest document; positions start from 0 in each.
    metric: what makes two keys close; plain does as well as the published one here
      (docs/accuracy.md).
    seeding: how the first codewords are drawn, by squared distance or evenly.
    steps: optimiser steps between seeding and Lloyd; 0 leaves plain Lloyd.
    learning_rate: of Adam at the start, in standard deviations of a whitened key's coordinate;
      decays to zero along a cosine.
    batch: tokens of each head in an optimiser step.
    lloyd_steps: updates at most after that, each after a full pass.
    tolerance: relative gain in distortion below which Lloyd stops.
    guard: also run Lloyd alone from the same seeds and keep, head by head, what is better: the
      distortion is then never above plain Lloyd's. Costs as many passes again.
    seed: of every random draw.
  """

  codewords: int = 1024
  tokens: int = 57344
  identifiers: float = 0.25
  text_files: tuple[str, ...] = ()
  document_tokens: int = 2048
  metric: Metric = Metric(kind="plain")
  seeding: Literal["kmeans++", "sampled"] = "kmeans++"
  steps: int = 200
  learning_rate: float = 0.1
  batch: int = 2048
  lloyd_steps: int = 10
  tolerance: float = 1e-3
  guard: bool = True
  seed: int = 0

  def __post_init__(self):
    for field in ("codewords", "tokens", "document_tokens", "batch"):
      if getattr(self, field) < 1:
        raise UserError(f"training: {field} must be at least 1, got {getattr(self, field)}")
    for field in ("steps", "lloyd_steps", "seed"):
      if getattr(self, field) < 0:
        raise UserError(f"training: {field} must be 0 or more, got {getattr(self, field)}")
    if self.codewords > MAX_CODEWORDS:
      raise UserError(f"training: at most {MAX_CODEWORDS} codewords, got {self.codewords}")
    if not 0 <= self.identifiers <= 1:
      raise UserError(f"training: identifiers is a share from 0 to 1, got {self.identifiers}")
    if not 0 < self.learning_rate < float("inf"):
      raise UserError(
        f"training: learning_rate must be positive and finite, got {self.learning_rate}"
      )
    if not 0 <= self.tolerance < float("inf"):
      raise UserError(f"training: tolerance must be 0 or more and finite, got {self.tolerance}")
    if self.seeding not in ("kmeans++", "sampled"):
      raise UserError(f"training: seeding is 'kmeans++' or 'sampled', got {self.seeding!r}")
