"""Compiled decode steps that carry their state on, and their times and figures in turn."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from a2ats_jax.methods.base import State
from a2ats_jax.sharding import committed
from a2ats_jax.typing import Array
from eval.decode import bytes_of, figures_of
from eval.options import Case
from eval.results import Row
from eval.timing import Tick, interleaved

CALLS = 3  # steps of a variant in a round, the last of them timed: a step follows another
REPEATS = 8  # of a part in its program, as a step is one program too and none of its parts is
Step = Callable[[State, tuple[Array, ...]], tuple[Array, State, Any]]


class Program:
  """A function of fixed arguments, a state and a token, compiled; it uses the state up.

  Attributes:
    temp_bytes: temporary memory; None where the backend does not say.
  """

  def __init__(
    self,
    function: Callable[[Any, State, tuple[Array, ...]], Any],
    fixed: Any,
    state: State,
    token: tuple[Array, ...],
    *,
    donate: bool = True,
  ):
    self._fixed, tree = jax.tree.flatten(fixed)
    states, structure = jax.tree.flatten(state)

    # Of leaves, because lowering puts what are no arrays into the fields of a dataclass.
    def flat(fixed: list[Array], state: list[Array], token: tuple[Array, ...]) -> Any:
      return function(jax.tree.unflatten(tree, fixed), jax.tree.unflatten(structure, state), token)

    jitted = jax.jit(flat, donate_argnums=(1,) if donate else ())
    self._compiled = jitted.lower(self._fixed, states, token).compile()
    analysis = self._compiled.memory_analysis()
    self.temp_bytes: int | None = None if analysis is None else analysis.temp_size_in_bytes

  def __call__(self, state: State, token: tuple[Array, ...]) -> Any:
    return self._compiled(self._fixed, jax.tree.leaves(state), token)


class Lane:
  """A state and the tokens that follow it, shared by the budgets of a method.

  What a method keeps does not depend on the budget, so its budgets take turns with one state: each
  step appends the next token.

  Attributes:
    state: after ``at`` tokens. A step uses it up.
    tokens: what a step takes of each.
    at: tokens appended.
  """

  def __init__(self, state: State, tokens: Sequence[tuple[Array, ...]]):
    self.state, self.tokens, self.at = committed(state), tokens, 0

  @property
  def token(self) -> tuple[Array, ...]:
    """The next one; the last one after the end."""
    return self.tokens[min(self.at, len(self.tokens) - 1)]


class Variant:
  """A method at a budget: its step, compiled, and parts of it that are timed by themselves.

  Attributes:
    case: which.
    lane: its state, which other budgets may share.
    parts: programs by name that leave the state alone, each :data:`REPEATS` times its part.
    temp_bytes: of the step.
    bytes: ``device_bytes`` and ``host_bytes`` of the state and of the method's own arrays.
    stats: of every step so far.
  """

  def __init__(
    self,
    case: Case,
    lane: Lane,
    step: Step,
    *,
    parts: Mapping[str, Callable[[], Any]],
    temp_bytes: int | None,
  ):
    self.case, self.lane, self._step, self.parts = case, lane, step, parts
    self.temp_bytes = temp_bytes
    self.bytes = bytes_of((lane.state, case.method))
    self.stats: list[Any] = []

  @property
  def page(self) -> int:
    """P, tokens a page; 0 for a method without pages."""
    return getattr(self.case.method, "page", 0)

  def step(self) -> tuple[Array, Any]:
    """Append the lane's next token and attend: the output and the new state."""
    lane = self.lane
    if lane.at == len(lane.tokens):
      raise ValueError(f"lane: all of its {lane.at} tokens are used up")
    out, lane.state, stats = self._step(lane.state, lane.token)
    lane.at += 1
    self.stats.append(stats)
    return out, lane.state


def measure(
  variants: Sequence[Variant], *, rounds: int, warmup: int, tick: Tick | None = None
) -> list[Row]:
  """Time variants in turn.

  Returns:
    For every variant: its identity, milliseconds of each
    round (``ms`` of the step, ``NAME_ms`` of each part once), what it read in these rounds, and
    bytes.
  """
  programs: dict[str, Callable[[], Any]] = {}
  for place, variant in enumerate(variants):
    programs[f"{place} ms"] = variant.step
    programs |= {f"{place} {name}_ms": part for name, part in variant.parts.items()}
  times = interleaved(programs, rounds=rounds, warmup=warmup, calls=CALLS, tick=tick)
  rows = []
  for place, variant in enumerate(variants):
    row: Row = {"ms": times[f"{place} ms"].tolist()}
    for name in variant.parts:
      row[f"{name}_ms"] = (times[f"{place} {name}_ms"] / REPEATS).tolist()
    row |= _read(variant, rounds) | variant.bytes | {"temp_bytes": variant.temp_bytes}
    rows.append(variant.case.identity | row)
  return rows


def _read(variant: Variant, rounds: int) -> Row:
  """What the last steps read, means over them.

  ``read`` and ``selected`` are shares of the cache. ``moved_bytes`` is what the whole step copies
  out of a store of pages. ``pages`` is of one KV head, and ``fetched`` the tokens in these pages
  over those chosen.
  """
  steps = [figures_of(stats) for stats in variant.stats[-CALLS * rounds :]]
  if not {"length", "selected", "read", "moved"} <= steps[0].keys():
    return {}
  every = {name: np.stack([step[name] for step in steps]).astype(np.float64) for name in steps[0]}
  length, selected = every["length"][..., None], every["selected"]
  out: Row = {
    "read": float((every["read"] / length).mean()),
    "selected": float((selected / length).mean()),
    "moved_bytes": float(every["moved"].sum() / len(steps)),
  }
  if "pages" in every:
    out["pages"] = float(every["pages"].mean())
    fetched = every["pages"].sum() * variant.page
    out["fetched"] = float(fetched / max(selected.sum(), 1.0))
  if "dropped" in every:
    out["dropped"] = float(every["dropped"].mean())
  return out
