"""Make longbench_scores.json: what lm-eval's LongBench metrics give on random texts.

Needs lm-eval (``pip install --no-deps`` will do), jieba, rouge, and fuzzywuzzy without
python-Levenshtein:

    python tests/data/make_longbench_scores.py

Its code similarity skips blank lines, which LongBench's own does not; no text here begins with one.
"""

import importlib.util
import json
import random
import warnings
from pathlib import Path

# fmt: off
WORDS = [
  "the", "a", "an", "cat", "sat.", "on", "Mat,", "3", "12", "7", "U.S.", "it's", ".", "`x`", "#",
  "//", "foo()", "x=1", "end;", "The", "ab\t…",
]
LINES = [
  "x = 1", "y = x + 1  # sum", "return foo(x)", "// note", "`code`", "for i in range(3):", "  pass",
]
# fmt: on
SIGNS = [*"我们今天在北京大学图书馆看书，。！2023年 ab", "段落3", "中国", "\n"]
CLASSES = ["a", "ab", "abc", "b", "bc", "c", "Abc"]


def main() -> None:
  warnings.simplefilter("ignore")
  package = importlib.util.find_spec("lm_eval")  # not imported: it wants torch
  path = Path(package.submodule_search_locations[0]) / "tasks" / "longbench" / "metrics.py"
  spec = importlib.util.spec_from_file_location("metrics", path)
  metrics = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(metrics)
  rng = random.Random(0)

  def english() -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 12)))

  def chinese() -> str:
    return "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 20)))

  def code() -> str:
    return "\n".join(rng.choice(LINES) for _ in range(rng.randint(1, 4)))

  def numbers() -> str:
    return " ".join(rng.choice(["3", "12", "Paragraph 3", "7.", "no", "33"]) for _ in range(4))

  cases = []

  def add(metric: str, prediction: str, answer: str, **more: list[str]) -> None:
    theirs = {"code_similarity": "code_sim"}.get(metric, metric)
    given = {"all_classes": more["classes"]} if more else {}
    score = float(getattr(metrics, f"{theirs}_score")(prediction, answer, **given))
    case = {"metric": metric, "prediction": prediction, "answer": answer, "score": score}
    cases.append(case | more)

  for _ in range(12):
    add("qa_f1", english(), english())
    add("rouge", english(), english())
    add("qa_f1_zh", chinese(), chinese())
    add("rouge_zh", chinese(), chinese())
    add("code_similarity", code(), rng.choice(LINES))
    add("count", numbers(), rng.choice(["3", "12"]))
    add("retrieval", numbers(), f"Paragraph {rng.choice([3, 12])}")
    add("retrieval_zh", numbers(), f"段落{rng.choice([3, 12])}")
    classes = rng.sample(CLASSES, rng.randint(2, 7))
    text = "".join(rng.choice("abcA ") for _ in range(6))
    add("classification", text, rng.choice(classes), classes=classes)
  target = Path(__file__).with_name("longbench_scores.json")
  lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
  target.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
  main()
