"""KV methods by name: what a command line may ask for, and how it is built.

A method is written ``name`` or ``name:option=value:option=value``, a list of methods with commas:
``full,oracle,a2ats:far=segments(16):tail=centroid``. Commas inside parentheses belong to the value.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import Codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.a2ats import A2ATS
from a2ats_jax.methods.a2ats_reference import A2ATSReference
from a2ats_jax.methods.actqkv_style import ActQKVStyle
from a2ats_jax.methods.adakv import AdaKV
from a2ats_jax.methods.base import Method
from a2ats_jax.methods.clusterkv import ClusterKV
from a2ats_jax.methods.corm import CORM
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.h2o import H2O
from a2ats_jax.methods.kivi import KIVI
from a2ats_jax.methods.l2norm import L2Norm
from a2ats_jax.methods.layer_budget import load_profile
from a2ats_jax.methods.magicpig import MagicPIG
from a2ats_jax.methods.oracle import Oracle
from a2ats_jax.methods.prefixkv import PrefixKV
from a2ats_jax.methods.qaq import QAQ, read_error
from a2ats_jax.methods.qpruning import QPruningKV
from a2ats_jax.methods.quest import Quest
from a2ats_jax.methods.shadowkv import ShadowKV
from a2ats_jax.methods.snapkv import SnapKV
from a2ats_jax.methods.streaming import Streaming
from a2ats_jax.methods.think import ThinK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """One option of a method.

  Attributes:
    default: its value as text.
    read: text to value; raises UserError saying what it expects.
  """

  default: str
  read: Callable[[str], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """A name in the registry.

  Attributes:
    summary: one line for people.
    build: called with the options by name, and with ``budget`` and ``codebook`` where the next two
      say so.
    takes_budget: False for a method that reads every token.
    takes_codebook: whether it needs trained codebooks; its option ``book`` then says which.
    options: by name.
    tested: on what it ran, or was compiled for.
  """

  summary: str
  build: Callable[..., Method]
  takes_budget: bool = True
  takes_codebook: bool = False
  options: Mapping[str, Option] = MappingProxyType({})
  tested: str = "CPU"


Table = Mapping[str, Entry]

DEFAULT_BOOK = "default"  # the name of codebooks that were given without one


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSpec:
  """A method as asked for, every option resolved.

  Attributes:
    name: in the registry.
    options: pairs of name and text, in the registry's order.
  """

  name: str
  options: tuple[tuple[str, str], ...] = ()

  @property
  def options_text(self) -> str:
    """``far=segments(8):tail=centroid``; empty where a method has no options."""
    return ":".join(f"{key}={value}" for key, value in self.options)

  def __str__(self) -> str:
    return ":".join(filter(None, (self.name, self.options_text)))


def read_count(text: str) -> int:
  """A whole number from 0 on."""
  if not re.fullmatch(r"[0-9]{1,9}", text):
    raise UserError(f"expected a whole number, got {text!r}")
  return int(text)


def read_share(text: str) -> float:
  """A number from 0 on and below 1."""
  if not re.fullmatch(r"0|0?\.[0-9]{1,9}", text):
    raise UserError(f"expected a share from 0 to below 1, got {text!r}")
  return float(text)


def one_of(*names: str) -> Callable[[str], str]:
  """A reader of one of these names."""

  def read(text: str) -> str:
    if text not in names:
      raise UserError(f"expected {' or '.join(names)}, got {text!r}")
    return text

  return read


def read_far(text: str) -> FarPosition:
  """``constant(b)``, ``segments(n)`` or ``segments(n,span)``."""
  match = re.fullmatch(r"(constant|segments)\(([0-9]{1,9})(?:,\s*([0-9]{1,9}))?\)", text)
  if not match or (match[1] == "constant" and match[3] is not None):
    raise UserError(f"expected constant(b), segments(n) or segments(n,span), got {text!r}")
  numbers = [int(n) for n in match.groups()[1:] if n is not None]
  if match[1] == "constant":
    return FarPosition.constant(*numbers)
  return FarPosition.segments(*numbers)


NEAR: Mapping[str, Option] = MappingProxyType(
  {
    "window": Option(default="64", read=read_count),
    "sinks": Option(default="8", read=read_count),
  }
)


def read_name(text: str) -> str:
  """A name of letters, digits, dots, dashes and underscores."""
  if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
    raise UserError(f"expected a name, got {text!r}")
  return text


BOOK: Mapping[str, Option] = MappingProxyType(
  {"book": Option(default=DEFAULT_BOOK, read=read_name)}
)


def _far(far: str, tail: str) -> Mapping[str, Option]:
  return {
    "far": Option(default=far, read=read_far),
    "tail": Option(default=tail, read=one_of("none", "centroid")),
    **NEAR,
    **BOOK,
  }


PROFILE = Option(default="uniform", read=load_profile)

PAGES: Mapping[str, Option] = MappingProxyType(
  {
    "page": Option(default="16", read=read_count),
    "fetch": Option(default="0", read=read_count),
    "order": Option(default="cell", read=one_of("cell", "arrival")),
    "placement": Option(default="auto", read=one_of("auto", "host", "device")),
    "bits": Option(default="16", read=read_count),
  }
)


def _a2ats(summary: str, *, far: str, tail: str) -> Entry:
  return Entry(
    summary=summary,
    build=A2ATS,
    takes_codebook=True,
    options=MappingProxyType({**_far(far, tail), **PAGES}),
    tested="CPU; compiled for H100 and TPU",
  )


def _entry(
  summary: str, build: Callable[..., Method], *, takes_budget: bool = True, **options: Option
) -> Entry:
  return Entry(
    summary=summary, build=build, takes_budget=takes_budget, options=MappingProxyType(options)
  )


def _count(default: int) -> Option:
  return Option(default=str(default), read=read_count)


REFERENCE = "a2ats-reference"  # too slow to be among all

METHODS: Table = MappingProxyType(
  {
    "full": Entry(summary="exact attention over every token", build=Full, takes_budget=False),
    "oracle": Entry(
      summary="the true top-k tokens by exact logit, beside which selections are judged",
      build=Oracle,
      options=NEAR,
    ),
    "a2ats": _a2ats("A2ATS as published", far="constant(2048)", tail="none"),
    "a2ats-plus": _a2ats(
      "A2ATS with far positions by segment and the tail estimated",
      far="segments(8)",
      tail="centroid",
    ),
    "streaming": _entry(
      "the first tokens and the latest", Streaming, sinks=_count(4), profile=PROFILE
    ),
    "l2norm": _entry(
      "of the prompt, the tokens with the smallest keys", L2Norm, skip=_count(2), profile=PROFILE
    ),
    "snapkv": _entry(
      "of the prompt, the tokens that its last queries attend to",
      SnapKV,
      window=_count(32),
      kernel=_count(7),
      pool=Option(default="max", read=one_of("max", "mean")),
      layers=Option(default="uniform", read=one_of("uniform", "pyramid")),
      profile=PROFILE,
    ),
    "adakv": _entry(
      "of the prompt, as snapkv, with one budget for the heads of a layer",
      AdaKV,
      window=_count(32),
      kernel=_count(7),
      pool=Option(default="max", read=one_of("max", "mean")),
      safeguard=Option(default="0.2", read=read_share),
      profile=PROFILE,
    ),
    "h2o": _entry("the tokens of most attention so far, and the latest", H2O, profile=PROFILE),
    "prefixkv": _entry(
      "of each layer, the tokens that carry the same share of its attention",
      PrefixKV,
      start=_count(1),
      profile=PROFILE,
    ),
    "corm": _entry(
      "tokens that one of the last queries found important, and the latest",
      CORM,
      window=_count(256),
      recent=_count(256),
      profile=PROFILE,
    ),
    "think": _entry(
      "keys without the channels that say least",
      ThinK,
      takes_budget=False,
      prune=Option(default="0.4", read=read_share),
      window=_count(32),
    ),
    "kivi": _entry(
      "every token in packed integers, keys by channel and values by token",
      KIVI,
      takes_budget=False,
      bits=_count(4),
      group=_count(32),
      residual=_count(128),
      prune=Option(default="0", read=read_share),
      window=_count(32),
    ),
    "qpruningkv": _entry(
      "of the prompt, more tokens in fewer bits",
      QPruningKV,
      bits=_count(4),
      group=_count(64),
      by_channel=Option(default="values", read=one_of("values", "keys")),
      window=_count(8),
      kernel=_count(7),
      profile=PROFILE,
    ),
    "quest": _entry("pages whose keys could score highest", Quest, page=_count(16)),
    "clusterkv": _entry(
      "clusters of keys, made for each prompt, whose centroids score highest",
      ClusterKV,
      clusters=_count(0),
      sinks=_count(16),
      every=_count(320),
      fresh=_count(8),
      page=_count(16),
    ),
    "shadowkv": _entry(
      "low-rank keys on the device, values on the host, chunks by landmark",
      ShadowKV,
      rank=_count(160),
      chunk=_count(8),
      outliers=_count(48),
      local=_count(32),
    ),
    "actqkv_style": _entry(
      "blocks by their leading tokens, budgets of layers by the entropy of a probe query",
      ActQKVStyle,
      block=_count(32),
      repr=_count(4),
      sinks=_count(16),
      local=_count(64),
      window=_count(512),
      most=_count(4),
    ),
    "qaq": _entry(
      "every token in as many bits as its attention asks for",
      QAQ,
      takes_budget=False,
      bits=_count(3),
      least=_count(2),
      most=_count(4),
      window=_count(5),
      outliers=_count(1),
      key_error=Option(default="1", read=read_error),
      value_error=Option(default="1", read=read_error),
    ),
    "magicpig": _entry(
      "tokens sampled by hash, and weighted by how likely that was",
      MagicPIG,
      takes_budget=False,
      tables=_count(150),
      bits=_count(10),
      sinks=_count(4),
      window=_count(64),
      page=_count(16),
      seed=_count(0),
    ),
    REFERENCE: Entry(
      summary="the definition that both equal, slow, with the whole cache on the device",
      build=A2ATSReference,
      takes_codebook=True,
      options=MappingProxyType(_far("constant(2048)", "none")),
    ),
  }
)


def parse_method(text: str, table: Table = METHODS) -> MethodSpec:
  """Read one ``name:option=value:...``.

  Raises:
    UserError: an unknown name or option (the message lists the valid ones), a value that cannot be
      read, or an option given twice.
  """
  name, *pairs = text.strip().split(":")
  if name not in table:
    raise UserError(f"method: unknown name {name!r}; known: {', '.join(table)}")
  options = table[name].options
  given: dict[str, str] = {}
  for pair in pairs:
    key, equals, value = (part.strip() for part in pair.partition("="))
    if not equals or key not in options:
      known = ", ".join(options) or "none"
      raise UserError(f"method {name}: unknown option {pair!r}; options: {known}")
    if key in given:
      raise UserError(f"method {name}: option {key} is given twice")
    try:
      options[key].read(value)
    except UserError as error:
      raise UserError(f"method {name}: {key}: {error}") from error
    given[key] = value
  resolved = ((key, given.get(key, option.default)) for key, option in options.items())
  return MethodSpec(name=name, options=tuple(resolved))


def parse_methods(text: str, table: Table = METHODS) -> tuple[MethodSpec, ...]:
  """Read a comma-separated list of methods; ``all`` is every registered one but the reference.

  Raises:
    UserError: as :func:`parse_method`; also an empty list, and the same method twice.
  """
  parts: list[str] = []
  for part in re.split(r",(?![^()]*\))", text):
    every = part.strip() == "all"
    parts += [name for name in METHODS if name != REFERENCE] if every else [part]
  specs = tuple(parse_method(part, table) for part in parts if part.strip())
  if not specs:
    raise UserError(f"methods: expected at least one of {', '.join(table)}, got none")
  for spec in specs:
    if specs.count(spec) > 1:
      raise UserError(f"methods: {spec} is named twice")
  return specs


def build(
  spec: MethodSpec,
  *,
  budget: Budget | None = None,
  codebooks: Mapping[str, Codebook] = MappingProxyType({}),
  table: Table = METHODS,
) -> Method:
  """The method a spec names.

  Args:
    budget: for methods that select; others leave it unread.
    codebooks: of all layers, by the names that the option ``book`` gives.

  Raises:
    UserError: a budget or codebook is needed and missing, or an option is out of range.
  """
  entry = table[spec.name]
  kwargs: dict[str, Any] = {}
  if entry.takes_budget:
    if budget is None:
      raise UserError(f"method {spec.name}: needs a budget, got none")
    kwargs["budget"] = budget
  options = {key: entry.options[key].read(value) for key, value in spec.options}
  if entry.takes_codebook:
    book = options.pop("book")
    if not codebooks:
      raise UserError(
        f"method {spec.name}: needs codebooks; train some with `a2ats train` and pass them with "
        "--codebook DIR"
      )
    if book not in codebooks:
      raise UserError(
        f"method {spec.name}: no codebook is named {book!r}; given: {', '.join(codebooks)}"
      )
    kwargs["codebook"] = codebooks[book]
  return entry.build(**kwargs, **options)
