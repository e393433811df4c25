"""One example a registered method, for the suite that every method has to pass."""

import dataclasses
from collections.abc import Callable

from a2ats_jax.methods.base import Geometry
from tests import cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """How the shared suite tries a method.

  Attributes:
    options: as a command line writes them after the name, so small that prompts of 30 tokens and
      a few dozen new ones cross every boundary of the method.
    budget: for methods that take one.
    exact: options under which, with budget 1, it equals full attention to ``tolerance``.
    bytes: device and host bytes of the state of a geometry under ``options`` and ``budget``: the
      arithmetic of the method's docstring, with no call into the method.
  """

  options: str = ""
  budget: str = "0.25"
  exact: str = ""
  tolerance: float = cases.TOLERANCE
  bytes: Callable[[Geometry], tuple[int, int]]


def full_bytes(g: Geometry) -> tuple[int, int]:
  return 2 * g.layers * g.batch * g.kv_heads * g.capacity * g.head_dim * 4, 0


def in_rows(slots: int) -> int:
  """Of the index: whole tiles of 8 rows of 128 slots, which whole pages of 4 fill too."""
  return -(-slots // 1024) * 1024


def in_eights(pages: int) -> int:
  """Of the index: places of sorted pages."""
  return -(-pages // 8) * 8


def a2ats_bytes(g: Geometry, cells: int, items: int, cuts: int) -> tuple[int, int]:
  """Pages of 4, window 6 and 2 sinks: a ring of 12; 6 codewords. A number is 4 bytes.

  Args:
    cells: of a KV head. items: of them tokens after the prompt.
    cuts: positions where segments start or end.
  """
  page, ring, sinks, words = 4, 12, 2, 6
  prompt, new = -(-g.prompt // page) * page, -(-g.new // page) * page
  heads = g.layers * g.batch * g.kv_heads
  index = 2 * cells + 2 * in_rows(prompt + new) + 2 * in_eights(prompt // page)
  near = 2 * (sinks + ring) * g.head_dim + ring
  values = words * g.head_dim + words
  device = heads * (index + near + items + values) + g.batch * (cuts + 1)
  return 4 * device, 4 * heads * 2 * (prompt + new) * g.head_dim


def shadowkv_bytes(g: Geometry) -> tuple[int, int]:
  """Rank 6, chunks of 4, 2 outliers, 5 local tokens."""
  p, rank, outliers, local = 4, 6, 2, 5
  chunks, rows = -(-g.prompt // p), g.layers * g.batch
  low = chunks * p * rank + rank * g.kv_heads * g.head_dim
  exact = outliers * p + local + p - 1 + g.new
  heads = g.kv_heads * (chunks * g.head_dim + 2 * exact * g.head_dim + outliers)
  return 4 * (rows * (low + heads) + g.batch), 4 * rows * g.kv_heads * chunks * p * g.head_dim


def kept_bytes(g: Geometry, sizes: list[int], beside: int = 0) -> tuple[int, int]:
  """Slots of all layers, with a position each and ``beside`` bytes of the method's."""
  pool = sum(sizes[:-1]) + max(sizes)
  rows = g.batch * g.kv_heads
  return rows * (pool * (2 * g.head_dim * 4 + 4 + beside) + g.layers * 4), 0


def quarter(tokens: int) -> int:
  return tokens // 4


def think_bytes(g: Geometry) -> tuple[int, int]:
  """3 of 8 channels dropped, window 6."""
  heads, stay = g.layers * g.batch * g.kv_heads, 5
  numbers = g.prompt * stay + stay + (6 + g.new) * g.head_dim + g.capacity * g.head_dim
  return 4 * (heads * numbers + g.batch), 0


def packed(n: int, bits: int, group: int) -> int:
  """Bytes of n numbers, with 2 of float16 a group."""
  return n * bits // 8 + n // group * 4


def kivi_bytes(g: Geometry) -> tuple[int, int]:
  """4 bits, groups of 4, residual 8."""
  slots = -(-g.capacity // 8) * 8
  quantised = packed(slots * g.head_dim, 4, 4) + packed(g.capacity * g.head_dim, 4, 4)
  return g.layers * g.batch * g.kv_heads * (quantised + 2 * 8 * g.head_dim * 4), 0


def qpruning_bytes(g: Geometry) -> tuple[int, int]:
  """4 bits, groups of 8: four times the tokens of a quarter is the prompt."""
  kept = -(-g.prompt // 8) * 8
  a_head = 2 * packed(kept * g.head_dim, 4, 8) + 4 * kept + 2 * g.new * g.head_dim * 4
  return g.layers * g.batch * g.kv_heads * a_head + 4 * g.batch, 0


def adakv_bytes(g: Geometry) -> tuple[int, int]:
  """A byte a slot for its KV head; later tokens stay."""
  slots, later = g.kv_heads * quarter(g.prompt), g.kv_heads * g.new
  numbers = 2 * (slots + later) * g.head_dim
  return g.layers * g.batch * (4 * numbers + slots) + 4 * g.batch, 0


def quest_bytes(g: Geometry) -> tuple[int, int]:
  """Pages of 4."""
  pages = -(-g.capacity // 4)
  return 4 * g.layers * g.batch * g.kv_heads * (2 * 4 + 2) * pages * g.head_dim, 0


def clusterkv_bytes(g: Geometry) -> tuple[int, int]:
  """5 clusters, 2 sinks, 8 later tokens to 2 clusters, pages of 4."""
  prompt, groups = -(-g.prompt // 4) * 4, g.new // 8
  slots, clusters = prompt + 8 * groups, 5 + 2 * groups
  index = 2 * clusters + 2 * in_rows(slots) + 2 * in_eights(prompt // 4)
  a_head = index + clusters * g.head_dim + 2 * (2 + 8) * g.head_dim
  heads = g.layers * g.batch * g.kv_heads
  return 4 * (heads * a_head + g.batch), 4 * heads * 2 * slots * g.head_dim


def actqkv_bytes(g: Geometry) -> tuple[int, int]:
  """Blocks of 4, 2 sinks, 5 local tokens."""
  blocks, near = (g.prompt - 2 - 5) // 4, 2 + 5 + 3 + g.new
  heads = g.layers * g.batch * g.kv_heads
  device = heads * (blocks + 2 * near) * g.head_dim + g.layers * g.batch + g.batch
  return 4 * device, 4 * heads * 2 * 4 * blocks * g.head_dim


def qaq_bytes(g: Geometry) -> tuple[int, int]:
  """3 bits on average, 6 for the newest 3 tokens, 1 outlier each side."""
  bits, most, window, outliers = 3, 6, 3, 2
  planes = (bits * g.capacity + most * window) * g.head_dim // 8
  a_group = 1 + 2 + 2 + outliers * (1 + 2)
  a_head = 2 * planes + g.capacity * (2 * a_group + 2 * window) + 4
  return g.layers * g.batch * g.kv_heads * a_head, 0


def magicpig_bytes(g: Geometry) -> tuple[int, int]:
  """6 tables of 3 bits, 2 sinks, window 6, pages of 4."""
  slots = -(-g.capacity // 4) * 4
  a_head = 2 * 6 * slots + 4 * 2 * (2 + 6) * g.head_dim + 4 * g.head_dim
  heads = g.layers * g.batch * g.kv_heads
  return heads * a_head + 4 * g.head_dim * 6 * 3, 4 * heads * 2 * slots * g.head_dim


_A2ATS = "window=6:sinks=2:page=4"

EXAMPLES: dict[str, Example] = {
  "a2ats": Example(options=_A2ATS, exact=_A2ATS, bytes=lambda g: a2ats_bytes(g, 6, 0, 1)),
  "a2ats-plus": Example(
    options=f"far=segments(4,8):{_A2ATS}",
    exact=f"far=segments(4,8):{_A2ATS}",
    bytes=lambda g: a2ats_bytes(g, 24 + 64, 64, 5),
  ),
  "full": Example(bytes=full_bytes),
  "streaming": Example(
    options="sinks=2", bytes=lambda g: kept_bytes(g, [quarter(g.capacity)] * g.layers)
  ),
  "l2norm": Example(
    options="skip=1",
    bytes=lambda g: kept_bytes(g, [g.capacity] + [quarter(g.prompt) + g.new] * (g.layers - 1)),
  ),
  "snapkv": Example(
    options="window=5:kernel=3",
    bytes=lambda g: kept_bytes(g, [quarter(g.prompt) + g.new] * g.layers),
  ),
  "adakv": Example(options="window=5:kernel=3", bytes=adakv_bytes),
  "h2o": Example(bytes=lambda g: kept_bytes(g, [quarter(g.capacity)] * g.layers, 4)),
  "prefixkv": Example(bytes=lambda g: kept_bytes(g, [quarter(g.capacity)] * g.layers)),
  "corm": Example(
    options="window=8:recent=6",
    exact="window=8:recent=200",
    bytes=lambda g: kept_bytes(g, [quarter(g.capacity)] * g.layers, 1),
  ),
  "think": Example(options="prune=0.4:window=6", exact="prune=0:window=6", bytes=think_bytes),
  "kivi": Example(
    options="bits=4:group=4:residual=8", exact="bits=16:group=4:residual=8", bytes=kivi_bytes
  ),
  "qpruningkv": Example(
    options="bits=4:group=8:window=5:kernel=3",
    exact="bits=16:group=8:window=5:kernel=3",
    bytes=qpruning_bytes,
  ),
  "quest": Example(options="page=4", exact="page=4", bytes=quest_bytes),
  "clusterkv": Example(
    options="clusters=5:sinks=2:every=8:fresh=2:page=4",
    exact="clusters=5:sinks=2:every=8:fresh=2:page=4",
    bytes=clusterkv_bytes,
  ),
  "shadowkv": Example(
    options="rank=6:chunk=4:outliers=2:local=5",
    exact="rank=16:chunk=4:outliers=1:local=3",
    tolerance=1e-4,
    bytes=shadowkv_bytes,
  ),
  "actqkv_style": Example(
    options="block=4:repr=2:sinks=2:local=5:window=6:most=3",
    exact="block=4:repr=2:sinks=2:local=5:window=6:most=3",
    bytes=actqkv_bytes,
  ),
  "qaq": Example(
    options="bits=3:least=1:most=6:window=3:outliers=1:key_error=0.1:value_error=0.01",
    exact="bits=24:least=24:most=24:window=3:outliers=0",
    bytes=qaq_bytes,
  ),
  "magicpig": Example(
    options="tables=6:bits=3:sinks=2:window=6:page=4",
    exact="tables=6:bits=0:sinks=2:window=6:page=4",
    bytes=magicpig_bytes,
  ),
  "oracle": Example(options="window=4:sinks=2", exact="window=4:sinks=2", bytes=full_bytes),
}
