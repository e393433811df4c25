r"""Keys, values, queries and codebooks of one attention layer, drawn so that codes are used as a
real model uses them.

How long a step with pages takes depends on which tokens share a codeword, which codewords are
chosen together and how far the query heads of a group agree, so numbers drawn evenly would time
something else. The law here has six constants. They were taken from SmolLM2-135M-Instruct with
codebooks of 1024 codewords over 8100 tokens of a novel; ``python docs/speed_inputs.py`` measures
them, and draws a layer of the same shape to compare:

* The codeword of rank r in a head holds a share :math:`r^{-a} e^{-b r / C}` of the tokens.
* Codewords are numbered along a nearest-neighbour chain, so consecutive ones resemble each other:
  coordinates are the sum of a slow and a fast first-order process along the chain.
* Frequent codewords are neighbours too: the ranks are those of one more such process.
* All codewords of a head have a common part, larger than what sets them apart; it makes a query
  prefer some segments.
* The queries of a group have a common part.

What is not modelled: the order of tokens in a text (each token draws its codeword alone), queries
that resemble the last step's, and a longer text's wider use of the codebook.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from a2ats_jax.codebook import Codebook, make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.rope import RopeConfig
from a2ats_jax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
  """The constants; the defaults are those of the real model.

  Attributes:
    power, decay: a and b of the shares of codewords.
    slow, fast: correlation of neighbours in the two processes along the chain.
    slow_part: share of the slow one in the variance.
    common: length of what a head's codewords share over the root mean square of what is their own.
    group: share of the queries' variance that a group shares.
    noise: of a key about its codeword, over the root mean square of a coordinate. Smaller than a
      real model's, so that a key keeps the code it was drawn with.
  """

  power: float = 0.44
  decay: float = 6.0
  slow: float = 0.97
  fast: float = 0.65
  slow_part: float = 0.35
  common: float = 2.2
  group: float = 0.85
  noise: float = 0.1

  def shares(self, size: int) -> Float[np.ndarray, "C"]:
    """Of the tokens, by rank of the codeword."""
    rank = np.arange(1, size + 1)
    share = rank**-self.power * np.exp(-self.decay * rank / size)
    return share / share.sum()

  def along_chain(
    self, rng: np.random.Generator, size: int, count: int
  ) -> Float[np.ndarray, "C n"]:
    """``count`` series of variance 1, each along a chain of ``size`` codewords."""
    parts = ((self.slow, self.slow_part), (self.fast, 1 - self.slow_part))
    out = np.zeros((size, count))
    for kept, part in parts:
      series = rng.normal(size=(size, count))
      for i in range(1, size):
        series[i] = kept * series[i - 1] + np.sqrt(1 - kept**2) * series[i]
      out += np.sqrt(part) * series
    return out


REAL = Law()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
  """One attention layer; the defaults are Llama-3.1-8B's, with codebooks of 1024 codewords.

  Attributes:
    heads: H. kv_heads: K. head_dim: D, even. codewords: C.
  """

  heads: int = 32
  kv_heads: int = 8
  head_dim: int = 128
  codewords: int = 1024

  def __post_init__(self):
    for name, field in vars(self).items():
      if field < 1:
        raise UserError(f"{name.replace('_', '-')}: expected at least 1, got {field}")
    if self.heads % self.kv_heads:
      raise UserError(
        f"heads: {self.heads} query heads are not a multiple of {self.kv_heads} KV heads"
      )
    _ = self.rope  # refuses an odd head size

  @property
  def name(self) -> str:
    """As rows spell it."""
    if (self.heads, self.kv_heads, self.head_dim) == (32, 8, 128):
      return "llama-3.1-8b layer"
    return f"layer H={self.heads} K={self.kv_heads} D={self.head_dim}"

  @property
  def rope(self) -> RopeConfig:
    """Llama 3.1's."""
    return RopeConfig(
      head_dim=self.head_dim,
      theta=500000.0,
      scaling="llama3",
      factor=8.0,
      original_context=8192,
    )


