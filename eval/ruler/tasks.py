"""The thirteen tasks: what each is made of, how much is generated and how it is scored.

Parameters are those of RULER's ``scripts/synthetic.yaml`` and ``scripts/data/synthetic/constants``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from eval.ruler import counting, qa, tracking
from eval.ruler.needles import Needles
from eval.ruler.question import Material, Place, Source
from eval.ruler.scoring import match_all, match_part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One of RULER's tasks.

  Attributes:
    source: what one prompt is made of.
    new: tokens to generate; T includes them.
    score: of a prediction and the answers, 0 to 1.
    file: what of the material the user has to give, ``squad`` or ``hotpotqa``; empty for nothing.
  """

  source: Callable[[Place], Source]
  new: int
  score: Callable[[str, Sequence[str]], float] = match_all
  file: str = ""

  def runs(self, material: Material) -> bool:
    """Whether there is all that it needs."""
    return not self.file or getattr(material, self.file) is not None


def _niah(needles: Needles) -> Task:
  return Task(source=needles.source, new=128)


TASKS: Mapping[str, Task] = MappingProxyType(
  {
    "niah_single_1": _niah(Needles(haystack="noise")),
    "niah_single_2": _niah(Needles(haystack="prose")),
    "niah_single_3": _niah(Needles(haystack="prose", value="uuids")),
    "niah_multikey_1": _niah(Needles(haystack="prose", keys=4)),
    "niah_multikey_2": _niah(Needles(haystack="needles")),
    "niah_multikey_3": _niah(Needles(haystack="needles", key="uuids", value="uuids")),
    "niah_multivalue": _niah(Needles(haystack="prose", values=4)),
    "niah_multiquery": _niah(Needles(haystack="prose", keys=4, queries=4)),
    "vt": Task(source=tracking.source, new=tracking.NEW),
    "cwe": Task(source=counting.common_words, new=120),
    "fwe": Task(source=counting.frequent_words, new=50),
    "qa_1": Task(source=qa.squad, new=32, score=match_part, file="squad"),
    "qa_2": Task(source=qa.hotpotqa, new=32, score=match_part, file="hotpotqa"),
  }
)
