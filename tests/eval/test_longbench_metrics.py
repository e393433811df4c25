"""LongBench's scores: by hand, as lm-eval has them, and what is said where a package is missing."""

import json
import sys
import types
from pathlib import Path

import pytest

from a2ats_jax.errors import UserError
from eval.longbench import metrics
from eval.longbench.tasks import tasks

SCORES = Path(__file__).parent.parent / "data" / "longbench_scores.json"  # make_longbench_scores.py


@pytest.mark.parametrize("metric", list(metrics.METRICS))
def test_scores_are_those_of_lm_eval(metric):
  cases = json.loads(SCORES.read_text(encoding="utf-8"))
  mine = [case for case in cases if case["metric"] == metric]
  assert len(mine) == 12
  for case in mine:
    more = {"classes": case["classes"]} if "classes" in case else {}
    score = metrics.METRICS[metric](case["prediction"], case["answer"], **more)
    assert score == case["score"], case


@pytest.mark.parametrize(
  ("metric", "prediction", "answer", "score"),
  [
    # cat sat / cat sat on: precision 1, recall 2/3
    ("qa_f1", "The cat, sat!", "a cat sat on", 0.8),
    ("qa_f1", "cat cat cat", "cat dog", 0.4),  # a word counts as often as both have it
    ("qa_f1", "Their theory", "the", 0.0),  # articles are whole words
    ("qa_f1", "", "cat", 0.0),
    ("qa_f1_zh", "北京大学。", "北京大学", 1.0),
    ("qa_f1_zh", "中国，北京大学", "北京大学", 2 / 3),
    # the longest common subsequence has 2 of 3 and 2 of 2 words
    ("rouge", "x y z", "x z", 0.8),
    ("rouge", "x x x z", "x z", 1.0),  # a word counts once
    ("rouge", "z x", "x z", 0.5),  # the order counts
    ("rouge", "z. x", "x z", 1.0),  # but not that of sentences
    ("rouge", "", "x", 0.0),
    ("rouge", "...", "x", 0.0),
    ("rouge_zh", "北京大学", "中国北京大学", 2 / 3),
    ("count", "3, no: 12 or 3", "3", 2 / 3),
    ("count", "33", "3", 0.0),
    ("count", "none", "3", 0.0),
    ("retrieval", "Paragraph 3 or 12", "Paragraph 3", 0.5),
    ("retrieval_zh", "段落3", "段落3", 1.0),
    ("retrieval_zh", "段落3", "段落30", 0.0),
    ("code_similarity", "abcd", "abxd", 0.75),  # ab and d: 2 * 3 / 8
    ("code_similarity", "\n\n# no\n`no`\n// no\nabcd\nabxd", "abcd", 1.0),
    ("code_similarity", "# no\n\nabcd", "abcd", 0.0),  # an empty line is the first without marks
    ("code_similarity", "abc", "abd", 0.67),  # hundredths
    ("code_similarity", "# no", "", 1.0),
  ],
)
def test_by_hand(metric, prediction, answer, score):
  # the rouge package adds 1e-8 to a denominator
  assert metrics.METRICS[metric](prediction, answer) == pytest.approx(score, abs=2e-8)


@pytest.mark.parametrize(
  ("prediction", "answer", "classes", "score"),
  [
    ("It is Food.", "Food", ["Food", "Sport"], 1.0),
    ("Food or Sport", "Food", ["Food", "Sport"], 0.5),
    ("Sport", "Food", ["Food", "Sport"], 0.0),
    ("food", "Food", ["Food"], 0.0),
    ("a city", "a city", ["city", "a city"], 1.0),  # a part of the answer's name does not count
    ("abc", "abc", ["a", "ab", "abc"], 0.5),  # ab follows a that was removed: not looked at
  ],
)
def test_classes_by_hand(prediction, answer, classes, score):
  assert metrics.classification(prediction, answer, classes) == score


def test_a_task_takes_the_best_answer_and_a_few_shot_line():
  assert tasks()["qasper"].score("a dog", ["cat", "dog"]) == 1.0
  assert tasks()["qasper"].score("dog\ncat", ["dog"]) == pytest.approx(2 / 3)
  assert tasks()["triviaqa"].score("\n\ndog\ncat", ["dog"]) == 1.0
  assert tasks()["trec"].score("Food\nSport", ["Food"], ["Food", "Sport"]) == 1.0
  assert tasks()["samsum"].score("", ["x"]) == 0.0


def test_a_text_of_very_many_words_is_scored_and_the_stack_is_as_before():
  """The rouge package calls itself once a word; LongBench counts such a text 0."""
  before = sys.getrecursionlimit()
  ours, theirs = range(before), range(0, 2 * before, 2)
  score = metrics.rouge(" ".join(map(str, ours)), " ".join(map(str, theirs)))
  assert score == pytest.approx(0.5, abs=1e-7)
  assert sys.getrecursionlimit() == before


@pytest.mark.parametrize(
  ("package", "needed"),
  [("jieba", {"qa_f1_zh", "rouge_zh"}), ("rouge", {"rouge", "rouge_zh"})],
)
def test_a_missing_package_is_asked_for_where_it_is_needed(monkeypatch, package, needed):
  for name in ("jieba", "rouge"):
    monkeypatch.setitem(sys.modules, name, None if name == package else types.ModuleType(name))
  for name in sorted(needed):
    with pytest.raises(UserError) as caught:
      metrics.check(name)
    for word in (name, package, "a2ats_jax[eval]"):
      assert word in str(caught.value)
  for name in metrics.METRICS.keys() - needed:
    metrics.check(name)
