"""Checkpoints of one training phase."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from a2ats_jax.errors import UserError

_KEEP = 2


class Checkpoints:
  """The last two states of a phase. Use :func:`checkpoints`.

  A state is a tree of NumPy arrays, so it may be restored on another number of devices. Orbax
  writes beside and renames: a save that was cut off does not exist.
  """

  def __init__(self, manager: ocp.CheckpointManager):
    self._manager = manager

  def save(self, step: int, state: Any) -> None:
    """Keep the state after ``step`` steps; saving a step again does nothing."""
    if self._manager.latest_step() != step:
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, like: Any) -> tuple[int, Any]:
    """The newest step and state; ``0`` and ``like`` itself where there is none.

    Args:
      like: a state of the same structure and shapes.

    Raises:
      UserError: it cannot be read.
    """
    step = self._manager.latest_step()
    if step is None:
      return 0, like
    try:
      state = self._manager.restore(step, args=ocp.args.StandardRestore(like))
    except Exception as e:  # orbax and what lies below it raise many kinds
      raise UserError(
        f"{self._manager.directory}: step {step} is damaged; remove the directory to start the "
        "phase over"
      ) from e
    return step, _writable(state)


def _writable(tree: Any) -> Any:
  return jax.tree.map(np.array, tree)


@contextmanager
def checkpoints(directory: Path) -> Iterator[Checkpoints]:
  """Open the checkpoints of a phase, made if need be, and release them afterwards."""
  directory.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=_KEEP, enable_async_checkpointing=False, cleanup_tmp_directories=True
  )
  with ocp.CheckpointManager(directory.resolve(), options=options) as manager:
    yield Checkpoints(manager)
