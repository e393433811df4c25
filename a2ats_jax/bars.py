"""Progress of long runs, on stderr."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TaskID,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

_SECONDS = 20.0  # between lines that are not on a terminal


def _figures(figures: dict[str, float]) -> list[str]:
  return [f"{name} {value:.4g}" for name, value in figures.items()]


class Bars:
  """A bar for each phase of a run; where stderr is no terminal, a line now and then."""

  def __init__(self) -> None:
    self._progress = Progress(
      TextColumn("{task.description:>9}"),
      BarColumn(bar_width=24),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TimeRemainingColumn(),
      TextColumn("{task.fields[figures]}"),
      console=Console(stderr=True),
    )
    self._told = time.monotonic()
    self._tasks: dict[str, TaskID] = {}

  def __enter__(self) -> "Bars":
    return self

  def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
    if self._tasks:
      self._progress.stop()

  def __call__(self, phase: str, done: int, total: int, /, **figures: float) -> None:
    if not self._progress.console.is_terminal:
      if done == total or time.monotonic() - self._told >= _SECONDS:
        self._told = time.monotonic()
        self._progress.console.print(f"{phase} {done}/{total}", *_figures(figures))
      return
    if not self._tasks:
      self._progress.start()  # not before: an error may come first, and wants no empty bar
    shown = "  ".join(_figures(figures))
    task = self._tasks.get(phase)
    if task is not None and done < self._progress.tasks[task].completed:
      self._progress.reset(task, total=total)  # a phase that comes again: the next prompt
    if task is None:
      task = self._tasks[phase] = self._progress.add_task(phase, total=total, figures="")
    self._progress.update(task, completed=done, total=total, figures=shown)
