"""What commands share: a model, its codebooks, and how results are printed."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2ats_jax.errors import UserError

if TYPE_CHECKING:
  from a2ats_jax.codebook import Codebook
  from a2ats_jax.models.model import Model

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
  """Which model to run."""

  model: str = DEFAULT_MODEL
  """A known name, a .gguf file, a Hugging Face directory, or (extra `hub`) a hub id."""
  cache: Path | None = None
  """Folder for downloaded models. Default: a2ats_jax in the user's cache directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodArgs(ModelArgs):
  """A model and the codebooks its methods may need."""

  codebook: str = ""
  """Directory that `a2ats train` wrote; needed by the a2ats methods. Several as
  name=DIR,name=DIR: a method picks one with its option, a2ats:book=name."""


def note(line: str) -> None:
  print(line, file=sys.stderr)


def numbers(name: str, text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(","))
  except ValueError:
    raise UserError(f"{name}: expected whole numbers with commas between, got {text!r}") from None


def report(rows: Sequence[dict[str, Any]], *, json: bool, out: Path | None) -> None:
  from eval import tables

  if json:
    for line in tables.json_lines(rows):
      print(line)
  else:
    tables.console().print(tables.table(rows))
    if out is not None:
      print(f"results in {out}")


def load(args: ModelArgs) -> "Model":
  from a2ats_jax.models.model import load_model

  return load_model(args.model, cache=args.cache, progress=note)


def codebooks(args: MethodArgs, model: "Model") -> "dict[str, Codebook]":
  from a2ats_jax.methods.registry import DEFAULT_BOOK

  books: dict[str, Codebook] = {}
  for part in filter(None, args.codebook.split(",")):
    name, equals, folder = part.partition("=")
    name, folder = (name, folder) if equals else (DEFAULT_BOOK, part)
    if name in books:
      raise UserError(f"codebook: two are named {name!r}; write them as name=DIR,name=DIR")
    books[name], _ = model.load_codebooks(Path(folder))
  return books