LLAMA_8B = LayerShape()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """A prompt and the tokens after it, as one layer sees them, before rotary embedding.

  Attributes:
    book: codebooks of the layer, leading axis L = 1.
    codes: of the prompt's keys, as drawn.
    keys, values: of the prompt.
    q, k, v: of n tokens that follow.
  """

  book: Codebook
  codes: Int[np.ndarray, "B T K"]
  keys: Float[Array, "B T K D"]
  values: Float[Array, "B T K D"]
  q: Float[Array, "B n H D"]
  k: Float[Array, "B n K D"]
  v: Float[Array, "B n K D"]


def draw_codebook(
  shape: LayerShape, *, seed: int, law: Law = REAL
) -> tuple[Codebook, Float[np.ndarray, "K C"]]:
  """Codebooks of the layer's KV heads (leading axis L = 1), and each codeword's share of tokens.

  The same whatever the prompts are.
  """
  rng = np.random.default_rng([seed, 0])
  kv_heads, size, dim = shape.kv_heads, shape.codewords, shape.head_dim
  words = np.empty((1, kv_heads, size, dim), np.float32)
  shares = np.empty((kv_heads, size))
  for head in range(kv_heads):
    words[0, head] = law.along_chain(rng, size, dim) + law.common * rng.normal(size=dim)
    order = np.argsort(-law.along_chain(rng, size, 1)[:, 0])
    shares[head, order] = law.shares(size)
  plain = jnp.broadcast_to(jnp.eye(dim), (1, kv_heads, dim, dim))
  return make_codebook(jnp.asarray(words), plain), shares


def draw(
  shape: LayerShape,
  *,
  T: int,
  new: int,
  seed: int,
  batch: int = 1,
  dtype: Any = jnp.float32,
  law: Law = REAL,
) -> Drawn:
  """Draw a layer's input.

  Args:
    T: tokens of every row's prompt.
    new: n, tokens after it.
    dtype: of keys, values and queries; the codebook is float32.
  """
  book, shares = draw_codebook(shape, seed=seed, law=law)
  words = np.asarray(book.codewords[0])
  rng = np.random.default_rng([seed, 1])
  kv_heads, size, dim = shape.kv_heads, shape.codewords, shape.head_dim
  group = shape.heads // kv_heads

  def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
    codes = np.empty((batch, count, kv_heads), np.int32)
    keys = np.empty((batch, count, kv_heads, dim), np.float32)
    for head in range(kv_heads):
      codes[:, :, head] = rng.choice(size, (batch, count), p=shares[head])
      keys[:, :, head] = law.noise * _normal(rng, (batch, count, dim))
      keys[:, :, head] += words[head][codes[:, :, head]]
    return codes, keys

  codes, keys = tokens(T)
  _, k = tokens(new)
  shared = np.sqrt(law.group) * _normal(rng, (batch, new, kv_heads, 1, dim))
  own = np.sqrt(1 - law.group) * _normal(rng, (batch, new, kv_heads, group, dim))
  q = (shared + own).reshape(batch, new, shape.heads, dim)
  v, values = (_normal(rng, (batch, count, kv_heads, dim)) for count in (new, T))
  return Drawn(
    book=book,
    codes=codes,
    keys=jnp.asarray(keys).astype(dtype),
    values=jnp.asarray(values).astype(dtype),
    q=jnp.asarray(q).astype(dtype),
    k=jnp.asarray(k).astype(dtype),
    v=jnp.asarray(v).astype(dtype),
  )


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
  return rng.standard_normal(shape, dtype=np.float32)


def usage(counts: Int[np.ndarray, "heads C"]) -> dict[str, float]:
  """How uneven the use of codewords is, mean over heads.

  Args:
    counts: tokens of every codeword.

  Returns:
    ``top1``, ``top10`` and ``top100``: share of the tokens that the most frequent codewords hold;
    ``entropy`` in bits; ``used``: codewords that hold any.
  """
  share = -np.sort(-counts, axis=-1) / counts.sum(axis=-1, keepdims=True)
  figures = {f"top{n}": float(share[:, :n].sum(axis=-1).mean()) for n in (1, 10, 100)}
  figures["entropy"] = float(-(share * np.log2(np.where(share > 0, share, 1))).sum(-1).mean())
  return figures | {"used": float((counts > 0).sum(axis=-1).mean())}
