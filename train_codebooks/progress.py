"""How a long run tells its caller where it stands."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
  """Called after every piece of work, and once when a run resumes inside a phase.

  An exception it raises stops the run where it stands; the next call goes on from the last
  checkpoint.
  """

  def __call__(self, phase: str, done: int, total: int, /, **figures: float) -> None:
    """Take note.

    Args:
      phase: ``collect``, ``seed``, ``plain``, ``adam``, ``lloyd`` or ``order``.
      done, total: tokens of ``collect``, steps of the others. A phase may end before its total.
      figures: ``loss``, mean squared distance as a fraction of the keys' variance, and ``alive``,
        the fraction of codewords in use, where they exist.
    """
    ...


def silent(phase: str, done: int, total: int, /, **figures: float) -> None:
  """A listener that does nothing."""
