"""A plan as result rows, as a table, and what its figures rest on."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from a2ats_jax.methods import registry
from a2ats_jax.plan import (
  WINDOWS,
  Case,
  Paged,
  chosen,
  estimate,
  largest_batch,
  prefill_bytes,
  shared,
)
from a2ats_jax.plan_known import Chip
from a2ats_jax.plan_mesh import ONE_DEVICE, Cut

# What a row tells of all devices together; the rest is of one.
_OF_ALL = (
  *("batch", "tokens_per_s", "ideal_tokens_per_s"),
  *("max_batch", "max_batch_tokens_per_s", "max_batch_ideal_tokens_per_s"),
)

# The parts of an estimate that a result row holds in one figure.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
  {
    "weights": ("weights",),
    "cache": ("keys and values", "pages"),
    "codebook": ("codebooks",),
    "index": (
      *(
        "counts and first pages of cells",
        "cell and rank of every slot",
        "page edges",
        "codes of later tokens",
      ),
      "row tables",
    ),
    "near": ("sinks and recent tokens", WINDOWS),
    "sums": ("value sums of codewords",),
  }
)


def rows(
  case: Case,
  spec: registry.MethodSpec,
  method: Paged | None,
  *,
  model: str,
  device: str,
  chip: Chip,
  host: float = math.inf,
  cut: Cut = ONE_DEVICE,
) -> list[dict[str, Any]]:
  """Flat result rows: full attention, and the method if it is another.

  Args:
    model, device: their names, for the record.
    host: bytes of host memory, of all hosts together, which bound the largest batch.
    cut: over a mesh. Bytes, operations and times are those of one device; batches and tokens a
      second those of all.

  Raises:
    UserError: rows or KV heads that the mesh does not divide.
  """
  full = registry.parse_method("full")
  asked = [(full, None)] if method is None else [(full, None), (spec, method)]
  part, host = cut.part(case), host / cut.devices
  seconds = estimate(part, None).seconds(chip)
  common = {
    "mesh": str(cut),
    "collective_bytes": cut.collective_bytes(case),
  }
  found = [_row(part, s, m, model, device, chip, host, seconds) | common for s, m in asked]
  for row in found:
    for key in _OF_ALL:
      row[key] = row[key] and row[key] * cut.batch
  return found


def _row(
  case: Case,
  spec: registry.MethodSpec,
  m: Paged | None,
  model: str,
  device: str,
  chip: Chip,
  host: float,
  baseline: float,
) -> dict[str, Any]:
  of, most = estimate(case, m), largest_batch(case, m, chip, host)
  best = estimate(dataclasses.replace(case, batch=most), m) if most else None
  seconds, ideal = of.seconds(chip), of.ideal_seconds(chip)
  far = None if m is None else chosen(case, m)
  return {
    "benchmark": "plan",
    "model": model,
    "device": device,
    "method": spec.name,
    "options": spec.options_text,
    "T": case.prompt,
    "new": case.new,
    "batch": case.batch,
    "dtype": case.dtype,
    "cache_dtype": case.cache_dtype,
    "budget": None if m is None else str(m.budget),
    "codewords": None if m is None else m.codewords,
    "union": None if m is None else m.union,
    "spread": None if m is None else m.spread,
    "read": of.read,
    "pages": None if far is None else far.pages,
    **{f"{name}_bytes": sum(of.device.get(p, 0) for p in parts) for name, parts in GROUPS.items()},
    "temp_bytes": of.temporary,
    "device_bytes": of.device_bytes,
    "host_bytes": of.host,
    "memory_bytes": int(chip.memory),
    "fits": of.device_bytes <= chip.memory and of.host <= host,
    "prefill_bytes": prefill_bytes(case),
    "traffic_bytes": sum(of.traffic.values()),
    "moved_bytes": of.moved,
    "flops": of.flops,
    "ms": seconds * 1e3,
    "ideal_ms": ideal * 1e3,
    "tokens_per_s": case.batch / seconds,
    "ideal_tokens_per_s": case.batch / ideal,
    "baseline": "full",
    "baseline_ms": baseline * 1e3,
    "ratio": baseline / seconds,
    "max_batch": most,
    "max_batch_host_bytes": best.host if best else None,
    "max_batch_ms": best.seconds(chip) * 1e3 if best else None,
    "max_batch_tokens_per_s": most / best.seconds(chip) if best else None,
    "max_batch_ideal_tokens_per_s": most / best.ideal_seconds(chip) if best else None,
  }


def amount(size: float | int) -> str:
  """Bytes in decimal units: 17.18 GB is 17.18e9 bytes."""
  for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if size >= scale:
      return f"{size / scale:,.2f} {unit}"
  return f"{size:,.0f} B" if size else "0"


LINES: Mapping[str, tuple[str, Callable[[Any], str]]] = MappingProxyType(
  {
    "weights_bytes": ("device: weights", amount),
    "cache_bytes": ("  keys and values", amount),
    "codebook_bytes": ("  codebooks", amount),
    "index_bytes": ("  index", amount),
    "near_bytes": ("  sinks and recent tokens", amount),
    "sums_bytes": ("  value sums of codewords", amount),
    "temp_bytes": ("  temporary", amount),
    "device_bytes": ("  together", amount),
    "host_bytes": ("host: pages", amount),
    "fits": ("fits", lambda x: "yes" if x else "no"),
    "read": ("step: cached tokens attended exactly", lambda x: f"{x:.1%}"),
    "traffic_bytes": ("  device memory traffic", amount),
    "moved_bytes": ("  moved from the host", amount),
    "collective_bytes": ("  added up with other devices", amount),
    "flops": ("  operations", lambda x: f"{x / 1e9:,.1f} GFLOP"),
    "ms": ("  at least, copies waited for", lambda x: f"{x:,.2f} ms"),
    "ideal_ms": ("  at least, copies overlapped", lambda x: f"{x:,.2f} ms"),
    "tokens_per_s": ("  at most, copies waited for", lambda x: f"{x:,.0f} tokens/s"),
    "max_batch": ("largest batch that fits", lambda x: f"{x:,}"),
    "max_batch_host_bytes": ("  host: pages", amount),
    "max_batch_tokens_per_s": ("  at most, copies waited for", lambda x: f"{x:,.0f} tokens/s"),
    "max_batch_ideal_tokens_per_s": (
      "  at most, copies overlapped",
      lambda x: f"{x:,.0f} tokens/s",
    ),
  }
)
NEW_SECTION = ("host_bytes", "read", "max_batch")  # a blank line before each
IF_IT_FITS = ("ms", "ideal_ms", "tokens_per_s")


def table(found: Sequence[Mapping[str, Any]]) -> Table:
  """Result rows as columns side by side."""
  out = Table(box=None, header_style="bold", pad_edge=False)
  out.add_column("")
  for row in found:
    out.add_column(row["method"], justify="right", no_wrap=True)
  for key, (name, show) in LINES.items():
    if key == "collective_bytes" and not any(row[key] for row in found):
      continue  # one device, or rows alone are cut
    if key in NEW_SECTION:
      out.add_row()
    absent = [row[key] is None or (key in IF_IT_FITS and not row["fits"]) for row in found]
    out.add_row(name, *("-" if no else show(row[key]) for no, row in zip(absent, found)))
  return out


def notes(
  case: Case, spec: registry.MethodSpec, method: Paged | None, chip: Chip, cut: Cut = ONE_DEVICE
) -> list[str]:
  """What the figures rest on, a paragraph each."""
  whole, case = case, cut.part(case)
  lines = [
    f"Device: {amount(chip.memory)}, {amount(chip.memory_rate)}/s, {chip.flops / 1e12:,.0f} "
    f"TFLOP/s ({chip.source}); host link {amount(chip.link_rate)}/s ({chip.link}). Nominal rates: "
    "no program reaches them."
  ]
  if case.prompt + case.new > case.config.context:
    lines.append(f"The model states a context of {case.config.context:,} tokens, fewer than these.")
  if cut.devices > 1:
    lines.append(
      f"Mesh {cut}: {whole.batch:,} rows over {cut.batch}, {whole.config.kv_heads} KV heads over "
      f"{cut.heads}. Bytes, operations and times are those of one of {cut.devices} devices, its "
      "pages in the memory of its host; batches and tokens/s those of all. Times leave out what "
      "devices add up with each other."
    )
  if method is not None:
    far, heads = chosen(case, method), case.batch * case.config.kv_heads
    lines += [
      f"Method: {spec}, budget {method.budget}, {method.codewords:,} codewords.",
      f"Fetched, of a KV head in a layer: {far.tokens:,.0f} far tokens are chosen, on "
      f"{far.pages:,} pages of {method.page}; whole stages, and quarters at the end, move "
      f"{far.moved / heads:,.0f}. Assumed: a group "
      f"chooses {shared(case, method):g} times what one head is granted (--union), and pages hold "
      f"{method.spread:g} times the tokens chosen (--spread: 2.0 was measured on SmolLM2-135M at "
      "8K tokens and 3%, pages of 16; measure it for others).",
      "Copies waited for: a layer's pages are copied after its scores and before its attention, "
      "as the step does now. Copies overlapped: the ideal, which no step here reaches.",
    ]
  lines.append(
    f"While prompts run they need at least {amount(prefill_bytes(case))} more, all rows at once; "
    "the largest batch does not count that."
  )
  return lines


def show(found: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
  """Print rows as a table, then notes; as wide as they want where stdout is no terminal."""
  console = Console() if sys.stdout.isatty() else Console(width=120)
  first = found[0]
  title = (
    f"{first['model']}, {first['T']:,} tokens of prompt and {first['new']:,} new ones, batch "
    f"{first['batch']:,}, {first['dtype']}, cache {first['cache_dtype']}, on {first['device']}"
    f"{'' if first['mesh'] == '1x1' else ', mesh ' + first['mesh']}"
  )
  console.print(title, highlight=False, markup=False, style="italic")
  console.print(table(found))
  for note in notes:
    console.print()
    console.print(note, highlight=False, markup=False)
