"""Figures of a run, drawn from its rows alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from a2ats_jax.errors import UserError
from a2ats_jax.typing import Float
from eval.results import Row
from eval.tables import budget_label, label

LABELS: Mapping[str, str] = MappingProxyType(
  {
    "kl": "KL(full || method), nats a token",
    "top1": "top-1 agreement with full attention",
    "ppl": "perplexity",
    "score": "score, 0 to 1",
    "nll_diff": "NLL less full attention's, nats a token",
    "mass": "attention mass caught",
    "far_mass": "share of far attention mass caught",
    "topk_recall": "recall of the true top-k",
    "budget": "budget of a query head",
    "read": "share of the cache read",
    "moved_bytes": "bytes moved a token",
    "read_bytes": "MB read a step",
    "device_bytes": "MB held on the device",
  }
)
_LOG = ("kl", "moved_bytes")
_SHARES = ("top1", "score", "mass", "far_mass", "topk_recall")


def plot(rows: Sequence[Row], path: Path, *, y: str, x: str = "budget") -> None:
  """One figure against another: a panel for each task and length, a line for each method.

  Methods without a budget are drawn as a level where the scale allows it.

  Raises:
    UserError: no row holds both figures.
  """
  panels = list(dict.fromkeys((row["task"], row["T"]) for row in rows))
  if not any(row.get(x) is not None and row.get(y) is not None for row in rows):
    raise UserError(f"plot: no row holds both {x} and {y}")
  figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (task, length) in zip(axes, panels):
    mine = [r for r in rows if (r["task"], r["T"]) == (task, length) and r.get(y) is not None]
    lines: dict[str, list[Row]] = {}
    for row in mine:
      lines.setdefault(label(row, mine), []).append(row)
    for name, points in lines.items():
      _line(axis, name, points, x, y)
    axis.set(title=f"{task}, T = {length}", xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    if x != "read":
      axis.set_xscale("log")
    if x == "budget":
      ticks = sorted({r[x] for r in mine if r.get(x)})
      axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
      axis.minorticks_off()
    if y in _LOG:
      axis.set_yscale("log")
    elif y in _SHARES:
      axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(fontsize="small")
  figure.savefig(path, dpi=120)


def _line(axis: Any, label: str, points: Sequence[Row], x: str, y: str) -> None:
  drawn = sorted((p[x], p[y]) for p in points if p.get(x) and (p[y] > 0 or y not in _LOG))
  if drawn:
    axis.plot(*zip(*drawn), marker="o", label=label)
  elif y not in _LOG:
    axis.axhline(points[0][y], linestyle="--", color="0.5", label=label)


def pareto(rows: Sequence[Row], path: Path, *, x: str, y: str) -> None:
  """Quality against bytes: a panel for each task and length, a point for each method and budget,
  a grey line through those that no other beats in both.

  Full attention's bytes are a vertical line. KL is drawn from the smallest that is not nought.
  """
  panels = list(dict.fromkeys((row["task"], row["T"]) for row in rows))
  names = list(dict.fromkeys(label(row, rows) for row in rows))
  style = {name: (f"C{i % 10}", "osD^vPX*<>"[i // 10 % 10]) for i, name in enumerate(names)}
  figure = Figure(figsize=(4.6 * len(panels) + 2.2, 4.8), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (task, length) in zip(axes, panels):
    mine = [r for r in rows if (r["task"], r["T"]) == (task, length)]
    mine = [r for r in mine if r.get(x) and r.get(y) is not None]
    drawn = [r for r in mine if r["method"] != "full" and (y not in _LOG or r[y] > 0)]
    for name in names:
      points = sorted((r[x] / 1e6, r[y]) for r in drawn if label(r, rows) == name)
      if points:
        color, marker = style[name]
        axis.plot(*zip(*points), marker=marker, color=color, linewidth=0.8, label=name)
    best = frontier([(r[x] / 1e6, r[y]) for r in drawn], low=y in _LOG)
    if best:
      axis.step(*zip(*best), where="post", color="0.6", linewidth=2, alpha=0.6, zorder=0)
    for row in mine:
      if row["method"] == "full":
        axis.axvline(row[x] / 1e6, linestyle="--", color="0.4", label="full")
    axis.set(title=f"{task}, T = {length}", xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(LogFormatter())
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if y in _LOG:
      axis.set_yscale("log")
    else:
      axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
  handles = {n: h for axis in axes for h, n in zip(*axis.get_legend_handles_labels())}
  if handles:
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="x-small")
  figure.savefig(path, dpi=120)


def frontier(points: Sequence[tuple[float, float]], *, low: bool) -> list[tuple[float, float]]:
  """The points that no other beats in both, by rising cost.

  Args:
    points: cost and quality.
    low: whether less is the better quality.
  """
  best: list[tuple[float, float]] = []
  for cost, quality in sorted(points, key=lambda p: (p[0], p[1] if low else -p[1])):
    if not best or (quality < best[-1][1] if low else quality > best[-1][1]):
      best.append((cost, quality))
  return best


def by_position(rows: Sequence[Row], path: Path, *, y: str, x: str = "position") -> None:
  """A figure against position: a panel for each task and length, a line for each method and budget.

  A point stands in the middle of its bucket, with the standard error over texts where there is one.
  Full attention is dashed; a KL of nought has no place on a log scale.

  Args:
    x: what positions are of, for the axis.
  """
  panels = list(dict.fromkeys((row["task"], row["T"]) for row in rows))
  figure = Figure(figsize=(4.6 * len(panels) + 2.2, 4), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (task, length) in zip(axes, panels):
    lines: dict[str, list[Row]] = {}
    for row in rows:
      if (row["task"], row["T"]) == (task, length):
        granted = "" if row["budget"] is None else f", {budget_label(row)}"
        lines.setdefault(label(row, rows) + granted, []).append(row)
    for name, points in lines.items():
      drawn = [p for p in points if p[y] > 0 or y not in _LOG]
      if drawn:
        plain = drawn[0]["method"] == "full"
        axis.errorbar(
          [(p["begin"] + p["end"] - 1) / 2 for p in drawn],
          [p[y] for p in drawn],
          yerr=[p.get(f"{y}_se") or 0.0 for p in drawn],
          **({"linestyle": "--", "color": "0.5"} if plain else {"marker": "o"}),
          markersize=4,
          capsize=2,
          label=name,
        )
    axis.set(title=f"{task}, T = {length}", xlabel=x, ylabel=LABELS.get(y, y))
    if y in _LOG:
      axis.set_yscale("log")
    elif y in _SHARES:
      axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
  handles = {n: h for axis in axes for h, n in zip(*axis.get_legend_handles_labels())}
  if handles:
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="x-small")
  figure.savefig(path, dpi=120)


def speed(rows: Sequence[Row], path: Path, *, baselines: Sequence[str]) -> None:
  """Time of a step against the prompt's length: a panel for each dtype and batch, both scales log.

  Args:
    baselines: methods that are drawn dashed.
  """
  panels = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
  figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (dtype, batch) in zip(axes, panels):
    mine = [r for r in rows if (r["dtype"], r["batch"]) == (dtype, batch)]
    lines: dict[str, list[Row]] = {}
    for row in mine:
      granted = "" if row["budget"] is None else f", {budget_label(row)}"
      lines.setdefault(label(row, mine) + granted, []).append(row)
    for name, points in lines.items():
      points = sorted(points, key=lambda row: row["T"])
      plain = points[0]["method"] in baselines
      x, y = [row["T"] for row in points], [row["ms"] for row in points]
      (line,) = axis.plot(x, y, "--" if plain else "-", marker="o", markersize=4, label=name)
      low, high = ([row[f"ms_{end}"] for row in points] for end in ("low", "high"))
      axis.fill_between(x, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({row["T"] for row in mine})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_formatter(LogFormatter())
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set(
      title=f"{mine[0]['model']}, {dtype}, batch {batch}",
      xlabel="tokens of the prompt",
      ylabel="ms a step",
    )
    axis.title.set_fontsize("small")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
  figure.savefig(path, dpi=120)


def heatmaps(
  panels: Sequence[tuple[str, Float[np.ndarray, "L H"]]], path: Path, *, label: str
) -> None:
  """Layers by query heads, a panel each, on one colour scale from 0 to 1."""
  figure = Figure(figsize=(2.6 * len(panels) + 0.8, 3.8), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  image = None
  for axis, (title, values) in zip(axes, panels):
    image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis")
    axis.set_title(title, fontsize="small")
    axis.set(xlabel="query head", ylabel="layer")
    for side in (axis.xaxis, axis.yaxis):
      side.set_major_locator(MaxNLocator(integer=True))
  if image is not None:
    figure.colorbar(image, ax=list(axes), label=label)
  figure.savefig(path, dpi=120)
