"""Train the codebooks of a model, or of any keys and queries: collect, metric, fit, save."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a2ats_jax.codebook import HEADER, Codebook, load_codebooks, make_codebook, save_codebooks
from a2ats_jax.errors import UserError
from a2ats_jax.files import claim, locked
from a2ats_jax.models.model import Model
from a2ats_jax.rope import RopeConfig, make_rope
from a2ats_jax.typing import Float, Shaped
from train_codebooks import report
from train_codebooks.chain import chain
from train_codebooks.collect import KEYS, MOMENTS, Collected, collect, from_arrays
from train_codebooks.fit import Fitted, fit, space_of
from train_codebooks.kmeans import Space
from train_codebooks.metric import whiteners
from train_codebooks.options import TrainOptions
from train_codebooks.progress import Progress, silent
from train_codebooks.texts import Corpus, make_corpus

_CHECKPOINTS = "checkpoints"


def train(
  model: Model,
  options: TrainOptions,
  directory: Path,
  *,
  corpus: Corpus | None = None,
  progress: Progress = silent,
  save_seconds: float = 20.0,
  devices: Sequence[jax.Device] | None = None,
) -> Codebook:
  """Train, or finish a run that was cut off, or return what a finished run made.

  The directory ends up with the codebook, ``config.yaml``, ``losses.jsonl`` and ``training.png``.
  While it runs it also holds the collected keys, ``2 L K N D`` bytes, and checkpoints of at most
  about ``60 L K C D`` bytes.

  Args:
    directory: of this run alone, made if need be.
    corpus: documents to use in place of those the options describe.
    progress: told after every piece of work.
    save_seconds: least time between checkpoints; does not change the result.
    devices: to cut the heads over; all local ones by default.

  Returns:
    The codebooks of all global layers, as :func:`a2ats_jax.codebook.load_codebooks` reads them.

  Raises:
    UserError: fewer calibration tokens than codewords, text or keys that cannot be used, a
      directory in use, or one that belongs to a run with other options, model or text.
    OSError: the disk is full or the directory cannot be written; nothing that loads is left.
  """
  if corpus is None:
    corpus = make_corpus(
      model.tokenizer,
      tokens=options.tokens,
      document_tokens=options.document_tokens,
      identifiers=options.identifiers,
      seed=options.seed,
      text_files=options.text_files,
    )
  _enough(corpus.tokens, options)
  source = {
    "texts": _plain(corpus.sources),
    "tokens": corpus.tokens,
    "tokens_sha256": corpus.sha256,
  }
  return _train(
    lambda: collect(model.decoder, corpus, directory, progress=progress, save_seconds=save_seconds),
    options,
    directory,
    owner=_Owner(
      model.fingerprint, model.config.global_layers, model.config.kv_heads, model.config.rope
    ),
    source=source,
    progress=progress,
    save_seconds=save_seconds,
    devices=devices,
  )


def train_on_arrays(
  keys: Shaped[np.ndarray, "L N K D"],
  queries: Shaped[np.ndarray, "L N H D"] | None,
  options: TrainOptions,
  directory: Path,
  *,
  fingerprint: str,
  rope: RopeConfig,
  progress: Progress = silent,
  save_seconds: float = 20.0,
  devices: Sequence[jax.Device] | None = None,
) -> Codebook:
  """As :func:`train`, for a model that this library does not run, from its keys and queries.

  Of the options, those that describe text count for nothing.

  Args:
    keys: of N calibration tokens of every layer, BEFORE rotary embedding; floats of any width,
      memory-mapped or not.
    queries: of the same tokens, before rotary embedding; needed by the metric ``query`` alone.
    fingerprint: any text that tells this model from others: loading asks for it again.
    rope: the model's rotary embedding.

  Raises:
    UserError: shapes that are not those of keys and queries, fewer tokens than codewords, no
      queries where the metric needs them, numbers that are not finite; a directory as in train.
    OSError: as in train.
  """
  if keys.ndim != 4 or keys.shape[3] != rope.head_dim:
    raise UserError(f"training: expected keys [L, N, K, {rope.head_dim}], got {keys.shape}")
  layers, tokens, kv_heads, dim = keys.shape
  if queries is None and options.metric.kind == "query":
    raise UserError("training: the metric 'query' needs queries, got none")
  if queries is not None and (
    queries.shape[:2] != (layers, tokens)
    or queries.shape[3:] != (dim,)
    or queries.shape[2] % kv_heads
  ):
    raise UserError(
      f"training: expected queries [{layers}, {tokens}, a multiple of {kv_heads}, {dim}], "
      f"got {queries.shape}"
    )
  _enough(tokens, options)
  digest = hashlib.sha256()
  for x in (keys, queries):
    for layer in [] if x is None else x:
      digest.update(np.ascontiguousarray(layer).view(np.uint8))
  return _train(
    lambda: from_arrays(keys, queries),
    options,
    directory,
    owner=_Owner(fingerprint, layers, kv_heads, rope),
    source={"texts": [], "tokens": tokens, "arrays_sha256": digest.hexdigest()},
    progress=progress,
    save_seconds=save_seconds,
    devices=devices,
  )


def _enough(tokens: int, options: TrainOptions) -> None:
  if tokens < options.codewords:
    raise UserError(
      f"training: {options.codewords} codewords need at least as many calibration tokens, "
      f"got {tokens}"
    )


@dataclasses.dataclass(frozen=True)
class _Owner:
  """Whose codebooks they are: what loading asks for."""

  fingerprint: str
  layers: int
  kv_heads: int
  rope: RopeConfig


def _train(
  gather: Callable[[], Collected],
  options: TrainOptions,
  directory: Path,
  *,
  owner: _Owner,
  source: dict[str, Any],
  progress: Progress,
  save_seconds: float,
  devices: Sequence[jax.Device] | None,
) -> Codebook:
  """Train unless it was done, clean up, and load.

  Args:
    gather: gives keys and moments, taking up where it was cut off.
    source: what the calibration data are, for the record and to know a run by.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"{directory}: {e.strerror or e}") from e
  identity = {
    "model": {"fingerprint": owner.fingerprint},
    "options": _options(options),
    "calibration": source,
  }
  with locked(directory):
    claim(directory, identity, results=(HEADER,))
    if not (directory / HEADER).exists():
      _run(gather, options, owner, source, directory, progress, save_seconds, devices)
    for leftover in (directory / KEYS, directory / MOMENTS, *directory.glob(".*.[0-9]*")):
      leftover.unlink(missing_ok=True)  # the hidden ones are of writes that were cut off
    shutil.rmtree(directory / _CHECKPOINTS, ignore_errors=True)
  book, _ = load_codebooks(directory, **vars(owner))
  return book


