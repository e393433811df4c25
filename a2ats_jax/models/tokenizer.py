"""Text to token ids and back, and chat templates, from either weight format."""

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from a2ats_jax.errors import UserError


class Tokenizer:
  """A tokenizer with its special ids and chat template.

  Args:
    backend: the tokenizer proper. Truncation and padding are switched off.
    bos: the token put first, as text, or None.
    eos: the texts of the tokens that end a generation; the first is the template's ``eos_token``.
    template: chat template in Jinja, or None.
    specials: further tokens a template may name, such as ``pad_token``.
  Raises:
    UserError: one of these tokens is not in the vocabulary.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    bos: str | None = None,
    eos: Sequence[str] = (),
    template: str | None = None,
    specials: Mapping[str, str] | None = None,
  ):
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self._specials = dict(specials or {})
    self.template = template
    self.bos_id: int | None = None if bos is None else self._id(bos)
    self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(self._id(token) for token in eos))
    if bos is not None:
      self._specials["bos_token"] = bos
    if eos:
      self._specials["eos_token"] = eos[0]

  def _id(self, token: str) -> int:
    found = self._backend.token_to_id(token)
    if found is None:
      raise UserError(f"tokenizer: special token {token!r} is not in the vocabulary")
    return found

  @functools.cached_property
  def vocab(self) -> int:
    """Ids in use: one more than the largest."""
    return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  @property
  def has_chat(self) -> bool:
    """Whether :meth:`render_chat` can be called."""
    return self.template is not None

  @functools.cached_property
  def sha256(self) -> str:
    """Hash over vocabulary, rules and chat template: equal hashes tokenise alike."""
    text = json.dumps([self._backend.to_str(), self.template, self._specials], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def encode(self, text: str, *, special: bool) -> list[int]:
    """Ids of a text.

    Special tokens spelled out in the text, such as ``<|im_start|>``, become their single ids. Bytes
    for which the vocabulary has no token (a few control characters in some models) are dropped.

    Args:
      text: any Unicode text without lone surrogates.
      special: add what the tokenizer adds by default, such as a first BOS. False for a rendered
        chat, whose template has written them already.
    Raises:
      UserError: the text holds a lone surrogate.
    """
    try:
      return self._backend.encode(text, add_special_tokens=special).ids
    except TypeError:
      raise UserError("tokenizer: the text holds a lone surrogate, which is not UTF-8") from None

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of ids; bytes that are not UTF-8 become U+FFFD.

    Raises:
      UserError: an id is negative or not in the vocabulary.
    """
    ids = list(ids)
    for i in ids:
      if i < 0 or self._backend.id_to_token(i) is None:
        raise UserError(f"tokenizer: id {i} is not in the vocabulary of {self.vocab}")
    return self._backend.decode(ids, skip_special_tokens=skip_special)

  def stream(self, *, skip_special: bool = True) -> "TextStream":
    """A decoder that takes ids one at a time."""
    return TextStream(self, skip_special)

  def render_chat(
    self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
  ) -> str:
    """A conversation as the text the model was tuned on.

    Args:
      messages: turns, each with ``role`` and ``content``.
      add_generation_prompt: end with the opening of the assistant's turn.
    Returns:
      Text for ``encode(..., special=False)``.
    Raises:
      UserError: there is no template, or it refuses these messages.
    """
    if self.template is None:
      raise UserError("this model has no chat template; give it plain text")
    try:
      program = _environment().from_string(self.template, globals=dict(_HELPERS))
      return program.render(
        messages=messages, add_generation_prompt=add_generation_prompt, **self._specials
      )
    except Exception as error:  # a template is a program: it can fail in any way
      raise UserError(f"chat template: {' '.join(str(error).split())}") from error


class TextStream:
  """Turns a stream of ids into text, holding back a character until all its bytes are there.

  The pieces joined, with :meth:`finish` last, are ``decode`` of all the ids.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool):
    self._decode = functools.partial(tokenizer.decode, skip_special=skip_special)
    self._ids: list[int] = []  # the ids of the last piece, then those not yet shown
    self._shown = 0  # how many of them are shown; they give the decoder its left context

  def push(self, token: int) -> str:
    """The text this id completes, empty while a character is unfinished."""
    self._ids.append(token)
    piece = self._pending()
    if not piece or piece.endswith("\ufffd"):
      return ""
    self._ids = self._ids[self._shown :]
    self._shown = len(self._ids)
    return piece

  def finish(self) -> str:
    """What was held back, with U+FFFD for a character that never became whole."""
    piece = self._pending()
    self._shown = len(self._ids)
    return piece

  def _pending(self) -> str:
    return self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
  return datetime.datetime.now().strftime(layout)


def _tojson(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)


_HELPERS = MappingProxyType({"raise_exception": _raise_exception, "strftime_now": _strftime_now})


def _environment() -> jinja2.Environment:
  """Jinja as chat templates expect it; sandboxed, because a template is a stranger's program."""
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
  )
  env.filters["tojson"] = _tojson
  return env
