"""Times of several programs in one process, taken in turn."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from a2ats_jax.typing import Float

Tick = Callable[[int, int], None]  # (rounds done, of)


def interleaved(
  programs: Mapping[str, Callable[[], object]],
  *,
  rounds: int,
  warmup: int,
  calls: int = 1,
  tick: Tick | None = None,
) -> dict[str, Float[np.ndarray, "rounds"]]:
  """Milliseconds of every program in every round, what it returns being ready on the device.

  Every second round takes the programs in the opposite order, so that what disturbs the machine for
  a while disturbs all of them, and none always follows the same one.

  Args:
    programs: called without arguments; a program that carries a state keeps it itself.
    rounds: timed.
    warmup: rounds before them, left out.
    calls: of each program in a row in a round, the last one timed. With two, what the program
      before it freed is given back to the system while the first one runs (docs/performance.md).
    tick: called after every round.
  """
  times: dict[str, list[float]] = {name: [] for name in programs}
  for turn in range(warmup + rounds):
    for name in list(programs)[:: -1 if turn % 2 else 1]:
      for _ in range(calls - 1):
        jax.block_until_ready(programs[name]())
      began = time.perf_counter()
      jax.block_until_ready(programs[name]())
      taken = time.perf_counter() - began
      if turn >= warmup:
        times[name].append(1e3 * taken)
    if tick is not None:
      tick(turn + 1, warmup + rounds)
  return {name: np.asarray(taken) for name, taken in times.items()}


def summary(times: Float[np.ndarray, "rounds"], prefix: str = "") -> dict[str, float]:
  """``ms``, the median, and ``ms_low`` and ``ms_high``, the quartiles."""
  low, middle, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
  return {f"{prefix}ms": middle, f"{prefix}ms_low": low, f"{prefix}ms_high": high}
