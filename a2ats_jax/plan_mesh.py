"""The part of a plan that falls on one device of a mesh."""

import dataclasses
import re

from a2ats_jax.errors import UserError
from a2ats_jax.plan import Case


@dataclasses.dataclass(frozen=True)
class Cut:
  """A mesh by its sizes.

  Attributes:
    batch: parts that the rows are cut into. heads: parts of the KV heads.
  """

  batch: int = 1
  heads: int = 1

  def __str__(self) -> str:
    return f"{self.batch}x{self.heads}"

  @property
  def devices(self) -> int:
    """How many there are."""
    return self.batch * self.heads

  def part(self, case: Case) -> Case:
    """What one device holds, as a case of its own: fewer rows of a model with fewer heads.

    An MLP or a vocabulary that the heads' axis does not divide is whole on every device, as in
    :func:`a2ats_jax.models.sharded.shard_decoder`.

    Raises:
      UserError: rows or KV heads that the mesh does not divide, or a model with local layers.
    """
    c, parts = case.config, self.heads
    if self.devices > 1 and c.local is not None:
      raise UserError("mesh: models with local layers cannot be cut over a mesh yet")
    for what, size, into in (("rows", case.batch, self.batch), ("KV heads", c.kv_heads, parts)):
      if size % into:
        raise UserError(f"mesh: {size} {what} cannot be cut into {into} equal parts")
    config = dataclasses.replace(
      c,
      heads=c.heads // parts,
      kv_heads=c.kv_heads // parts,
      mlp_width=c.mlp_width if c.mlp_width % parts else c.mlp_width // parts,
      vocab=c.vocab if c.vocab % parts else c.vocab // parts,
    )
    return dataclasses.replace(case, config=config, batch=case.batch // self.batch)

  def collective_bytes(self, case: Case) -> int:
    """Bytes of hidden states that a device adds up with others in a step, whatever the context.

    After the output projection and after the MLP of every layer, and once where a vocabulary that
    is cut is looked up; an MLP that is whole adds nothing.
    """
    if self.heads == 1:
      return 0
    c = case.config
    times = c.layers * (2 - bool(c.mlp_width % self.heads)) + (c.vocab % self.heads == 0)
    return times * (case.batch // self.batch) * c.width * case.size


ONE_DEVICE = Cut()


def read_cut(text: str) -> Cut:
  """``2x4``: rows over two, KV heads over four of eight devices."""
  match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
  if not match:
    raise UserError(f"mesh: expected BATCHxHEADS such as 2x4, got {text!r}")
  return Cut(int(match[1]), int(match[2]))
