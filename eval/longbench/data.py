"""LongBench's files and the prompts made from them.

A file is JSON lines as LongBench publishes them, a dataset each, ``qasper.jsonl``. Prompts are made
as in its ``pred.py``: the text is cut in the middle by tokens of the model's own tokenizer, joined
as text, put into the chat template unless the dataset is few-shot or code, and tokenised again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2ats_jax.errors import UserError
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.typing import Int
from eval.longbench.tasks import Task, tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """One line of a file, but for its text.

  Attributes:
    where: file and line, for messages.
    id: LongBench's.
    answers: any of them is right.
    length: words (characters of Chinese), as LongBench counts them.
    classes: all a prediction may name; empty where the dataset has none.
  """

  where: str
  id: str
  answers: tuple[str, ...]
  length: int
  classes: tuple[str, ...]


_FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
_ANSWERS = {"retrieval": "Paragraph N", "retrieval_zh": "段落N"}


def datasets_in(folder: Path, asked: Sequence[str]) -> tuple[str, ...]:
  """The datasets to run: those asked for, or every one that has a file.

  Raises:
    UserError: no such folder, no file in it, a dataset that LongBench has not or that is named
      twice.
  """
  if not folder.is_dir():
    raise UserError(f"data: {folder} is not a directory")
  for name in asked:
    if name not in tasks():
      raise UserError(f"datasets: expected some of {', '.join(tasks())}, got {name!r}")
    if asked.count(name) > 1:
      raise UserError(f"datasets: {name} is named twice")
    if not (folder / f"{name}.jsonl").is_file():
      raise UserError(f"datasets: there is no {folder / name}.jsonl")
  there = tuple(asked) or tuple(name for name in tasks() if (folder / f"{name}.jsonl").is_file())
  if not there:
    raise UserError(
      f"data: {folder} holds none of LongBench's files, expected such as qasper.jsonl"
    )
  return there


def read(path: Path, task: Task) -> tuple[list[tuple[Item, str]], str]:
  """The items of a dataset's file with their texts, not yet cut, and the file's SHA-256.

  Raises:
    UserError: a line that is no JSON object, lacks a field or holds a value of a wrong type, or no
      line at all.
  """
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  lines = enumerate(data.split(b"\n"), 1)
  items = [_item(f"{path}, line {number}", line, task) for number, line in lines if line.strip()]
  if not items:
    raise UserError(f"{path}: is empty, expected a JSON object a line")
  return items, hashlib.sha256(data).hexdigest()


def _item(where: str, line: bytes, task: Task) -> tuple[Item, str]:
  try:
    fields = json.loads(line.decode("utf-8"))
  except ValueError as error:
    raise UserError(f"{where}: is damaged, expected a JSON object: {error}") from error
  if not isinstance(fields, dict):
    raise UserError(f"{where}: expected a JSON object, got {type(fields).__name__}")
  if missing := [name for name in _FIELDS if name not in fields]:
    raise UserError(f"{where}: lacks {', '.join(missing)}")

  def refuse(name: str, expected: str) -> UserError:
    got = repr(fields[name])
    return UserError(f"{where}: {name}: expected {expected}, got {got[:60]}")

  for name in ("input", "context", "_id"):
    if not isinstance(fields[name], str):
      raise refuse(name, "a text")
  if not isinstance(fields["length"], int):
    raise refuse("length", "a whole number")
  if not _texts(fields["answers"]):
    raise refuse("answers", "a list of texts")
  if task.metric == "classification" and not _texts(fields["all_classes"]):
    raise refuse("all_classes", "a list of texts")
  if form := _ANSWERS.get(task.metric):
    head = form.removesuffix("N")
    for answer in fields["answers"]:
      if not answer.partition(head)[2][:1].isdigit():
        raise refuse("answers", form)
  item = Item(
    where=where,
    id=fields["_id"],
    answers=tuple(fields["answers"]),
    length=fields["length"],
    classes=tuple(fields["all_classes"] or ()) if task.metric == "classification" else (),
  )
  return item, task.prompt.format(context=fields["context"], input=fields["input"])


def _texts(value: object) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def cut(text: str, tokenizer: Tokenizer, T: int) -> str:
  """A text of more than T tokens without its middle: the first and the last ``T // 2`` of them.

  Joined as text without special tokens, as LongBench does; tokenised again it can be a few tokens
  longer or shorter.
  """
  ids = tokenizer.encode(text, special=True)
  if len(ids) <= T:
    return text
  return tokenizer.decode(ids[: T // 2]) + tokenizer.decode(ids[-(T // 2) :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """A question as a model gets it.

  Attributes:
    item: what it was made from.
    ids: tokens.
  """

  item: Item
  ids: Int[np.ndarray, "tokens"]


def prompt_of(item: Item, text: str, tokenizer: Tokenizer, *, T: int, chat: bool) -> Prompt:
  """The prompt of a text.

  Args:
    T: tokens of the text at most; those of the template come on top, as in LongBench.
    chat: put the text into the model's chat template.

  Raises:
    UserError: the tokenizer refuses the text.
  """
  try:
    text = cut(text, tokenizer, T)
    if chat:
      text = tokenizer.render_chat([{"role": "user", "content": text}])
    ids = np.asarray(tokenizer.encode(text, special=not chat), np.int32)
  except UserError as error:
    raise UserError(f"{item.where}: {error}") from error
  return Prompt(item=item, ids=ids)
