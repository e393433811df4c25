"""LongBench's scores of one prediction against one answer, each from 0 to 1.

Same as THUDM/LongBench, ``metrics.py`` and ``eval.py``, also where that surprises: see each
function. ROUGE-L is the ``rouge`` package's and Chinese words are ``jieba``'s (extra
``longbench``). Differs: a text of so many words that the ``rouge`` package runs out of stack is
scored; there it counts 0.
"""

import collections
import difflib
import importlib
import re
import string
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from a2ats_jax.errors import UserError

_CHINESE = (
  "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛"
  "｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰"
  "〾〿–—‘’‛“”„‟…‧﹏."
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)


def _package(name: str, metric: str) -> Any:
  """A package of the extra, which a metric needs.

  Raises:
    UserError: it is not installed.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # jieba's escapes and its use of pkg_resources
      return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"metric {metric} needs the package {name!r}: install the extra first, "
      "pip install 'a2ats_jax[eval]'"
    ) from error


def _words_zh(text: str, metric: str) -> list[str]:
  jieba = _package("jieba", metric)
  jieba.setLogLevel("WARNING")  # it tells on stderr that it loads its dictionary
  return list(jieba.cut(text, cut_all=False))


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
  """F1 of two bags of words."""
  same = (collections.Counter(prediction) & collections.Counter(answer)).total()
  if not same:
    return 0.0
  precision, recall = same / len(prediction), same / len(answer)
  return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
  """F1 of words, without case, ASCII punctuation and articles (as in SQuAD)."""

  def words(text: str) -> list[str]:
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()

  return _f1(words(prediction), words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
  """F1 of Chinese words, without case and punctuation, which is dropped after the cut."""

  def words(text: str) -> list[str]:
    words_zh = _words_zh(text, "qa_f1_zh")
    plain = ("".join(w.lower().translate(_ALL_PUNCTUATION).split()) for w in words_zh)
    return [word for word in plain if word]

  return _f1(words(prediction), words(answer))


@contextmanager
def _stack(frames: int) -> Iterator[None]:
  """Room for a recursion of so many calls."""
  before = sys.getrecursionlimit()
  sys.setrecursionlimit(before + frames)
  try:
    yield
  finally:
    sys.setrecursionlimit(before)


def rouge(prediction: str, answer: str) -> float:
  """F1 of ROUGE-L, summary level, as the ``rouge`` package has it.

  It cuts sentences at every full stop and counts a word once a text. An empty text scores 0.
  """
  scorer = _package("rouge", "rouge").Rouge(metrics=["rouge-l"])
  with _stack(len(prediction) + len(answer)):  # one call a word
    try:
      return scorer.get_scores([prediction], [answer])[0]["rouge-l"]["f"]
    except ValueError:  # a text without a sentence
      return 0.0


def rouge_zh(prediction: str, answer: str) -> float:
  """ROUGE-L of Chinese words, punctuation included."""
  texts = [" ".join(_words_zh(text, "rouge_zh")) for text in (prediction, answer)]
  return rouge(*texts)


def count(prediction: str, answer: str) -> float:
  """The share of the numbers in a prediction that are the answer."""
  numbers = re.findall(r"\d+", prediction)
  return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
  """The share of the numbers in a prediction that are the N of an answer ``Paragraph N``."""
  return count(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def retrieval_zh(prediction: str, answer: str) -> float:
  """The same for an answer ``段落N``."""
  return count(prediction, re.findall(r"段落(\d+)", answer)[0])


def code_similarity(prediction: str, answer: str) -> float:
  """How alike the answer and the prediction's first line without ```, # or // are, in hundredths.

  The ratio is that of fuzzywuzzy without python-Levenshtein, as LongBench's requirements install
  it: difflib's.
  """
  lines = prediction.lstrip("\n").split("\n")
  code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
  line = next(code, "")
  if line == answer:
    return 1.0
  if not line or not answer:
    return 0.0
  return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
  """One over the number of classes named in a prediction, if the answer is among them.

  Classes whose name is a part of the answer's do not count; but the class that follows such a one
  in the list is not looked at, as LongBench removes from the list that it walks over.
  """
  named = [name for name in classes if name in prediction]
  place = 0
  while place < len(named):
    if named[place] in answer and named[place] != answer:
      named.remove(named[place])
    place += 1
  return 1 / len(named) if answer in named else 0.0


METRICS: Mapping[str, Callable[..., float]] = MappingProxyType(
  {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_similarity": code_similarity,
    "classification": classification,
  }
)

_NEEDS = MappingProxyType(
  {"qa_f1_zh": ("jieba",), "rouge": ("rouge",), "rouge_zh": ("rouge", "jieba")}
)


def check(metric: str) -> None:
  """Refuse a metric whose packages are not installed.

  Raises:
    UserError: names the extra.
  """
  for name in _NEEDS.get(metric, ()):
    _package(name, metric)
