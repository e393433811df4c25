"""The published decode step once more, in NumPy loops, written from the paper's rules alone.

Nothing here imports the package: tests compare the package with these functions. One row at a time,
float64, one token at a time, no cleverness. Shapes: keys and values ``[T, K, D]`` before rotary
embedding, queries ``[H, D]``, codes ``[T, K]``, codewords ``[K, C, D]`` in the space of the keys.
"""

import dataclasses
import math

import numpy as np


def rotate(x, position, inv_freq, scale=1.0):
  """One head vector turned by ``position``; plane j pairs dimension j with j + D/2."""
  x = np.asarray(x, np.float64)
  half = x.shape[-1] // 2
  out = np.empty_like(x)
  for j in range(half):
    angle = float(position) * float(inv_freq[j])
    c, s = math.cos(angle), math.sin(angle)
    out[j] = scale * (x[j] * c - x[j + half] * s)
    out[j + half] = scale * (x[j + half] * c + x[j] * s)
  return out


def encode(keys, codewords, metric):
  """The codeword nearest to each key under ``(k - c) H (k - c)^T``, the lowest index on ties.

  Returns:
    The codes, and by how much the best beat the second best.
  """
  keys = np.asarray(keys, np.float64)
  codewords = np.asarray(codewords, np.float64)
  codes, margins = [], []
  for key in keys:
    distances = []
    for codeword in codewords:
      error = key - codeword
      distances.append(float(error @ metric @ error))
    best = distances.index(min(distances))
    others = distances[:best] + distances[best + 1 :]
    codes.append(best)
    margins.append(min(others, default=math.inf) - distances[best])
  return np.array(codes, np.int64), np.array(margins)


