"""What a decode step keeps, moves and costs at best on a chip, by arithmetic alone.

No array is made and no weight is read: every figure is a formula over a model's shape, a context
and a method's options, written out below so that a reader can follow it. The bytes that a state
keeps are exact; temporary memory follows what XLA's CPU backend allocates for the compiled step,
but for a float32 copy of the output head that it makes for a single row of bfloat16; the times are
bounds from nominal rates, which no program beats and none reaches.

A letter is a dimension as everywhere: B batch, L layers (of a cache: the global ones), H query
heads, K KV heads, D head size, C codewords, P tokens a page.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from a2ats_jax import quantise
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import MAX_CODEWORDS
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.index import Order, places_of, rows_of
from a2ats_jax.methods import registry
from a2ats_jax.methods.a2ats import A2ATS, ring_of
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.paging import Stage, needed, stage_of
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.ops.tiles import LANES
from a2ats_jax.plan_known import Chip
from a2ats_jax.store import Placement

F32 = I32 = 4  # bytes of a float32 and of an int32
ITEM_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float32": 4})
MOST_ROWS = 1 << 20  # no larger batch is looked for
MOST_TOKENS = 1 << 24
WINDOWS = "windows of local layers"

Parts = Mapping[str, int]  # bytes by what they hold


# --- what is asked --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A model with a batch of prompts, all equally long, at the first token after them.

  Attributes:
    batch: B. prompt: T, tokens of each row. new: tokens each row has room for after that.
    dtype: of weights and activations. cache_dtype: of keys and values.
  """

  config: ModelConfig
  batch: int
  prompt: int
  new: int
  dtype: str = "bfloat16"
  cache_dtype: str = "bfloat16"

  def __post_init__(self):
    if self.batch < 1 or self.prompt < 1 or self.new < 0:
      raise UserError(
        "plan: expected a batch and a prompt of at least 1 and 0 or more new tokens, got "
        f"{self.batch}, {self.prompt} and {self.new}"
      )
    if self.prompt + self.new >= MOST_TOKENS:
      raise UserError(
        f"plan: expected fewer than {MOST_TOKENS} tokens a row, which is what an index counts, got "
        f"{self.prompt + self.new}"
      )
    for name in (self.dtype, self.cache_dtype):
      if name not in ITEM_BYTES:
        raise UserError(f"plan: unknown dtype {name!r}; known: {', '.join(ITEM_BYTES)}")

  @property
  def size(self) -> int:
    """Bytes of a weight."""
    return ITEM_BYTES[self.dtype]

  @property
  def cache_size(self) -> int:
    """Bytes of a cached number."""
    return ITEM_BYTES[self.cache_dtype]

  @property
  def kv_rows(self) -> int:
    """L B K: how many keys (and values) a token adds, over all global layers and rows."""
    return self.config.global_layers * self.batch * self.config.kv_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
  """Options of :class:`a2ats_jax.methods.a2ats.A2ATS`, without its codebooks.

  Attributes:
    codewords: C.
    union: tokens a KV head reads per token granted to a query head, at most G and, for a budget
      per KV head, 1.
    spread: tokens in the pages fetched per token chosen.
    The others are the method's.
  """

  budget: Budget
  codewords: int
  far: FarPosition
  tail: Literal["none", "centroid"]
  page: int = A2ATS.page
  window: int = A2ATS.window
  sinks: int = A2ATS.sinks
  fetch: int = A2ATS.fetch
  stage: int = A2ATS.stage
  order: Order = A2ATS.order
  placement: Placement = A2ATS.placement
  bits: int = A2ATS.bits
  union: float = 2.0
  spread: float = 2.0

  def __post_init__(self):
    if not 1 <= self.codewords <= MAX_CODEWORDS:
      raise UserError(f"plan: expected 1 to {MAX_CODEWORDS} codewords, got {self.codewords}")
    if not (1 <= self.union < math.inf and 1 <= self.spread < math.inf):
      raise UserError(
        f"plan: union and spread must be at least 1, got {self.union} and {self.spread}"
      )
    if min(self.page, self.window, self.stage) < 1:
      raise UserError(
        "plan: page and window must be at least 1 token and stage at least 1 byte, got "
        f"{self.page}, {self.window} and {self.stage}"
      )

  @property
  def host(self) -> bool:
    """Whether the pages lie in host memory; ``auto`` is taken to find some."""
    return self.placement != "device"


