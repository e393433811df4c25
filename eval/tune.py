"""Tile sizes tried on the device at hand: each checked against the reference, all timed in turn."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from a2ats_jax.budget import Budget
from a2ats_jax.codebook import make_codebook
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.files import write_atomically
from a2ats_jax.index import places_of
from a2ats_jax.methods.a2ats import A2ATS, ring_of
from a2ats_jax.models.config import ModelConfig
from a2ats_jax.ops import stored_tiles
from a2ats_jax.ops.vq_encode import MANY
from eval.kernels import Family, KernelCase, LayerCase, cases
from eval.options import Progress
from eval.results import Row
from eval.timing import interleaved, summary

WARMUP = 1  # rounds left out
_STORE = 4096  # pages of a KV head in all rows: more than any cache holds, and quick to draw

# What interpreters can run in seconds.
SMALLEST = LayerCase(
  heads=4,
  kv_heads=2,
  head_dim=64,
  codewords=16,
  page=16,
  batch=1,
  pages=4,
  blocks=2,
  fetched=2,
  near=3,
  near_page=8,
  cells=130,
  edges=8,
  keys=64,
  dtype="float32",
)


def layer_of(
  config: ModelConfig,
  *,
  T: int,
  new: int,
  batch: int,
  page: int,
  budget: Budget,
  codewords: int,
  dtype: str,
) -> LayerCase:
  """A layer of a model as a step of A2ATS sees it.

  Args:
    T: tokens of each row's prompt. new: room after it. batch: rows.
    page: tokens a page.
    budget: of far tokens, from which follows how many pages are fetched at once.
    dtype: of keys and values.
  """
  if min(T, batch, page, codewords) < 1 or new < 0:
    raise UserError(
      "kernels: expected T, batch, page and codewords of at least 1, got "
      f"{T}, {batch}, {page} and {codewords}"
    )
  shape = (1, config.kv_heads, 1, config.head_dim)
  eye = jnp.broadcast_to(jnp.eye(config.head_dim), (1, config.kv_heads, *(config.head_dim,) * 2))
  method = A2ATS(codebook=make_codebook(jnp.zeros(shape), eye), budget=budget, page=page)
  each = 2 * page * config.head_dim * jnp.dtype(dtype).itemsize
  held = -(-T // page) + -(-new // page)
  heads = batch * config.kv_heads
  stage = method.stage_of(T + new, heads=heads, pages=held, page_bytes=each)
  near_page = math.gcd(A2ATS.sinks, page)
  return LayerCase(
    heads=config.heads,
    kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    codewords=codewords,
    page=page,
    batch=batch,
    pages=min(held, max(_STORE // batch, 1)),
    blocks=stage.blocks,
    fetched=stage.size,
    near=(A2ATS.sinks + ring_of(A2ATS.window, page)) // near_page,
    near_page=near_page,
    cells=FarPosition.segments(8).cells(A2ATS.window, new, codewords),
    edges=places_of(-(-T // page)),
    keys=min(batch * T, MANY),
    dtype=dtype,
  )


def run(
  layers: Sequence[LayerCase],
  family: Family,
  *,
  rounds: int,
  repeat: int,
  interpret: bool = False,
  most: int | None = None,
  progress: Progress | None = None,
) -> list[Row]:
  """Try the tiles of every op at every shape.

  Args:
    rounds: timed; in each every candidate runs once.
    repeat: calls in one run, one after the other on the device.
    interpret: on the CPU; the times are then the interpreter's.
    most: candidates of an op at most, the choice by shape first.
    progress: called after every op.

  Returns:
    A row a candidate: ``tiles``, ``by_shape`` (whether it is what is taken without a file),
    ``problem`` where it does not compile or is not the reference, else ``ms`` of a call with
    quartiles; and ``best`` on one row an op.
  """
  if rounds < 1 or repeat < 1:
    raise UserError(f"tune: expected rounds and repeat of at least 1, got {rounds} and {repeat}")
  every = [case for layer in layers for case in cases(layer, family, interpret=interpret)]
  # Once a shape: what a prompt encodes is the same at every batch.
  found = {stored_tiles.key_of({"op": case.op, "shape": case.shape}): case for case in every}
  rows: list[Row] = []
  for done, case in enumerate(found.values()):
    rows += _try(case, family, case.candidates()[:most], rounds, repeat)
    if progress is not None:
      progress("tiles", done + 1, len(found))
  return rows


def _try(
  case: KernelCase, family: Family, candidates: Sequence[Any], rounds: int, repeat: int
) -> list[Row]:
  programs, rows = {}, []
  for place, tiles in enumerate(candidates):
    row: Row = {
      "benchmark": "tune",
      "op": case.op,
      "note": case.note,
      "kernel": family,
      "shape": dict(case.shape),
      "tiles": dataclasses.asdict(tiles),
      "by_shape": place == 0,
    }
    rows.append(row)
    got = case.attempt(lambda *args, t=tiles: case.kernel(*args, tiles=t), repeat)
    if isinstance(got, str):
      row["problem"] = got
    else:
      programs[str(place)] = got
  for place, times in interleaved(programs, rounds=rounds, warmup=WARMUP).items():
    rows[int(place)] |= summary(times / repeat)
  if (winner := _best(rows)) is not None:
    winner["best"] = True
  return rows


def _best(rows: Sequence[Row]) -> Row | None:
  """The lowest median; the choice by shape unless three quarters of its rival's times beat it."""
  timed = [row for row in rows if "ms" in row]
  if not timed:
    return None
  fastest, first = min(timed, key=lambda row: row["ms"]), timed[0]
  return first if first["by_shape"] and fastest["ms_high"] >= first["ms"] else fastest


def store(rows: Sequence[Row], path: Path, *, kind: str, versions: str) -> int:
  """Write the best tiles to a file, beside those of other shapes that it holds.

  Args:
    rows: of :func:`run` on this device.
    kind: of the device.
    versions: that the times were taken with.

  Returns:
    Ops and shapes written.

  Raises:
    UserError: there is another kind of file.
  """
  lines = []
  for row in rows:
    if row.get("best"):
      same = [r for r in rows if (r["op"], r["shape"]) == (row["op"], row["shape"])]
      first = next(r for r in same if r["by_shape"])
      line = {name: row[name] for name in ("op", "kernel", "shape", "tiles")}
      line |= {name: row[name] for name in ("ms", "ms_low", "ms_high")}
      line |= {"by_shape": first["tiles"], "by_shape_ms": first.get("ms"), "versions": versions}
      lines.append(line)
  mine = {stored_tiles.key_of(line) for line in lines}
  old = stored_tiles.read(path, kind=kind) if path.exists() else []
  kept = [line for line in old if stored_tiles.key_of(line) not in mine]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, stored_tiles.text_of([*kept, *lines], kind=kind))
  return len(lines)
