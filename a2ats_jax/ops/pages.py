"""Pages on the device, as a store's memory keeps them: floats, or the bytes that a TPU copies."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Int8

from a2ats_jax.ops.tiles import PageFormat
from a2ats_jax.typing import Array, Float


class FloatPages(NamedTuple):
  """Keys and values, each contiguous by itself."""

  keys: Float[Array, "B K F P D"]
  values: Float[Array, "B K F P D"]


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["form"])
@dataclasses.dataclass(frozen=True)
class BytePages:
  """Keys and values of a page in one block of bytes; unpacked where they are asked for.

  Attributes:
    data: F pages of every row and KV head.
    form: what the bytes of a page are.
  """

  data: Int8[Array, "B K F R 128"]
  form: PageFormat

  @property
  def keys(self) -> Float[Array, "B K F P D"]:
    """Keys, bit for bit those that were packed."""
    return self.form.unpack(self.data)[0]

  @property
  def values(self) -> Float[Array, "B K F P D"]:
    """Values, bit for bit those that were packed."""
    return self.form.unpack(self.data)[1]

  def __iter__(self) -> Iterator[Array]:
    """Keys, then values, as of :class:`FloatPages`."""
    return iter(self.form.unpack(self.data))


Pages = FloatPages | BytePages