def read_method(
  text: str, *, budget: Budget, codewords: int, union: float = 2.0, spread: float = 2.0
) -> tuple[registry.MethodSpec, Paged | None]:
  """A method as the registry writes it, and its options; None for full attention.

  Raises:
    UserError: as :func:`a2ats_jax.methods.registry.parse_method`; also a method whose whole cache
      stays on the device although it selects (the references), which nobody serves with.
  """
  spec = registry.parse_method(text)
  entry = registry.METHODS[spec.name]
  if entry.build is Full:
    return spec, None
  if entry.build is not A2ATS:
    planned = [name for name, entry in registry.METHODS.items() if entry.build in (Full, A2ATS)]
    raise UserError(
      f"plan: {spec.name} keeps the whole cache on the device, to compare with; known here: "
      f"{', '.join(planned)}"
    )
  options = {key: entry.options[key].read(value) for key, value in spec.options}
  options.pop("book", None)
  numbers: dict[str, Any] = {
    "budget": budget,
    "codewords": codewords,
    "union": union,
    "spread": spread,
  }
  return spec, Paged(**numbers, **options)


# --- bytes kept -----------------------------------------------------------------------------------


def weights(case: Case) -> dict[str, int]:
  """Bytes of the decoder's weights."""
  c, (attention, mlp) = case.config, _linear_numbers(case.config)
  norms = (2 * (1 + c.post_norms) * c.width + 2 * c.head_dim * c.qk_norm) * c.layers + c.width
  table = c.vocab * c.width
  parts = {
    "embedding": table,
    "layers": c.layers * (sum(attention) + mlp) + norms,
    "output head": 0 if c.tied else table,
  }
  return {name: numbers * case.size for name, numbers in parts.items()}


def _linear_numbers(c: ModelConfig) -> tuple[tuple[int, int], int]:
  """Numbers of a layer's linear maps, biases too: before attention, after it, and of the MLP."""
  q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
  before = c.width * (q + 2 * kv) + (q + 2 * kv) * c.qkv_bias
  after = q * c.width + c.width * c.out_bias
  mlp = 3 * c.width * c.mlp_width + (2 * c.mlp_width + c.width) * c.mlp_bias
  return (before, after), mlp


def full_state(case: Case) -> dict[str, int]:
  """Bytes that full attention keeps: ``2 L B K (T + new) D`` numbers."""
  slots = case.prompt + case.new
  return {
    "keys and values": 2 * case.kv_rows * slots * case.config.head_dim * case.cache_size,
    **local_state(case),
  }


def local_state(case: Case) -> dict[str, int]:
  """Bytes of the windows of local layers, where there are any."""
  c = case.config
  if c.local is None:
    return {}
  slots = c.local_layers * case.batch * c.kv_heads * c.local.window
  return {WINDOWS: 2 * slots * c.head_dim * case.cache_size}


