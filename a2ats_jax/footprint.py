"""What a method keeps for a token, from the shapes of its states; nothing is allocated."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.forward import geometry_of
from a2ats_jax.methods import caches, registry
from a2ats_jax.methods.base import Method, needs_of
from a2ats_jax.methods.registry import MethodSpec
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.store import KVStore

# Two prompts whose lengths every page, group and block of a default method divides.
_SHORT, _LONG = 320 << 9, 320 << 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What one row of a batch keeps.

  Attributes:
    device, host: bytes that each further token of the prompt adds, all layers.
    fixed: bytes on the device whatever the prompt's length, such as codebooks and the windows of
      local layers.
    queries, sums: what the method asks of prefill, :class:`a2ats_jax.methods.base.Needs`.
  """

  device: float
  host: float
  fixed: float
  queries: int
  sums: bool


def state_bytes(state: Any) -> tuple[int, int]:
  """Device and host bytes of a state, live or abstract; a store says where its pages lie."""
  device = host = 0
  for part in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KVStore)):
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(part))
    if isinstance(part, KVStore) and part.host:
      host += size
    else:
      device += size
  return device, host


def cost_of(
  spec: MethodSpec, config: ModelConfig, *, budget: Budget, codewords: int, dtype: Any
) -> Cost:
  """Bytes a token of a method: the difference of two states of one row, far apart in length.

  Args:
    budget: for methods that take one. A share of the context makes evicting methods grow with it; a
      number of tokens does not.
    codewords: C, of methods that need codebooks.
    dtype: of cached keys and values.

  Raises:
    UserError: the method does not fit the model's shape.
  """
  found: list[Cost] = []

  def shapes() -> None:
    """Runs under a trace, where arrays have shapes and no memory."""
    lead, d = (config.global_layers, config.kv_heads), config.head_dim
    book = make_codebook(jnp.zeros((*lead, codewords, d)), jnp.zeros((*lead, d, d)))
    books = {registry.DEFAULT_BOOK: book}
    method = registry.build(spec, budget=budget, codebooks=books)
    short, long = (_state_of(method, config, tokens, dtype) for tokens in (_SHORT, _LONG))
    (device, host), (more, further) = state_bytes(short), state_bytes(long)
    (own, _), needs = state_bytes(method), needs_of(method)
    a_token = (more - device) / (_LONG - _SHORT)
    found.append(
      Cost(
        device=a_token,
        host=(further - host) / (_LONG - _SHORT),
        fixed=device - a_token * _SHORT + own,
        queries=needs.queries,
        sums=needs.sums,
      )
    )

  jax.eval_shape(shapes)
  return found[0]


def _state_of(method: Method, config: ModelConfig, tokens: int, dtype: Any) -> Any:
  geometry = geometry_of(config, batch=1, prompt=tokens, new=0)
  return caches.init(method, dataclasses.replace(geometry, dtype=dtype))


def rows(
  specs: Sequence[MethodSpec],
  config: ModelConfig,
  *,
  model: str,
  budget: Budget,
  codewords: int,
  dtype: Any,
) -> list[dict[str, Any]]:
  """A flat row for every method, full attention's bytes beside it.

  Args:
    model: its name, for the record.
  """
  full = 2 * config.global_layers * config.kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
  found = []
  for spec in specs:
    cost = cost_of(spec, config, budget=budget, codewords=codewords, dtype=dtype)
    entry = registry.METHODS[spec.name]
    found.append(
      {
        "model": model,
        "method": spec.name,
        "options": spec.options_text,
        "budget": str(budget) if entry.takes_budget else None,
        "dtype": str(jnp.dtype(dtype)),
        "device_bytes_a_token": cost.device,
        "host_bytes_a_token": cost.host,
        "full_bytes_a_token": full,
        "fixed_bytes": cost.fixed,
        "prefill_queries": cost.queries,
        "prefill_sums": cost.sums,
        "codebook": entry.takes_codebook,
        "tested": entry.tested,
        "summary": entry.summary,
      }
    )
  return found


def table(found: Sequence[Mapping[str, Any]]) -> Table:
  """Rows for people."""
  out = Table(box=None, header_style="bold", pad_edge=False)
  sizes = ("device B/token", "host B/token", "device/full", "fixed")
  heads = ("method", *sizes, "asks", "tested on", "")
  for place, name in enumerate(heads):
    out.add_column(name, justify="right" if 0 < place < 5 else "left", no_wrap=place < 6)
  for row in found:
    asks = [
      *(["budget"] if row["budget"] else []),
      *(["codebook"] if row["codebook"] else []),
      *([f"{row['prefill_queries']} queries"] if row["prefill_queries"] else []),
      *(["attention sums"] if row["prefill_sums"] else []),
    ]
    out.add_row(
      row["method"],
      f"{row['device_bytes_a_token']:,.0f}",
      f"{row['host_bytes_a_token']:,.0f}",
      f"{row['device_bytes_a_token'] / row['full_bytes_a_token']:.1%}",
      f"{row['fixed_bytes'] / 1e6:,.1f} MB",
      ", ".join(asks) or "-",
      row["tested"],
      row["summary"],
    )
  return out
