r"""Codebooks of keys before rotary embedding: encode keys, score codewords, save and load.

One codebook per layer and KV head (A2ATS, 2502.12665, sec. 4.2). The metric of a codebook is a
matrix ``H = L L^T``: a key k goes to the codeword c that minimises
:math:`(k-c) H (k-c)^\top = \|kL - cL\|^2` (Eq. 14, 16-18), so everything below is ordinary
nearest-neighbour search after multiplying by L. ``L = I`` is the plain codebook.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from a2ats_jax.errors import UserError
from a2ats_jax.files import write_atomically
from a2ats_jax.ops.vq_encode import offsets_of, vq_encode
from a2ats_jax.rope import RopeConfig
from a2ats_jax.typing import Array, Float, UInt16

FORMAT = "a2ats-codebook"
VERSION = 1
TENSORS, HEADER = "codebook.safetensors", "codebook.json"
MAX_CODEWORDS = 65536  # codes are uint16

_HIGHEST = jax.lax.Precision.HIGHEST


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["codewords", "whitener", "whitened", "offsets"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Codebook:
  """Codebooks of every KV head, of one layer or (leading axis L) of all layers.

  Attributes:
    codewords: in the space of keys before rotary embedding, ``[L, K, C, D]`` float32.
    whitener: lower triangular ``L`` of the metric ``H = L L^T``, ``[L, K, D, D]``.
    whitened: ``codewords @ whitener``, kept because every encoded key needs it.
    offsets: half the squared norm of each row of ``whitened``, ``[L, K, C]``, kept so that coding
      the key of a decode step reads C numbers instead of squaring all of ``whitened`` again.
  """

  codewords: Float[Array, "*L K C D"]
  whitener: Float[Array, "*L K D D"]
  whitened: Float[Array, "*L K C D"]
  offsets: Float[Array, "*L K C"]

  def layer(self, index: int | Array) -> "Codebook":
    """The codebooks of one layer; the index may be traced."""
    return jax.tree.map(lambda x: x[index], self)

  @property
  def size(self) -> int:
    """C."""
    return self.codewords.shape[-2]


def make_codebook(
  codewords: Float[Array, "*L K C D"], whitener: Float[Array, "*L K D D"]
) -> Codebook:
  """A codebook from codewords in key space and the lower triangular factor of its metric."""
  size = codewords.shape[-2]
  if not 1 <= size <= MAX_CODEWORDS:
    raise UserError(f"codebook: 1 to {MAX_CODEWORDS} codewords are supported, got {size}")
  whitened = jnp.matmul(codewords, whitener, precision=_HIGHEST)
  return Codebook(codewords, whitener, whitened, offsets_of(whitened))


def encode(keys: Float[Array, "B T K D"], book: Codebook) -> UInt16[Array, "B T K"]:
  r"""Nearest codeword of every key under the codebook's metric (Eq. 14); ties to the lowest.

  Equals ``argmin_c ||k L - c L||^2`` per KV head, in float32, computed as
  ``argmax_c (k L) . (c L) - ||c L||^2 / 2`` in blocks of tokens: no ``T x C`` array exists.

  Args:
    keys: keys BEFORE rotary embedding.
    book: codebooks of one layer.

  Raises:
    ValueError: head count or head size differ from the codebook's.
  """
  b, t, kv_heads, dim = keys.shape
  if book.codewords.ndim != 3 or (kv_heads, dim) != (
    book.codewords.shape[0],
    book.codewords.shape[2],
  ):
    raise ValueError(
      f"encode: keys have K={kv_heads} and D={dim}, the codebook {book.codewords.shape}"
    )
  rows = keys.reshape(b * t, kv_heads, dim)
  codes = vq_encode(rows, book.whitener, book.whitened, book.offsets)
  return codes.reshape(b, t, kv_heads)


def score_table(
  queries: Float[Array, "B S Z H D"], codewords: Float[Array, "K C D"]
) -> Float[Array, "B S H cells"]:
  r"""The far score of every cell (segment, codeword) for every query head.

  :math:`q R_{d_z} c^\top`, without ``1/sqrt(D)``, in float32 (METHODS of A2ATS, decode step 3).
  Cell ``z C + c`` is codeword c in segment z. The one place where cells get a score, so that two
  tokens of a cell tie exactly whatever selects among them.

  Args:
    queries: rotated to each segment's distance, :func:`a2ats_jax.rope.far_query`.
    codewords: of one layer.
  """
  b, s, z, h, d = queries.shape
  kv_heads, size, _ = codewords.shape
  rows = queries.astype(jnp.float32).reshape(b, s, z, kv_heads, h // kv_heads, d)
  rows = rows.transpose(3, 0, 1, 4, 2, 5).reshape(kv_heads, -1, d)
  # A batched product with the codewords last: einsum puts them first and turns the table over.
  table = jax.lax.dot_general(
    rows, codewords, (((2,), (2,)), ((0,), (0,))), precision=_HIGHEST
  ).reshape(kv_heads, b, s, h // kv_heads, z * size)
  return table.transpose(1, 2, 0, 3, 4).reshape(b, s, h, z * size)


def item_scores(
  queries: Float[Array, "B S Z H D"], words: Float[Array, "B K M D"]
) -> Float[Array, "B S H M"]:
  """The far score of tokens that are cells of their own, by their codewords; float32.

  Args:
    queries: rotated to the distance of each of Z segments.
    words: the codeword of every token, segment after segment, M a multiple of Z.
  """
  b, s, z, h, d = queries.shape
  kv_heads, m = words.shape[1:3]
  rows = queries.astype(jnp.float32).reshape(b, s, z, kv_heads, h // kv_heads, d)
  rows = rows.transpose(0, 3, 2, 1, 4, 5)
  words = words.reshape(b, kv_heads, z, m // z, d)
  # Codewords keep their layout in this product; einsum would transpose them.
  scores = jax.lax.dot_general(
    rows.reshape(b, kv_heads, z, s * (h // kv_heads), d),
    words,
    (((4,), (4,)), ((0, 1, 2), (0, 1, 2))),
    precision=_HIGHEST,
  ).reshape(b, kv_heads, z, s, h // kv_heads, m // z)
  return scores.transpose(0, 3, 1, 4, 2, 5).reshape(b, s, h, m)


def save_codebooks(
  directory: Path,
  book: Codebook,
  *,
  fingerprint: str,
  rope: RopeConfig,
  training: Mapping[str, Any],
) -> None:
  """Write a codebook of all layers as safetensors with a JSON header beside it.

  The header carries the tensors' hash and is written last: a directory that was cut off while
  being written never loads.

  Args:
    directory: made if need be.
    fingerprint: identity of the model the keys came from.
    rope: its rotary embedding; a codebook trained under another metric distance is another one.
    training: what it was trained on and how, for people and for the record; JSON types only.

  Raises:
    OSError: the disk is full or the directory cannot be written.
  """
  directory.mkdir(parents=True, exist_ok=True)
  layers, kv_heads, size, dim = book.codewords.shape
  data = safetensors.numpy.save(
    {"codewords": np.asarray(book.codewords), "whitener": np.asarray(book.whitener)},
    metadata={"format": FORMAT, "version": str(VERSION)},
  )
  header = {
    "format": FORMAT,
    "version": VERSION,
    "model_fingerprint": fingerprint,
    "layers": layers,
    "kv_heads": kv_heads,
    "codewords": size,
    "head_dim": dim,
    "rope": dataclasses.asdict(rope),
    "sha256": hashlib.sha256(data).hexdigest(),
    "training": dict(training),
  }
  write_atomically(directory / TENSORS, data)
  write_atomically(directory / HEADER, json.dumps(header, indent=2))


def load_codebooks(
  directory: Path, *, fingerprint: str, layers: int, kv_heads: int, rope: RopeConfig
) -> tuple[Codebook, dict[str, Any]]:
  """Read a codebook and check that it belongs to this model.

  Returns:
    The codebook of all layers, and its header.

  Raises:
    UserError: no codebook, an unknown format, damaged tensors, or one trained for another model,
      rope or shape; the message names what differs and holds both values.
  """
  where = f"codebook {directory}"
  try:
    header = json.loads((directory / HEADER).read_text())
    data = (directory / TENSORS).read_bytes()
  except (FileNotFoundError, NotADirectoryError) as e:
    name = Path(e.filename).name
    raise UserError(f"{where}: expected a trained codebook, {name} is missing") from e
  except ValueError as e:
    raise UserError(f"{where}: {HEADER} is not readable JSON") from e
  if not isinstance(header, dict) or header.get("format") != FORMAT:
    raise UserError(f"{where}: expected format {FORMAT!r} in {HEADER}")
  if header.get("version") != VERSION:
    raise UserError(
      f"{where}: expected format version {VERSION}, got {header.get('version')}; train it again"
    )
  if hashlib.sha256(data).hexdigest() != header.get("sha256"):
    raise UserError(f"{where}: {TENSORS} does not match the hash in {HEADER}; it is damaged")
  expected = {
    "rope": dataclasses.asdict(rope),
    "layers": layers,
    "kv_heads": kv_heads,
    "head_dim": rope.head_dim,
    "model_fingerprint": fingerprint,
  }
  for key, value in expected.items():
    if header.get(key) != value:
      raise UserError(
        f"{where}: was trained for another model: {key} is {header.get(key)}, "
        f"this model has {value}"
      )
  try:
    tensors = safetensors.numpy.load(data)
    codewords, whitener = tensors["codewords"], tensors["whitener"]
  except (safetensors.SafetensorError, KeyError) as e:
    raise UserError(f"{where}: {TENSORS} does not hold codewords and whitener") from e
  shape = (layers, kv_heads, header.get("codewords"), rope.head_dim)
  if codewords.shape != shape or whitener.shape != (*shape[:2], shape[3], shape[3]):
    raise UserError(f"{where}: expected codewords of shape {shape}, got {codewords.shape}")
  if not (np.isfinite(codewords).all() and np.isfinite(whitener).all()):
    raise UserError(f"{where}: holds non-finite numbers")
  return make_codebook(jnp.asarray(codewords), jnp.asarray(whitener)), header
