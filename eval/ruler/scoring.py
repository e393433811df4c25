"""RULER's string matches, as shares from 0 to 1; RULER prints them times 100."""

from collections.abc import Sequence


def match_all(prediction: str, answers: Sequence[str]) -> float:
  """The share of answers that occur in the prediction, case aside."""
  return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
  """1 where any of the answers occurs in the prediction, case aside; else 0."""
  return float(any(answer.lower() in prediction.lower() for answer in answers))
