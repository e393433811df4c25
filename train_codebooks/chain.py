"""The numbering of codewords: a greedy nearest-neighbour chain."""

import numpy as np

from a2ats_jax.typing import Float, Int


def chain(codewords: Float[np.ndarray, "C D"]) -> Int[np.ndarray, "C"]:
  """An order of one head's codewords in which each is followed by the nearest one left.

  Tokens lie in host memory sorted by code. Queries choose codewords that are close to each other,
  so close numbers mean fewer pages to fetch.

  Args:
    codewords: in whitened space. The chain starts at the one furthest from their mean.
  Returns:
    A permutation: the old number of each new one.
  """
  x = codewords.astype(np.float64) - codewords.mean(axis=0, dtype=np.float64)
  square = np.einsum("cd,cd->c", x, x)
  # half the squared distance, less what is constant along a row
  rest = (0.5 * square[None, :] - x @ x.T).astype(np.float32)
  left = np.zeros(len(x), np.float32)
  order = np.empty(len(x), np.int64)
  now = int(square.argmax())
  for place in range(len(x)):
    order[place] = now
    left[now] = np.inf
    now = int((rest[now] + left).argmin())
  return order
