"""QAQ against a plain reading: the bits of every token at every step, and what they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a2ats_jax import planes
from a2ats_jax.errors import UserError
from a2ats_jax.methods import registry
from a2ats_jax.methods.base import Geometry, PromptLayer
from a2ats_jax.methods.qaq import QAQ
from a2ats_jax.rope import rotate
from tests import cases
from tests.test_planes import told

PAIRS = dataclasses.replace(cases.PAIRS, new=31)
TRIPLES = cases.Shape(
  batch=2, layers=1, heads=6, kv_heads=2, head_dim=16, codewords=3, prompt=17, new=31
)
STEPS = 30
LOOSE = QAQ(bits=6, least=0, most=6, window=4, key_error=0.03, value_error=0.02)
TIGHT = QAQ(bits=3, least=1, most=7, window=5, key_error=1e-4, value_error=0.004)
ALONE = QAQ(bits=2, least=2, most=5, window=1, outliers=0, key_error=0.1, value_error=0.01)
METHODS = {"loose": LOOSE, "tight": TIGHT, "alone": ALONE}


decode = jax.jit(planes.decode)


class Head:
  """One KV head of one row and layer, token by token.

  Attributes:
    bits: of every token, its key and its value.
    lost: bits that there was no room for.
  """

  def __init__(self, method: QAQ, cache, layer: int, row: int, head: int):
    self.m, side = method, method.outliers
    group = cache.shape.heads // cache.shape.kv_heads
    positions = np.arange(cache.q.shape[2], dtype=np.int32)[None]

    def turned(x: np.ndarray) -> np.ndarray:
      turned = rotate(jnp.asarray(x[layer, row][None]), jnp.asarray(positions), cache.rope)
      return np.asarray(turned[0], np.float64)

    self.q = turned(cache.q)[:, head * group : (head + 1) * group]
    self.pairs = np.stack([turned(cache.k)[:, head], cache.v[layer, row, :, head]], axis=1)
    self.slots = 2 * (method.bits * cache.shape.geometry.capacity + method.most * method.window)
    length = int(cache.lengths[row])
    self.rows: list[np.ndarray] = []
    for now in range(max(length - method.window, 0), length):
      self.rows.append(self.weights(now, self.pairs[: now + 1, 0]).max(axis=0))
    norms = np.sort((self.q[max(length - 32, 0) : length] ** 2).sum(axis=-1).ravel())
    self.norm = norms[int(np.ceil(0.9 * len(norms))) - 1]
    self.bits = np.full((length, 2), method.most)
    self.lost = 0
    self.told = functools.cache(lambda t, which, bits: told(self.pairs[t, which], bits, side))
    self.settle()

  def weights(self, now: int, keys: np.ndarray) -> np.ndarray:
    logit = self.q[now] @ keys.T * keys.shape[1] ** -0.5
    weight = np.exp(logit - logit.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)

  def asked(self, t: int, which: int, attention: float) -> int:
    """Section 9 of the paper's notes: bits of a key (0) or a value (1)."""
    tokens = len(self.bits)
    if t > tokens - self.m.window:
      return self.m.most
    spread = self.told(t, which, 0)[1]
    if which == 0:
      inner = tokens**3 / max(tokens - 1, 1) * self.m.key_error**2 + 1
      sigma = np.sqrt(np.log(inner) / self.norm)
    else:
      sigma = self.m.value_error / (np.sqrt(tokens) * attention) if attention else np.inf
    bits = np.ceil(np.log2(spread / (2 * np.sqrt(12) * sigma) + 1))
    return int(np.clip(bits, self.m.least, self.m.most))

  def settle(self) -> None:
    """Lower what the rule asks less of; then, least attention last, hand out what there is."""
    tokens = len(self.bits)
    attention = np.zeros(tokens)
    for row in self.rows[-self.m.window :]:
      attention[: len(row)] = np.maximum(attention[: len(row)], row.astype(np.float16))
    want = self.bits.copy()
    for t, which in np.ndindex(want.shape):
      want[t, which] = min(want[t, which], self.asked(t, which, attention[t]))
    left = self.slots - 2 * self.m.most - 2 * self.m.least * tokens
    newest = tokens - self.m.window
    for t in sorted(range(tokens), key=lambda t: (-np.inf if t > newest else -attention[t], t)):
      for which in (0, 1):
        more = min(want[t, which] - self.m.least, left)
        self.bits[t, which] = self.m.least + more
        left -= more
    self.lost += (want - self.bits).sum()

  def numbers(self) -> np.ndarray:
    """What is read of every token, ``[T, 2, D]``."""
    out = np.empty((len(self.bits), *self.pairs.shape[1:]))
    for t, which in np.ndindex(self.bits.shape):
      out[t, which] = self.told(t, which, int(self.bits[t, which]))[0]
    return out

  def step(self) -> tuple[np.ndarray, float]:
    """The outputs of the group's query heads, and bytes read."""
    now, dim = len(self.bits), self.pairs.shape[2]
    self.bits = np.concatenate([self.bits, [[self.m.most] * 2]])
    read = self.numbers()
    weight = self.weights(now, read[:, 0])
    beside = 2 * (1 + 2 + 2 + 2 * self.m.outliers * 3) + 2 * self.m.window
    size = self.bits.sum() * dim / 8 + (now + 1) * beside
    self.rows.append(weight.max(axis=0))
    self.settle()
    return weight @ read[:, 1], size