def _run(
  gather: Callable[[], Collected],
  options: TrainOptions,
  owner: _Owner,
  source: dict[str, Any],
  directory: Path,
  progress: Progress,
  save_seconds: float,
  devices: Sequence[jax.Device] | None,
) -> None:
  dim, collected = owner.rope.head_dim, gather()
  whitener, repaired = whiteners(
    options.metric,
    collected.query_square.reshape(-1, dim, dim),
    collected.query_sum.reshape(-1, dim),
    collected.tokens * collected.group,
    np.asarray(make_rope(owner.rope).inv_freq),
  )
  space = space_of(collected, whitener)
  fitted = fit(
    collected,
    space,
    options,
    directory / _CHECKPOINTS,
    progress=progress,
    save_seconds=save_seconds,
    devices=devices,
  )
  fitted = _renumber(fitted, progress)
  shape = (owner.layers, owner.kv_heads)
  book = make_codebook(
    jnp.asarray(key_space(fitted.codewords, space).reshape(*shape, -1, dim)),
    jnp.asarray(whitener.reshape(*shape, dim, dim)),
  )
  report.write(directory, fitted, owner.layers)
  record = _record(options, source, fitted, repaired, owner.layers)
  save_codebooks(directory, book, fingerprint=owner.fingerprint, rope=owner.rope, training=record)


def key_space(codewords: Float[np.ndarray, "M C D"], space: Space) -> Float[np.ndarray, "M C D"]:
  """Codewords from normalised space back to that of keys, solved in float64."""
  lower = np.asarray(space.whitener, np.float64).swapaxes(1, 2)
  solved = np.linalg.solve(lower, codewords.astype(np.float64).swapaxes(1, 2)).swapaxes(1, 2)
  return (solved + np.asarray(space.mean, np.float64)[:, None]).astype(np.float32)


def _renumber(fitted: Fitted, progress: Progress) -> Fitted:
  codewords, counts = np.empty_like(fitted.codewords), np.empty_like(fitted.counts)
  total = len(codewords)
  for head in range(total):
    order = chain(fitted.codewords[head])
    codewords[head], counts[head] = fitted.codewords[head][order], fitted.counts[head][order]
    progress("order", head + 1, total)
  return dataclasses.replace(fitted, codewords=codewords, counts=counts)


def _record(
  options: TrainOptions,
  source: dict[str, Any],
  fitted: Fitted,
  repaired: Sequence[int],
  layers: int,
) -> dict[str, Any]:
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax")}
  return {
    "options": _options(options),
    **source,
    "heads_with_repaired_metric": list(repaired),
    **report.summary(fitted, layers),
    "versions": versions | {"python": platform.python_version()},
  }


def _options(options: TrainOptions) -> dict[str, Any]:
  """Options as JSON types; of text files the names alone, their hashes stand beside them."""
  names = tuple(Path(path).name for path in options.text_files)
  return _plain(dataclasses.asdict(dataclasses.replace(options, text_files=names)))


def _plain(x: Any) -> Any:
  """Tuples as lists: what JSON and YAML give back."""
  return json.loads(json.dumps(x))
