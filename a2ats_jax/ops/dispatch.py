"""Which implementation of an op runs: the reference everywhere, a kernel where it can.

An op is a folder: its ``__init__`` holds the public function and the table of implementations,
``reference`` the plain jnp form that every other one equals. The choice is made at trace time and
depends on the backend and on shapes only; a kernel's tile sizes also on what was stored for the
device (:mod:`a2ats_jax.ops.stored_tiles`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from a2ats_jax.errors import UserError

REFERENCE, AUTO = "reference", "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
  """One way to compute an op.

  Attributes:
    run: takes the op's arguments.
    hindrances: takes the backend's name and the op's arguments, and says in a sentence each why
      ``run`` cannot serve them; empty where it can.
  """

  run: Callable[..., Any]
  hindrances: Callable[..., list[str]] = lambda backend, *args, **kwargs: []


def call(
  op: str, table: Mapping[str, Implementation], implementation: str, *args: Any, **kwargs: Any
) -> Any:
  """Run an op.

  Args:
    op: its name, for messages.
    table: implementations by name, the preferred ones first; holds the reference.
    implementation: a name in the table, or ``auto`` for the first that nothing hinders.

  Raises:
    UserError: an unknown name, or one that cannot serve these arguments; the message holds every
      reason.
  """
  backend = jax.default_backend()
  if implementation == AUTO:
    for candidate in table.values():
      if not candidate.hindrances(backend, *args, **kwargs):
        return candidate.run(*args, **kwargs)
    return table[REFERENCE].run(*args, **kwargs)
  if implementation not in table:
    known = ", ".join((AUTO, *table))
    raise UserError(f"{op}: unknown implementation {implementation!r}; known: {known}")
  reasons = table[implementation].hindrances(backend, *args, **kwargs)
  if reasons:
    raise UserError(f"{op}: implementation {implementation!r} cannot run: {'; '.join(reasons)}")
  return table[implementation].run(*args, **kwargs)