def _whole(tokens: int, page: int) -> int:
  return -(-tokens // page) * page


def _slots(case: Case, m: Paged) -> tuple[int, int]:
  """Slots for the prompt's tokens, and for those after it; whole pages each."""
  return _whole(case.prompt, m.page), _whole(case.new, m.page)


def _cells(case: Case, m: Paged) -> int:
  return m.far.cells(m.window, case.new, m.codewords)


def page_bytes(case: Case, m: Paged) -> int:
  """Bytes of a page: keys and values of P tokens of one KV head."""
  d = case.config.head_dim
  group = 32 if d % 32 == 0 else d
  return 2 * m.page * quantise.bytes_of(d, bits=m.bits, group=group, itemsize=case.cache_size)


def pages(case: Case, m: Paged) -> int:
  """Bytes of all pages, the prompt's and those of later tokens."""
  return case.kv_rows * (sum(_slots(case, m)) // m.page) * page_bytes(case, m)


def paged_state(case: Case, m: Paged) -> dict[str, int]:
  """Bytes that A2ATS keeps on the device beside its pages."""
  d, prompt = case.config.head_dim, _slots(case, m)[0]
  sorted_pages = prompt // m.page if m.order == "cell" else 0
  cuts = 1 if m.far.distance is not None else m.far.prompt_segments + 1
  a_head = {
    "counts and first pages of cells": 2 * _cells(case, m) * I32,
    "cell and rank of every slot": 2 * rows_of(sum(_slots(case, m)), m.page) * LANES * I32,
    "page edges": 2 * places_of(sorted_pages) * I32,
    "sinks and recent tokens": 2 * (m.sinks + ring_of(m.window, m.page)) * d * case.cache_size
    + ring_of(m.window, m.page) * I32,
    "codes of later tokens": m.far.items(m.window, case.new) * I32,
    "value sums of codewords": m.codewords * (d + 1) * F32,
  }
  parts = {name: case.kv_rows * size for name, size in a_head.items()}
  return parts | {"row tables": case.batch * (cuts + 1) * I32} | local_state(case)


def codebooks(case: Case, m: Paged) -> int:
  """Bytes of the codebooks, one for all rows: codewords plain and whitened, offsets, whitener."""
  c = case.config
  numbers = (2 * m.codewords + c.head_dim) * c.head_dim + m.codewords
  return c.global_layers * c.kv_heads * numbers * F32


# --- temporary memory -----------------------------------------------------------------------------


def full_temporary(case: Case) -> int:
  """Temporary bytes of a step of full attention.

  The step is a loop over layers that slices out what a layer reads: its cache, and the weights used
  after attention, which are sliced early. Beside them lie the logits of all slots.
  """
  c, slots = case.config, case.prompt + case.new
  cache = 2 * case.batch * c.kv_heads * slots * c.head_dim * case.cache_size
  return _late_weights(case) + cache + case.batch * c.heads * slots * F32


def paged_temporary(case: Case, m: Paged) -> int:
  """Temporary bytes of a step of A2ATS: what the largest of three phases needs.

  Beside a layer's late weights (:func:`full_temporary`) these are, in turn: encoding the new key,
  with the layer's codebooks and early weights; choosing, with some copies of the score table; and
  fetching, with the stage buffer.
  """
  c, b = case.config, case.batch
  (early, _), _ = _linear_numbers(c)
  encoding = codebooks(case, m) // c.global_layers + early * case.size
  table = b * c.heads * _cells(case, m) * F32
  # The cut holds scores, their integer form, what is counted and the result: of query heads, or of
  # KV heads beside the scores of query heads and those of segments that they are joined from.
  tables = 4 * table if m.budget.per == "query_head" else 2 * table + 4 * table // c.group
  near = 2 * b * c.kv_heads * (m.sinks + ring_of(m.window, m.page)) * c.head_dim * case.cache_size
  words = b * c.kv_heads * m.far.items(m.window, case.new) * c.head_dim * F32
  sums = b * c.kv_heads * m.codewords * c.head_dim * F32 if m.tail == "centroid" else 0
  choosing = tables + near + words + sums + _unsorted(case, m) // c.global_layers
  stage = _stage(case, m)
  fetched = stage.blocks * stage.size
  # The buffer, logits and weights of its tokens, and what is taken of each cell, block by block.
  fetching = fetched * (page_bytes(case, m) + 2 * c.group * m.page * F32)
  fetching += stage.blocks * _cells(case, m) * I32 + table
  return _late_weights(case) + max(encoding, choosing, fetching)


def _late_weights(case: Case) -> int:
  """Bytes of a layer's weights used after attention: output projection and MLP."""
  (_, after), mlp = _linear_numbers(case.config)
  return (after + mlp) * case.size


def _stage(case: Case, m: Paged) -> Stage:
  """What is fetched at once, as the method says."""
  granted = int(m.budget.resolve(case.prompt + case.new).max())
  return stage_of(
    needed(granted, m.budget.per, page=m.page),
    heads=case.batch * case.config.kv_heads,
    pages=sum(_slots(case, m)) // m.page,
    most=m.stage // page_bytes(case, m),
  )


def _unsorted(case: Case, m: Paged) -> int:
  """Bytes of cells and ranks in the pages that are looked at slot by slot."""
  prompt, later = _slots(case, m)
  return case.kv_rows * 2 * (later if m.order == "cell" else prompt + later) * I32


# --- a step ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """What a KV head reads in a step, on average, and what a layer fetches.

  Attributes:
    tokens: far tokens chosen. pages: that hold them.
    moved: pages fetched, in stages and quarters of one, of all rows and KV heads of a layer.
  """

  tokens: float
  pages: int
  moved: int


def shared(case: Case, m: Paged) -> float:
  """Tokens that a KV head reads per token granted: the assumed union, where a group has one."""
  return min(m.union, float(case.config.group)) if m.budget.per == "query_head" else 1.0


def chosen(case: Case, m: Paged) -> Chosen:
  """Tokens granted, times the union over a group, times the spread over pages.

  At the first token after the prompt: ``T + 1`` tokens are cached, of which sinks and window are
  not far. The step moves whole blocks, in stages and quarters of one; rows and heads are taken to
  need the same.
  """
  length = case.prompt + 1
  eligible = max(length - m.sinks - m.window, 0)
  granted = int(m.budget.resolve(length)[length])
  tokens = min(granted * shared(case, m), float(eligible))
  held = _slots(case, m)[0] // m.page
  count = min(math.ceil(tokens * m.spread / m.page), held)
  count = min(count, m.fetch) if m.fetch else count
  stage = _stage(case, m)
  blocks = case.batch * case.config.kv_heads * -(-count // stage.size)
  return Chosen(tokens=tokens, pages=count, moved=stage.moved(blocks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """What a method keeps and does in a decode step of a case.

  Attributes:
    device: bytes on the device by part, all but temporary ones.
    temporary: bytes that a step needs beside them, with its output.
    host: bytes in host memory.
    traffic: bytes that a step reads and writes in device memory, by part.
    moved: bytes that a step copies from the host.
    flops: multiplications and additions of a step.
    read: tokens that a KV head attends exactly, as a share of those cached.
  """

  device: Parts
  temporary: int
  host: int
  traffic: Parts
  moved: int
  flops: int
  read: float

  @property
  def device_bytes(self) -> int:
    """All of the device, temporary memory with it."""
    return sum(self.device.values()) + self.temporary

  def device_seconds(self, chip: Chip) -> float:
    """The longer of a step's memory traffic and its operations, which overlap."""
    return max(sum(self.traffic.values()) / chip.memory_rate, self.flops / chip.flops)

  def seconds(self, chip: Chip) -> float:
    """A step's bound as the step is: a layer's pages are asked for when its scores are known, and
    nothing else runs until they are there, so that the host link adds to the rest."""
    return self.device_seconds(chip) + self.moved / chip.link_rate

  def ideal_seconds(self, chip: Chip) -> float:
    """A step's bound if every copy from the host overlapped with something else."""
    return max(self.device_seconds(chip), self.moved / chip.link_rate)


def estimate(case: Case, method: Paged | None) -> Estimate:
  """A decode step of one token a row under A2ATS, or full attention for None."""
  return _full(case) if method is None else _paged(case, method)


def kept(case: Case, m: Paged | None) -> tuple[dict[str, int], int, int]:
  """Bytes on the device by part, temporary ones of a step with its output, and on the host."""
  device = {"weights": sum(weights(case).values())}
  output = case.batch * case.config.vocab * F32
  if m is None:
    return device | full_state(case), full_temporary(case) + output, 0
  device |= {"codebooks": codebooks(case, m)} | paged_state(case, m)
  stored = pages(case, m)
  if not m.host:
    device["pages"] = stored
  return device, paged_temporary(case, m) + output, stored if m.host else 0


def _linear(case: Case) -> tuple[dict[str, int], int]:
  """Traffic and operations of the linear maps."""
  c, held = case.config, weights(case)
  attention, mlp = _linear_numbers(c)
  rows = case.batch * c.width * case.size  # of the embedding table, where a head does not read it
  read = held["layers"] + (held["embedding"] if c.tied else held["output head"] + rows)
  flops = 2 * case.batch * (c.layers * (sum(attention) + mlp) + c.vocab * c.width)
  if c.local is not None:
    flops += 4 * c.local_layers * case.batch * c.heads * c.local.window * c.head_dim
  return {"weights": read}, flops


def _full(case: Case) -> Estimate:
  c, slots = case.config, case.prompt + case.new
  device, temporary, host = kept(case, None)
  traffic, flops = _linear(case)
  return Estimate(
    device=device,
    temporary=temporary,
    host=host,
    traffic=traffic | full_state(case),  # every slot is read, those still empty too
    moved=0,
    flops=flops + 4 * c.global_layers * case.batch * c.heads * slots * c.head_dim,
    read=1.0,
  )


def _paged(case: Case, m: Paged) -> Estimate:
  c, d = case.config, case.config.head_dim
  device, temporary, host = kept(case, m)
  traffic, flops = _linear(case)
  state, far = paged_state(case, m), chosen(case, m)
  fetched = c.global_layers * far.moved * page_bytes(case, m)
  tail = m.tail == "centroid"
  traffic |= {
    "codebooks": codebooks(case, m),
    "index": state["counts and first pages of cells"]
    + state["page edges"]
    + state["codes of later tokens"]
    + _unsorted(case, m)
    + c.global_layers * far.moved * 2 * m.page * I32,
    "score tables": 2 * c.global_layers * case.batch * c.heads * _cells(case, m) * F32,
    "sinks and recent tokens": state["sinks and recent tokens"],
    **local_state(case),
    "value sums of codewords": state["value sums of codewords"] if tail else 0,
    # Into the stage buffer and out of it; out of the device's own pages first, if they lie there.
    "fetched pages": (2 if m.host else 3) * fetched,
  }
  heads = c.global_layers * case.batch * c.heads
  # A fetched page is attended whole, masked.
  attended = c.global_layers * c.group * far.moved * m.page
  attended += heads * (m.sinks + ring_of(m.window, m.page))
  flops += heads * 2 * _cells(case, m) * d + 4 * attended * d
  flops += heads * 2 * m.codewords * d * tail
  flops += case.kv_rows * 2 * (d + m.codewords) * d  # the new key's code
  length = case.prompt + 1
  return Estimate(
    device=device,
    temporary=temporary,
    host=host,
    traffic=traffic,
    moved=fetched if m.host else 0,
    flops=flops,
    read=min((far.tokens + m.sinks + m.window) / length, 1.0),
  )


def prefill_bytes(case: Case) -> int:
  """Bytes that running all prompts at once needs beside weights and state, at least.

  The hidden states, and one layer's keys (before and after rotary embedding) and values, all rows
  over their whole length.
  """
  c = case.config
  return case.batch * case.prompt * (c.width + 3 * c.kv_heads * c.head_dim) * case.size


def largest_batch(case: Case, method: Paged | None, chip: Chip, host: float = math.inf) -> int:
  """The most rows whose decode step fits the chip's memory; 0 where not even one does.

  Args:
    host: bytes of host memory.
  """

  def fits(batch: int) -> bool:
    device, temporary, stored = kept(dataclasses.replace(case, batch=batch), method)
    return sum(device.values()) + temporary <= chip.memory and stored <= host

  return _most(fits)


def _most(fits: Callable[[int], bool]) -> int:
  """The largest number that fits, of those from 1 on, all smaller ones fitting too."""
  if not fits(1):
    return 0
  low = 1
  while low < MOST_ROWS and fits(2 * low):
    low *= 2
  high = 2 * low
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low
