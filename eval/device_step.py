"""Decode steps of a whole model with random weights and a drawn cache, at the largest batch.

The cache of every layer and row is one drawn prompt (:mod:`eval.speed_inputs`): no prompt is run,
so that a batch may be as large as decoding allows. Weights and the tokens that follow are random.
Full attention and A2ATS run one after the other, as the two do not fit beside each other.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from a2ats_jax import plan, store
from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.generate import decode_step
from a2ats_jax.methods import registry
from a2ats_jax.methods.base import Geometry, Method, State
from a2ats_jax.methods.layout import layout
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.models.decoder import Decoder
from a2ats_jax.plan_known import Chip, find_model
from a2ats_jax.rope import make_rope
from a2ats_jax.typing import Array, Float
from eval import tune
from eval.kernels import LayerCase, said
from eval.lanes import CALLS, Lane, Program, Variant, measure
from eval.options import Case, Progress
from eval.results import Row
from eval.speed_attention import absorb
from eval.speed_inputs import LayerShape, draw
from eval.timing import summary

WARMUP = 2  # rounds left out
_TRACED = 3  # steps in a trace
_TRIES = 5  # batches tried until one fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
  """What is run.

  Attributes:
    config: the model's shape.
    method: beside full attention, as the registry spells it.
    budget: of the method. codewords: of each of its codebooks.
    T: prompt lengths, tokens.
    batch: rows; empty is 1 and the largest that the plan holds possible.
    dtype: of weights, activations and cache.
    rounds: timed steps.
    seed: of everything that is drawn.
    trace: directory for a profile of a few more steps of the method, or None.
  """

  config: ModelConfig
  method: str
  budget: Budget
  codewords: int
  T: tuple[int, ...]
  batch: tuple[int, ...]
  dtype: str
  rounds: int
  seed: int
  trace: Path | None

  def __post_init__(self):
    if min(self.T, default=0) < 2 or min(self.batch, default=1) < 1 or self.rounds < 1:
      raise UserError(
        "device: expected prompts of at least 2 tokens, batches and rounds of at least 1, got "
        f"{self.T}, {self.batch} and {self.rounds}"
      )
    if self.config.local is not None:
      raise UserError("device: models with local layers (Gemma 3) cannot be timed yet")

  @property
  def new(self) -> int:
    """Tokens after the prompt."""
    return (WARMUP + self.rounds) * CALLS + _TRACED


def small(options: StepOptions) -> StepOptions:
  """The same at the smallest shapes, which a CPU runs in seconds."""
  config = find_model(
    "custom", layers=2, heads=4, kv_heads=2, head_dim=64, width=64, mlp_width=96, vocab=128
  )
  return dataclasses.replace(
    options,
    config=config,
    budget=Budget(tokens=32, per="kv_head"),
    codewords=16,
    T=(256,),
    batch=(2,),
    dtype="float32",
    rounds=2,
  )


def layer_of(options: StepOptions) -> LayerCase:
  """The layer that a step at the longest prompt has, one row."""
  _, paged = plan.read_method(options.method, budget=options.budget, codewords=options.codewords)
  return tune.layer_of(
    options.config,
    T=max(options.T),
    new=options.new,
    batch=1,
    page=plan.Paged.page if paged is None else paged.page,
    budget=options.budget,
    codewords=options.codewords,
    dtype=options.dtype,
  )


def chip_of(memory: int | None, rates: Mapping[str, float]) -> Chip:
  """The device as measured, for the arithmetic of :mod:`a2ats_jax.plan`.

  Args:
    memory: bytes; None where the device does not say.
    rates: of the plain copies, 10^9 bytes a second.
  """
  return Chip(
    memory=float("inf" if memory is None else memory),
    memory_rate=1e9 * rates["device to device"],
    link_rate=1e9 * rates.get("host to device", float("inf")),
    flops=float("inf"),
    source="measured copies; operations are taken to cost nothing",
    link="measured",
  )


def random_decoder(config: ModelConfig, dtype: str, seed: int) -> Decoder:
  """A decoder with random weights, made on the device.

  Raises:
    UserError: they do not fit.
  """
  graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(seed))))

  def weights() -> Any:
    _, state = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))
    return jax.tree.map(lambda x: x.astype(dtype), state)

  try:
    return nnx.merge(graph, jax.block_until_ready(jax.jit(weights)()))
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"device: the weights do not fit, try --layers: {said(error)}") from None


def run(options: StepOptions, chip: Chip, *, progress: Progress | None = None) -> list[Row]:
  """Time decode steps at every length, of full attention and of the method.

  Returns:
    A row a method, length and batch: ``ms`` of a step with quartiles, ``tokens_per_s``, ``plan_ms``
    (the least by the measured copies), bytes moved and held, ``temp_bytes`` of the program, and
    ``ratio`` to the tokens a second of full attention at its best batch; or ``problem`` where a
    batch does not run.
  """
  decoder = random_decoder(options.config, options.dtype, options.seed)
  rows: list[Row] = []
  for place, T in enumerate(options.T):
    drawn = _drawn(options, T)
    here: list[Row] = []
    for which, text in enumerate(dict.fromkeys(("full", options.method))):
      made = _Made(options, decoder, drawn, T, text, chip)
      here += [row for batch in options.batch or (1,) for row in [made.row(batch)]]
      if not options.batch:
        here += largest_that_runs(made.most(), made.row)
      if progress is not None:
        progress("steps", 2 * place + which + 1, 2 * len(options.T))
    best = max((row["tokens_per_s"] for row in here if _is_full(row)), default=None)
    rows += [row if _is_full(row) else row | _ratio(row, best) for row in here]
  return rows


def _is_full(row: Row) -> bool:
  return row["method"] == "full" and "tokens_per_s" in row


def _ratio(row: Row, best: float | None) -> Row:
  if best is None or "tokens_per_s" not in row:
    return {}
  return {"ratio": row["tokens_per_s"] / best}


def largest_that_runs(first: int, run: Callable[[int], Row]) -> list[Row]:
  """Rows of ever smaller batches, three quarters each time, until one runs; 1 is not repeated."""
  rows, batch = [], first
  for _ in range(_TRIES):
    if batch <= 1:
      break
    rows.append(run(batch))
    if "problem" not in rows[-1]:
      break
    batch = batch * 3 // 4
  return rows


def _drawn(options: StepOptions, T: int) -> tuple[Codebook, Array, Array]:
  """Codebooks of one layer, and the keys and values of a prompt."""
  c = options.config
  shape = LayerShape(
    heads=c.heads, kv_heads=c.kv_heads, head_dim=c.head_dim, codewords=options.codewords
  )
  drawn = draw(shape, T=T, new=1, seed=options.seed, dtype=jnp.dtype(options.dtype))
  return drawn.book, drawn.keys, drawn.values


class _Made:
  """A method after a prompt of T tokens, to be run at several batches."""

  def __init__(
    self,
    options: StepOptions,
    decoder: Decoder,
    drawn: tuple[Codebook, Float[Array, "1 T K D"], Float[Array, "1 T K D"]],
    T: int,
    text: str,
    chip: Chip,
  ):
    self.options, self.decoder, self.drawn, self.T, self.chip = options, decoder, drawn, T, chip
    numbers: dict[str, Any] = {"budget": options.budget, "codewords": options.codewords}
    self.spec, self.paged = plan.read_method(text, **numbers)

  def method(self, layers: int) -> Method:
    """With the drawn codebooks in every layer."""
    book = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape[1:])), self.drawn[0])
    budget = None if self.paged is None else self.options.budget
    name = dict(self.spec.options).get("book", registry.DEFAULT_BOOK)
    return registry.build(self.spec, budget=budget, codebooks={name: book})

  def case(self, batch: int) -> plan.Case:
    o = self.options
    return plan.Case(
      config=o.config,
      batch=batch,
      prompt=self.T,
      new=o.new,
      dtype=o.dtype,
      cache_dtype=o.dtype,
    )

  def most(self) -> int:
    """The largest batch by arithmetic: memory of the device, and half of the host's.

    Filling the cache holds its host part twice.
    """
    if self.chip.memory == float("inf"):
      return 0
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return plan.largest_batch(self.case(1), self.paged, self.chip, host)

  def row(self, batch: int) -> Row:
    """One batch; a device that has no room for it is a result."""
    o, case = self.options, self.case(batch)
    row: Row = {"benchmark": "device", "what": "step", "method": self.spec.name}
    row |= {"options": self.spec.options_text, "T": self.T, "batch": batch, "dtype": o.dtype}
    row |= {"layers": o.config.layers, "budget": None if self.paged is None else str(o.budget)}
    try:
      row |= self.timed(batch)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
      return row | {"problem": said(error)}
    row["tokens_per_s"] = 1e3 * batch / row["ms"]
    return row | {"plan_ms": 1e3 * plan.estimate(case, self.paged).seconds(self.chip)}

  def timed(self, batch: int) -> Row:
    o, c = self.options, self.options.config
    method = self.method(c.layers)
    rng = np.random.default_rng([o.seed, 2])
    tokens = [
      (
        jnp.asarray(rng.integers(0, c.vocab, (batch, 1)), jnp.int32),
        jnp.full((batch, 1), self.T + i, jnp.int32),
      )
      for i in range(o.new)
    ]
    lane = Lane(self.state(method, batch), tokens)
    step = Program(_decode, (self.decoder, method), lane.state, lane.token)
    what = Case(spec=self.spec, budget=None, method=method)
    variant = Variant(what, lane, step, parts={}, temp_bytes=step.temp_bytes)
    (row,) = measure([variant], rounds=o.rounds, warmup=WARMUP)
    if o.trace is not None and self.paged is not None:
      with jax.profiler.trace(str(o.trace / f"T{self.T}-batch{batch}")):
        for _ in range(_TRACED):
          jax.block_until_ready(variant.step())
    names = ("moved_bytes", "device_bytes", "host_bytes", "temp_bytes")
    return summary(np.asarray(row["ms"])) | {name: row.get(name) for name in names}

  def state(self, method: Method, batch: int) -> State:
    """The cache: one row of one layer, copied to all."""
    _, keys, values = self.drawn
    c = self.options.config
    alone = Geometry(
      batch=1,
      layers=1,
      heads=c.heads,
      kv_heads=c.kv_heads,
      head_dim=c.head_dim,
      prompt=self.T,
      new=self.options.new,
      dtype=jnp.dtype(self.options.dtype),
    )
    one = absorb(self.method(1), keys, values, make_rope(c.rope), geometry=alone)
    whole = dataclasses.replace(alone, batch=batch, layers=c.layers)
    leaves, structure = layout(method, whole)
    wide = [
      _widened(x, leaf.shape, leaf.host)
      for x, leaf in zip(jax.tree.leaves(one), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, wide)


def _widened(x: Array, shape: Sequence[int], host: bool) -> Array:
  """An array repeated along its axes of one, in memory of its own, where it was."""
  if host:
    return store.put(np.broadcast_to(np.asarray(x), shape), host=True)
  return jnp.copy(jnp.broadcast_to(x, shape))


def _decode(
  fixed: tuple[Decoder, Method], state: State, token: tuple[Array, ...]
) -> tuple[Array, State, Any]:
  return decode_step(*fixed, state, *token)