def compare(method: QAQ, right: QAQ, cache) -> list[Head]:
  """Bits exactly, numbers one by one, outputs and bytes, at every step of every head."""
  shape = cache.shape
  heads = {
    place: Head(right, cache, *place)
    for place in np.ndindex(shape.layers, shape.batch, shape.kv_heads)
  }
  group = shape.heads // shape.kv_heads
  for layer, _, out, state, stats, _ in cases.run_steps(method, cache, STEPS):
    pool = jax.tree.map(lambda x, layer=layer: x[layer], state.pool)
    numbers = np.asarray(decode(pool))
    for row, head in np.ndindex(shape.batch, shape.kv_heads):
      it = heads[layer, row, head]
      want, size = it.step()
      np.testing.assert_allclose(
        out[row, 0, head * group : (head + 1) * group], want, atol=cases.TOLERANCE, rtol=0
      )
      assert stats.read_bytes[row, 0, head] == size
      bits = np.asarray(pool.bits[row, head]).reshape(-1, 2)
      np.testing.assert_array_equal(bits[: len(it.bits)], it.bits)
      assert not np.any(bits[len(it.bits) :])
      got = numbers[row, head].reshape(-1, 2, shape.head_dim)[: len(it.bits)]
      np.testing.assert_allclose(got, it.numbers(), atol=cases.TOLERANCE, rtol=0)
  return list(heads.values())


def pairs(seed: int):
  return cases.draw_cache(PAIRS, seed=seed, lengths=[40, 13, 1], rope="yarn")


@pytest.mark.parametrize("shape", ["pairs", "triples"])
@pytest.mark.parametrize("name", METHODS)
def test_equals_a_plain_reading(name, shape):
  """Where there is room for what the rule asks, where there is not, and without a window."""
  cache = pairs(5)
  if shape == "triples":
    cache = cases.draw_cache(TRIPLES, seed=6, lengths=[17, 4], rope="llama3")
  heads = compare(METHODS[name], METHODS[name], cache)
  lost = sum(head.lost for head in heads)
  assert {"loose": lost == 0, "tight": lost > 50, "alone": True}[name]
  if name != "alone":
    for which in (0, 1):  # keys and values alike have bits of many kinds
      assert len({b for head in heads for b in head.bits[:, which].tolist()}) >= 4


@pytest.mark.parametrize(
  "wrong",
  [
    {"least": 2},
    {"most": 8},
    {"bits": 4},
    {"window": 4},
    {"outliers": 0},
    {"key_error": 1e-2},
    {"value_error": 0.005},
  ],
  ids=str,
)
def test_wrong_options_are_caught(wrong):
  with pytest.raises(AssertionError):
    compare(dataclasses.replace(TIGHT, **wrong), TIGHT, pairs(7))