def causal_attention(q, k, v, inv_freq, scale=1.0, window=None):
  """Naive causal attention of one row: ``q [T, H, D]``, ``k``, ``v`` ``[T, K, D]``.

  With a window, a query sees so many keys at most: its own and those just before it.
  """
  tokens, heads, size = q.shape
  group = heads // k.shape[1]
  out = np.zeros((tokens, heads, size))
  for h in range(heads):
    keys = [rotate(k[j, h // group], j, inv_freq, scale) for j in range(tokens)]
    for i in range(tokens):
      query = rotate(q[i, h], i, inv_freq, scale)
      first = 0 if window is None else max(i + 1 - window, 0)
      logits = np.array([query @ keys[j] for j in range(first, i + 1)]) / math.sqrt(size)
      weights = np.exp(logits - logits.max())
      out[i, h] = weights @ np.asarray(v[first : i + 1, h // group], np.float64) / weights.sum()
  return out


@dataclasses.dataclass(frozen=True)
class Segments:
  """Log-spaced ranges of a prompt's far part, then ranges of ``span`` tokens."""

  count: int
  span: int


def segment_range(segments, index, prompt, window):
  """First position of a segment and the one after its last (empty when they are equal)."""
  if index >= segments.count:
    start = prompt - window + (index - segments.count) * segments.span
    return start, start + segments.span
  if prompt <= window:
    return prompt - window, prompt - window
  edge = [
    round(window * (prompt / window) ** (j / segments.count)) for j in range(segments.count + 1)
  ]
  edge[0], edge[-1] = window, prompt
  return prompt - edge[segments.count - index], prompt - edge[segments.count - index - 1]


def segment_of(segments, position, prompt, window):
  """The only segment whose range holds the position."""
  found = []
  for index in range(segments.count + max(0, position - prompt + window) // segments.span + 1):
    start, end = segment_range(segments, index, prompt, window)
    if start <= position < end:
      found.append(index)
  (only,) = found
  return only


def representative(segments, index, prompt, window):
  """The middle position of a segment's range."""
  start, end = segment_range(segments, index, prompt, window)
  return (start + end - 1) // 2


@dataclasses.dataclass(frozen=True)
class Step:
  """What one decode step of one row gave.

  Attributes:
    out: ``[H, D]``.
    chosen: for each query head, the far tokens within its own budget.
    union: for each KV head, the far tokens any of its query heads chose.
    read: for each KV head, the tokens attended exactly: union, sinks and window.
    eligible: the far tokens, the same for every head.
    tail: for each query head, the share of attention that was estimated.
    gap: over the query heads, the smallest positive difference between the score of the last token
      chosen and of the first one left. Where it is tiny, float32 may choose otherwise.
  """

  out: np.ndarray
  chosen: list
  union: list
  read: list
  eligible: list
  tail: list
  gap: float


def granted(tokens, ratio=None, count=None):
  """k of a context of ``tokens`` tokens, the current one included."""
  return int(ratio * tokens) if ratio is not None else count


def eligible_tokens(tokens, window, sinks):
  """Tokens that are neither among the last ``window``, the current one included, nor sinks."""
  current = tokens - 1
  return [t for t in range(tokens) if current - t >= window and t >= sinks]


def decode_step(
  q,
  keys,
  values,
  codes,
  codewords,
  inv_freq,
  *,
  k,
  scale=1.0,
  window=64,
  sinks=8,
  distance=2048,
  segments=None,
  prompt=None,
  tail=False,
  eligible=None,
  score=None,
  exact_scores=False,
  shared=False,
):
  """One query token at position T-1 over T cached tokens, itself included.

  Args:
    k: far tokens each query head may choose.
    scale: multiplier of every rotated vector (yarn).
    distance: the constant b; ignored with segments.
    segments: :class:`Segments`, with ``prompt`` the prompt's length.
    tail: estimate the far tokens that were not chosen.
    eligible: other far tokens than the rule's, for wrong variants.
    score: ``(query, key_vector, token) -> number``, for wrong variants.
    exact_scores: rank by the exact logits instead of the codewords' (the oracle).
    shared: ``k`` tokens for every KV head, by the largest share of far attention in its group.
  """
  tokens, kv_heads, size = np.shape(keys)
  heads = np.shape(q)[0]
  group = heads // kv_heads
  current = tokens - 1
  if eligible is None:
    eligible = eligible_tokens(tokens, window, sinks)
  always = [t for t in range(tokens) if t not in set(eligible)]
  zone = {
    t: 0 if segments is None else segment_of(segments, t, prompt, window) for t in range(tokens)
  }

  def far_score(h, t):
    kv = h // group
    if exact_scores:
      query = rotate(q[h], current, inv_freq, scale)
      return float(query @ rotate(keys[t][kv], t, inv_freq, scale))
    codeword = np.asarray(codewords[kv][codes[t][kv]], np.float64)
    if score is not None:
      return float(score(q[h], codeword, t))
    away = distance
    if segments is not None:
      away = current - representative(segments, zone[t], prompt, window)
    return float(scale * scale * (rotate(q[h], away, inv_freq) @ codeword))

  chosen, gap, table = [], math.inf, []
  for h in range(heads):
    table.append({t: far_score(h, t) for t in eligible})
  ranked = table
  if shared:
    ranked = []
    for h in range(heads):
      best = {}
      for other in range(h // group * group, (h // group + 1) * group):
        logits = {t: table[other][t] / math.sqrt(size) for t in eligible}
        peak = max(logits.values(), default=0.0)
        total = peak + math.log(sum(math.exp(x - peak) for x in logits.values()) or 1.0)
        best = {t: max(best.get(t, -math.inf), logits[t] - total) for t in eligible}
      ranked.append(best)
  for h in range(heads):
    kv = h // group
    scores = ranked[h]
    if exact_scores:
      cell = dict.fromkeys(eligible, 0)
    else:
      cell = {t: (zone[t], int(codes[t][kv])) for t in eligible}
      if segments is not None:  # what follows the prompt's far part: each token a cell of its own
        cell |= {t: (zone[t], 0) for t in eligible if zone[t] >= segments.count}
    order = sorted(eligible, key=lambda t, s=scores, c=cell: (-s[t], c[t], t))
    chosen.append(set(order[:k]))
    if 0 < k < len(order) and scores[order[k - 1]] > scores[order[k]]:
      gap = min(gap, scores[order[k - 1]] - scores[order[k]])

  union, read, estimated = [], [], []
  out = np.zeros((heads, size))
  for kv in range(kv_heads):
    members = range(kv * group, (kv + 1) * group)
    union.append(set().union(*(chosen[h] for h in members)))
    read.append(union[-1] | set(always))
    rest = [t for t in eligible if t not in union[-1]] if tail else []
    mean = {}
    for code in {int(codes[t][kv]) for t in rest}:
      alike = [np.asarray(values[t][kv], np.float64) for t in eligible if codes[t][kv] == code]
      mean[code] = sum(alike) / len(alike)
    for h in members:
      query = rotate(q[h], current, inv_freq, scale)
      logits, rows = [], []
      for t in sorted(read[-1]):
        logits.append(float(query @ rotate(keys[t][kv], t, inv_freq, scale)) / math.sqrt(size))
        rows.append(np.asarray(values[t][kv], np.float64))
      for t in rest:
        logits.append(table[h][t] / math.sqrt(size))
        rows.append(mean[int(codes[t][kv])])
      weights = np.exp(np.array(logits) - max(logits))
      out[h] = sum(w * row for w, row in zip(weights, rows, strict=True)) / weights.sum()
      estimated.append(weights[len(read[-1]) :].sum() / weights.sum())
  return Step(
    out=out,
    chosen=chosen,
    union=union,
    read=read,
    eligible=eligible,
    tail=estimated,
    gap=gap,
  )


def turned(x: np.ndarray, rope, first: int = 0) -> np.ndarray:
  """``[T, heads, D]`` rotated by position, float64."""
  position = first + np.arange(len(x))[:, None, None]
  angle = position * np.asarray(rope.inv_freq, np.float64)
  cos, sin = np.cos(angle) * float(rope.scale), np.sin(angle) * float(rope.scale)
  a, b = np.split(x.astype(np.float64), 2, axis=-1)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
