"""The op in plain jnp."""

from a2ats_jax import attention
from a2ats_jax.typing import Array, Bool, Float


def paged_decode(
  q: Float[Array, "B 1 H D"],
  keys: Float[Array, "B K F P D"],
  values: Float[Array, "B K F P D"],
  mask: Bool[Array, "B K F P"],
  *,
  tail: attention.Tail | None = None,
) -> attention.Part:
  """Exact attention over the tokens of all pages at once, merged with the tail."""
  b, kv_heads, _, _, d = keys.shape
  k, v = keys.reshape(b, kv_heads, -1, d), values.reshape(b, kv_heads, -1, d)
  seen = attention.per_query_head(mask.reshape(b, 1, kv_heads, -1), q.shape[2] // kv_heads)
  part = attention.from_logits(attention.logits(q, k), v, seen)
  return part if tail is None else attention.merge([part, tail.part()])