def by_hand(method: QAQ):
  """Four tokens whose last query attends to each alike: |Q|^2 = 1 and S = 1/4.

  Ranges of keys are 5, 7, 1 and 15, of values 6, 8, 2 and 1/2.
  """
  x = np.zeros((1, 4, 2, 1, 8), np.float32)
  x[0, :, 0, 0, 1] = [5, 7, 1, 15]
  x[0, :, 1, 0, 1] = [6, 8, 2, 0.5]
  queries = np.zeros((1, 32, 1, 8), np.float32)
  queries[0, 28:, 0, 7] = 1
  keys = jnp.asarray(x[:, :, 0])
  prompt = PromptLayer(
    keys=keys,
    rotated=keys,
    values=jnp.asarray(x[:, :, 1]),
    lengths=jnp.asarray([4], jnp.int32),
    queries=jnp.asarray(queries),
  )
  geometry = Geometry(batch=1, layers=1, heads=1, kv_heads=1, head_dim=8, prompt=4, new=2)
  state = cases.absorb(method, method.init(geometry), prompt, jnp.asarray(0, jnp.int32))
  return state, np.asarray(state.pool.bits[0, 0, 0])


def test_bits_by_hand():
  """Budgets so that e is 1 for keys and 1/2 for values: ceil log2 of 3.5, 4.5, 1.5, 8.5 for keys
  (range / 2 + 1) and of 7, 9, 3, 1.5 for values (range + 1)."""
  method = QAQ(
    bits=4,
    least=1,
    most=4,
    window=1,
    outliers=0,
    key_error=(3 / 64 * (np.exp(1 / 12) - 1)) ** 0.5,
    value_error=1 / (4 * 12**0.5),
  )
  state, bits = by_hand(method)
  np.testing.assert_array_equal(bits, [2, 3, 3, 4, 1, 2, 4, 1, 0, 0, 0, 0])
  np.testing.assert_array_equal(state.weights[0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25, 0, 0])
  # A range of 5 in 4 cells, of 6 in 8: the first key's 5 and 0s, the first value's 6 and 0s.
  first = np.asarray(planes.decode(state.pool))[0, 0, 0, :2, :2]
  np.testing.assert_array_equal(first, [[0.625, 4.375], [0.375, 5.625]])


def test_a_full_pool_by_hand():
  """1 bit a number for 6 slots and 4 for one newest token are 20 planes; 8 wait for the next key
  and value, 8 are the least of 4 tokens, and the other 4 go to the first tokens: all attend alike.
  """
  method = QAQ(
    bits=1,
    least=1,
    most=4,
    window=1,
    outliers=0,
    key_error=(3 / 64 * (np.exp(1 / 12) - 1)) ** 0.5,
    value_error=1 / (4 * 12**0.5),
  )
  state, bits = by_hand(method)
  assert state.pool.planes.shape == (1, 1, 1, 20, 1)
  np.testing.assert_array_equal(bits, [2, 3, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ({"least": 5}, "least 5, bits 3 and most 4"),
    ({"bits": 5}, "least 2, bits 5 and most 4"),
    ({"bits": 25, "most": 25}, "<= 24"),
    ({"least": 0, "bits": 0, "most": 0}, "most at least 1"),
    ({"window": 0}, "window must be at least 1 query"),
    ({"outliers": -1}, "outliers 0 or more"),
    ({"key_error": 0.0}, "key_error 0.0"),
    ({"value_error": float("nan")}, "value_error nan"),
  ],
  ids=str,
)
def test_bad_options_are_refused(option, message):
  with pytest.raises(UserError, match=message):
    QAQ(**option)


@pytest.mark.parametrize(("dim", "outliers"), [(12, 1), (8, 4), (264, 1)])
def test_head_sizes_that_cannot_be_stored_are_refused(dim, outliers):
  geometry = Geometry(batch=1, layers=1, heads=1, kv_heads=1, head_dim=dim, prompt=4, new=2)
  with pytest.raises(UserError, match=f"got {dim} and twice {outliers}"):
    QAQ(outliers=outliers).init(geometry)


@pytest.mark.parametrize("text", ["0", "0.0", "-1", "1e3", "", ".", "nan"])
def test_errors_are_decimal_numbers_above_0(text):
  with pytest.raises(UserError, match="expected a number above 0"):
    registry.parse_method(f"qaq:key_error={text}")


def test_a_registered_method_has_the_options_asked_for():
  spec = registry.parse_method("qaq:bits=2:least=1:key_error=.5:value_error=10:outliers=0")
  got = registry.build(spec)
  assert got == QAQ(bits=2, least=1, key_error=0.5, value_error=10.0, outliers=0)
