"""The header of a GGUF file: metadata, and where each tensor lies.

It is parsed here, with every length checked against the file, because a damaged file must end in
one clear line; block layouts and dequantisation are those of the ``gguf`` package.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from a2ats_jax.errors import UserError

TENSOR_TYPES = (
  *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"),
)

_SCALARS = {
  GGUFValueType.UINT8: "<B",
  GGUFValueType.INT8: "<b",
  GGUFValueType.UINT16: "<H",
  GGUFValueType.INT16: "<h",
  GGUFValueType.UINT32: "<I",
  GGUFValueType.INT32: "<i",
  GGUFValueType.FLOAT32: "<f",
  GGUFValueType.BOOL: "<?",
  GGUFValueType.UINT64: "<Q",
  GGUFValueType.INT64: "<q",
  GGUFValueType.FLOAT64: "<d",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTensor:
  """Where a tensor lies in the file.

  Attributes:
    kind: name of its number format, one of :data:`TENSOR_TYPES`.
    shape: in numpy order, ``(out, in)`` for a matrix.
    data: its bytes, still in the mapped file.
  """

  kind: str
  shape: tuple[int, ...]
  data: np.ndarray

  def read(self) -> np.ndarray:
    """The values as an owned float32 array of ``shape``."""
    rows = self.data.reshape(*self.shape[:-1], -1)
    with np.errstate(all="ignore"):  # a damaged scale is reported as a value that is not finite
      values = dequantize(rows, GGMLQuantizationType[self.kind])
    return np.array(values, np.float32).reshape(self.shape)


class _Header:
  """A reading position in the file that refuses to pass its end."""

  def __init__(self, data: np.ndarray, source: str):
    self.data = memoryview(data)
    self.source = source
    self.at = 0

  def expect(self, count: int) -> None:
    if count > len(self.data) - self.at:
      raise UserError(
        f"{self.source}: truncated or damaged GGUF header: {count} bytes expected at byte "
        f"{self.at}, {len(self.data) - self.at} left"
      )

  def take(self, count: int) -> memoryview:
    self.expect(count)
    piece = self.data[self.at : self.at + count]
    self.at += count
    return piece

  def number(self, layout: str) -> Any:
    return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

  def string(self) -> str:
    try:
      return str(self.take(self.number("<Q")), "utf-8")
    except UnicodeDecodeError:
      raise UserError(f"{self.source}: damaged GGUF header: text is not UTF-8") from None

  def kind(self) -> GGUFValueType:
    number = self.number("<I")
    try:
      return GGUFValueType(number)
    except ValueError:
      raise UserError(f"{self.source}: damaged GGUF header: value type {number}") from None

  def value(self) -> Any:
    kind = self.kind()
    if kind == GGUFValueType.STRING:
      return self.string()
    if kind != GGUFValueType.ARRAY:
      return self.number(_SCALARS[kind])
    kind, count = self.kind(), self.number("<Q")
    if kind == GGUFValueType.STRING:
      self.expect(8 * count)
      return [self.string() for _ in range(count)]
    if kind == GGUFValueType.ARRAY:
      raise UserError(f"{self.source}: a GGUF header with arrays of arrays is not supported")
    dtype = np.dtype(_SCALARS[kind])
    return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
  """Metadata and tensors of a GGUF file by their names in the file.

  Metadata values are Python numbers, strings, or lists of those.

  Raises:
    UserError: the file cannot be opened, is not GGUF, is damaged, or holds a tensor type outside
      :data:`TENSOR_TYPES`.
  """
  source = str(path)
  try:
    with path.open("rb") as file:
      if file.read(4) != b"GGUF":
        raise UserError(f"{source}: not a GGUF file")
      data = np.asarray(np.memmap(file, np.uint8, mode="r"))
  except OSError as error:
    raise UserError(f"{source}: {error.strerror or error}") from error
  header = _Header(data, source)
  header.take(4)
  if (version := header.number("<I")) not in (2, 3):
    raise UserError(f"{source}: GGUF version {version} is not supported; supported: 2, 3")
  tensor_count, value_count = header.number("<Q"), header.number("<Q")
  metadata = {}
  for _ in range(value_count):
    key = header.string()
    if key in metadata:
      raise UserError(f"{source}: damaged GGUF header: {key!r} appears twice")
    metadata[key] = header.value()
  entries = {}
  for _ in range(tensor_count):
    name, rank = header.string(), header.number("<I")
    if not 1 <= rank <= 4:
      raise UserError(f"{source}: damaged GGUF header: tensor {name!r} has {rank} dimensions")
    shape = tuple(header.number("<Q") for _ in range(rank))[::-1]
    if name in entries:
      raise UserError(f"{source}: damaged GGUF header: tensor {name!r} appears twice")
    entries[name] = (shape, header.number("<I"), header.number("<Q"))
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise UserError(f"{source}: damaged GGUF header: alignment {alignment!r}")
  start = -(-header.at // alignment) * alignment
  tensors = {}
  known_numbers = {kind.value: kind.name for kind in GGMLQuantizationType}
  for name, (shape, number, offset) in entries.items():
    kind = known_numbers.get(number, f"number {number}")
    if kind not in TENSOR_TYPES:
      known = ", ".join(TENSOR_TYPES)
      raise UserError(f"{source}: tensor {name!r} of type {kind} is not supported; known: {known}")
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if shape[-1] % block or 0 in shape:
      raise UserError(f"{source}: tensor {name!r} of type {kind} cannot have shape {shape}")
    begin, size = start + offset, math.prod(shape) // block * width
    if begin + size > data.size:
      raise UserError(
        f"{source}: truncated or damaged GGUF file: tensor {name!r} ends at byte {begin + size}, "
        f"the file at {data.size}"
      )
    tensors[name] = GgufTensor(kind=kind, shape=shape, data=data[begin : begin + size])
  return metadata, tensors
