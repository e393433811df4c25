"""LongBench's datasets: prompts, lengths and metrics, from ``tasks.json``."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from eval.longbench import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """How a dataset is asked and scored.

  Attributes:
    kind: ``single-document``, ``multi-document``, ``summarization``, ``few-shot``, ``synthetic`` or
      ``code``.
    metric: a name in :data:`eval.longbench.metrics.METRICS`.
    new: tokens generated at most.
    prompt: with ``{context}`` and, mostly, ``{input}``.
    one_line: an answer ends at a newline and is not empty.
  """

  kind: str
  metric: str
  new: int
  prompt: str
  one_line: bool = False

  @property
  def chat(self) -> bool:
    """Whether a chat model is asked through its template."""
    return self.kind not in ("few-shot", "code")

  def score(self, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score over the answers, 0 to 1; of a few-shot prediction its first line is scored.

    Args:
      classes: all that a prediction may name; used by classification alone.
    """
    if self.kind == "few-shot":
      prediction = prediction.lstrip("\n").split("\n")[0]
    metric = metrics.METRICS[self.metric]
    more = {"classes": classes} if self.metric == "classification" else {}
    return max(metric(prediction, answer, **more) for answer in answers)


@functools.cache
def tasks() -> Mapping[str, Task]:
  """LongBench's datasets by name, in its order of kinds."""
  text = importlib.resources.files("eval.longbench").joinpath("tasks.json").read_text("utf-8")
  return MappingProxyType({k: Task(**v) for k, v in json.loads(text)["datasets"].items()})
