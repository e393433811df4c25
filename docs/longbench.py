"""Count random texts that our scores and LongBench's own metrics.py score differently.

    python docs/longbench.py LongBench/LongBench/metrics.py

Needs what that file imports: jieba, rouge, and fuzzywuzzy without python-Levenshtein.
"""

import importlib.util
import random
import sys
import warnings

import jieba

from eval.longbench import metrics

PAIRS = 3000
THEIRS = {"code_similarity": "code_sim"}  # the others are called as ours are
# fmt: off
WORDS = [
  "the", "a", "an", "cat", "sat.", "on", "Mat,", "3", "12", "Paragraph", "7", "U.S.", "it's", "\n",
  ".", "`x`", "#", "//", "foo()", "x=1", "\n\n", "end;", "", "The", "tab\t…",
]
# fmt: on
SIGNS = [*"我们今天在北京大学图书馆看书，。！2023年 ab", "段落3", "中国", "\n"]
CLASSES = ["a", "ab", "abc", "b", "bc", "c", "Abc"]


def main(path: str) -> None:
  warnings.simplefilter("ignore")
  jieba.setLogLevel("WARNING")
  spec = importlib.util.spec_from_file_location("longbench_metrics", path)
  theirs = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(theirs)
  rng = random.Random(0)

  def english() -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 14)))

  def chinese() -> str:
    return "".join(rng.choices(SIGNS, k=rng.randint(0, 25)))

  def pair(metric: str) -> tuple[str, str, dict[str, list[str]]]:
    if metric == "classification":
      classes = rng.sample(CLASSES, rng.randint(1, 7))
      return "".join(rng.choices("abcA ", k=6)), rng.choice(classes), {"classes": classes}
    if metric in ("count", "retrieval", "retrieval_zh"):
      form = {"retrieval": "Paragraph {}", "retrieval_zh": "段落{}"}.get(metric, "{}")
      return english(), form.format(rng.choice([3, 7, 12])), {}
    draw = chinese if metric.endswith("_zh") else english
    prediction = draw()
    near = prediction[: rng.randint(0, len(prediction))]
    return prediction, near if rng.random() < 0.2 else draw(), {}

  for name, ours in metrics.METRICS.items():
    other, differ = getattr(theirs, f"{THEIRS.get(name, name)}_score"), 0
    for _ in range(PAIRS):
      prediction, answer, more = pair(name)
      given = {"all_classes": more["classes"]} if more else {}
      differ += ours(prediction, answer, **more) != other(prediction, answer, **given)
    print(f"{name}: {differ} of {PAIRS} differ")


if __name__ == "__main__":
  main(sys.argv[1])
