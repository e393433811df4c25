"""Finished runs as one page: tables, pictures, settings and the commands that made them.

The page is a single HTML file that loads nothing, or Markdown with the pictures left beside it.
"""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.figure import Figure

from a2ats_jax.errors import UserError
from a2ats_jax.files import CONFIG, write_atomically
from a2ats_jax.typing import Float
from eval import tables
from eval.compare import columns, side_by_side
from eval.results import METRICS, PREDICTIONS, Row

COMMAND = "command.txt"  # what was typed, in a run's directory
HTML, MARKDOWN = "report.html", "report.md"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDir:
  """A run's directory.

  Attributes:
    name: below the directory that was asked for.
    config: resolved.
    environment: versions and platform; empty where the run has not finished.
    rows: results; none where it has not finished.
    lines: finished prompts.
    command: that made it; empty where it was not typed.
  """

  name: str
  path: Path
  config: Mapping[str, Any]
  environment: Mapping[str, Any]
  rows: Sequence[Row]
  lines: Sequence[Row]
  command: str

  @property
  def finished(self) -> bool:
    """Whether there are results."""
    return bool(self.environment)

  @property
  def pictures(self) -> list[Path]:
    """The run's own plots."""
    return sorted(self.path.glob("*.png"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table as text.

  Attributes:
    title: may be empty.
    numeric: columns that are set right.
  """

  title: str
  head: Sequence[str]
  body: Sequence[Sequence[str]]
  numeric: Sequence[bool]


def find_runs(directory: Path) -> list[RunDir]:
  """Every run in a directory and below it, in the order of their names.

  Raises:
    UserError: no such directory, no run in it, or a run whose files are damaged.
  """
  if not directory.is_dir():
    raise UserError(f"report: expected a directory with runs, got {directory}")
  found = []
  for config in sorted(directory.rglob(CONFIG)):
    try:
      settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
      raise UserError(f"report: {config}: is damaged") from error
    if isinstance(settings, dict) and "benchmark" in settings:
      found.append(_read(directory, config.parent, settings))
  if not found:
    raise UserError(f"report: {directory}: expected runs of a2ats eval with --out, found none")
  return found


def _read(directory: Path, path: Path, config: Mapping[str, Any]) -> RunDir:
  metrics: Mapping[str, Any] = {}
  lines: list[Row] = []
  try:
    if (path / METRICS).exists():
      metrics = json.loads((path / METRICS).read_text(encoding="utf-8"))
    if (path / PREDICTIONS).exists():
      text = (path / PREDICTIONS).read_text(encoding="utf-8")
      lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
  except ValueError as error:
    raise UserError(f"report: {path}: is damaged, its results are not JSON") from error
  command = (path / COMMAND).read_text(encoding="utf-8") if (path / COMMAND).exists() else ""
  name = path.relative_to(directory).as_posix()
  return RunDir(
    name=path.name if name == "." else name,
    path=path,
    config=config,
    environment=metrics.get("environment", {}),
    rows=metrics.get("rows", ()),
    lines=lines,
    command=command.strip(),
  )


def tables_of(run: RunDir) -> list[Table]:
  """The results, a table for each task; of a comparison, one with all benchmarks side by side."""
  if not run.rows:
    return []
  if run.config["benchmark"] == "compare":
    merged = side_by_side(run.rows)
    return [_table("", merged, columns(merged))]
  tasks = dict.fromkeys(row["task"] for row in run.rows)
  return [
    _table(task, mine, tables.columns_of(mine[0]))
    for task in tasks
    for mine in [[row for row in run.rows if row["task"] == task]]
  ]


def _table(title: str, rows: Sequence[Row], figures: Sequence[str]) -> Table:
  shown = tables.shown(rows, figures)
  left = ("method", "task", "dtype", "baseline")
  return Table(
    title=title,
    head=[tables.head(name) for name in shown],
    body=[tables.cells(row, rows, shown) for row in rows],
    numeric=[name not in left for name in shown],
  )


def by_layer(run: RunDir) -> list[Table]:
  """The share of true attention that each layer reads: mean over query heads, and the lowest head.

  A table for every task and length of a recall run, means over its prompts; empty for other runs.
  """
  lines = run.lines if run.config["benchmark"] == "recall" else []
  out = []
  for task, T in dict.fromkeys((line["task"], line["T"]) for line in lines):
    mine = [line["results"] for line in lines if (line["task"], line["T"]) == (task, T)]
    names = [_case(one, mine[0]) for one in mine[0]]
    mass = np.mean([[one["mass"] for one in results] for results in mine], axis=0)
    body = [
      [str(layer), *(f"{np.mean(heads):.3f} ({np.min(heads):.3f})" for heads in mass[:, layer])]
      for layer in range(mass.shape[1])
    ]
    title = f"{task}, {T} tokens: attention read by layer, mean of query heads (lowest)"
    numeric = [True] * (1 + len(names))
    out.append(Table(title=title, head=["layer", *names], body=body, numeric=numeric))
  return out


def _case(result: Row, beside: Sequence[Row]) -> str:
  """A method and its budget in a few words."""
  return " ".join(filter(None, (tables.label(result, beside), tables.budget_label(result))))


def heat_maps(run: RunDir) -> dict[str, Figure]:
  """Needles found by depth and length, a panel for each method and budget, a figure for each task.

  Empty where a run has no depths.
  """
  lines = [line for line in run.lines if "depth" in line]
  out: dict[str, Figure] = {}
  for task in dict.fromkeys(line["task"] for line in lines):
    mine = [line for line in lines if line["task"] == task]
    lengths = sorted({line["T"] for line in mine})
    depths = sorted({line["depth"] for line in mine})
    found: dict[str, Float[np.ndarray, "depths lengths"]] = {}
    count: dict[str, Float[np.ndarray, "depths lengths"]] = {}
    for line in mine:
      for result in line["results"]:
        name = _case(result, line["results"])
        shape = (len(depths), len(lengths))
        at = depths.index(line["depth"]), lengths.index(line["T"])
        found.setdefault(name, np.zeros(shape))[at] += result["score"]
        count.setdefault(name, np.zeros(shape))[at] += 1
    out[task] = _panels({n: found[n] / np.maximum(count[n], 1) for n in found}, depths, lengths)
  return out


def _panels(
  panels: Mapping[str, Float[np.ndarray, "depths lengths"]],
  depths: Sequence[float],
  lengths: Sequence[int],
) -> Figure:
  wide = min(len(panels), 6)
  high = -(-len(panels) // wide)
  figure = Figure(figsize=(2.1 * wide + 0.8, 1.9 * high + 0.4), layout="constrained")
  axes = figure.subplots(high, wide, squeeze=False).ravel()
  image = None
  for axis, (name, values) in zip(axes, panels.items()):
    image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    axis.set_title(name, fontsize=6)
    axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=6)
    axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=6)
  for axis in axes[len(panels) :]:
    axis.axis("off")
  for axis in axes[: len(panels)]:
    axis.set_xlabel("tokens", fontsize=6)
    axis.set_ylabel("depth", fontsize=6)
  if image is not None:
    figure.colorbar(image, ax=list(axes), label="found, share", shrink=0.6)
  return figure


def _png(figure: Figure) -> bytes:
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=130)
  return data.getvalue()


def write(directory: Path, out: Path | None = None) -> tuple[Path, Path]:
  """Write ``report.html`` and ``report.md`` for all runs in a directory.

  Args:
    out: where to; by default the directory itself.

  Returns:
    The paths of both.

  Raises:
    UserError: see :func:`find_runs`.
  """
  runs = find_runs(directory)
  out = out or directory
  out.mkdir(parents=True, exist_ok=True)
  sections = [_section(run) for run in runs]
  loader = jinja2.FileSystemLoader(_TEMPLATES)
  kinds = {HTML: True, MARKDOWN: False}
  for name, escape in kinds.items():
    environment = jinja2.Environment(
      loader=loader,
      autoescape=escape,
      trim_blocks=True,
      lstrip_blocks=True,
      undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(f"{name}.j2").render(title=directory.name, runs=sections)
    write_atomically(out / name, text)
  return out / HTML, out / MARKDOWN


def _section(run: RunDir) -> dict[str, Any]:
  pictures = [(path.stem, path.read_bytes()) for path in run.pictures]
  pictures += [(f"needles found: {task}", _png(fig)) for task, fig in heat_maps(run).items()]
  settings = {k: v for k, v in run.config.items() if k not in ("benchmark", "methods")}
  return {
    "name": run.name,
    "anchor": "".join(c if c.isalnum() else "-" for c in run.name),
    "benchmark": run.config["benchmark"],
    "finished": run.finished,
    "prompts": len(run.lines),
    "command": run.command,
    "tables": [*tables_of(run), *by_layer(run)],
    "pictures": [
      {"title": title, "data": base64.b64encode(data).decode()} for title, data in pictures
    ],
    "files": [path.name for path in run.pictures],
    "methods": run.config.get("methods", []),
    "settings": yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True).strip(),
    "environment": yaml.safe_dump(dict(run.environment), sort_keys=False).strip(),
  }
