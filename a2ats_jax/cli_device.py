"""What to run first on a new accelerator, as commands: ``a2ats device`` and ``a2ats tune``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from a2ats_jax.bars import Bars
from a2ats_jax.cli_args import note, numbers
from a2ats_jax.errors import UserError

_NO_DEVICE = "these figures are of the CPU and the smallest shapes, and of no accelerator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune:
  """Time tile sizes of the kernels on this GPU or TPU, and keep the best for its kind."""

  model: str = "llama-3.1-8b"
  """Shape of the layer: llama-3.1-8b, qwen2.5-7b, mistral-7b, smollm2-135m, a .gguf file or a
  Hugging Face directory. Weights are not read."""
  T: int = 131072
  """Tokens of each prompt."""
  new: int = 128
  """Tokens that each row has room for after its prompt."""
  batch: str = "1"
  """Rows decoded together, comma-separated: sizes are kept for each."""
  page: int = 16
  """Tokens a page."""
  budget: str = "2048/kv"
  """Far tokens read, which say how many pages are fetched at once: as in generate."""
  codewords: int = 1024
  """Codewords of every codebook (one per layer and KV head), up to 65536."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of cached keys and values."""
  rounds: int = 9
  """Timed rounds, each of which runs every candidate of an op once."""
  repeat: int = 100
  """Calls of a kernel in one timed run, one after the other on the device."""
  out: Path | None = None
  """The JSON file to write. Default: the one that the kernels read on this kind of device, inside
  the package; another is put in use by copying it there."""
  interpret: bool = False
  """Run the kernels' interpreters on the CPU at the smallest shapes; writes no file."""
  json: bool = False
  """Print the result rows as JSON lines on stdout instead of a table."""

  def run(self) -> None:
    import jax

    from a2ats_jax import plan_known
    from a2ats_jax.budget import Budget
    from a2ats_jax.ops import stored_tiles
    from eval import device, tune

    backend, kind = jax.default_backend(), jax.devices()[0].device_kind
    if self.interpret:
      with Bars() as bars:
        rows = [
          row
          for family in ("tpu", "gpu")
          for row in tune.run(
            [tune.SMALLEST], family, rounds=1, repeat=1, interpret=True, most=2, progress=bars
          )
        ]
      self._show(rows)
      note("tune: these times are the interpreters', and of no device; no file was written")
      return
    if backend not in ("gpu", "tpu"):
      raise UserError(
        f"tune: expected a GPU or a TPU, got {backend}, which has no kernels; --interpret runs "
        "their interpreters"
      )
    path = self.out or stored_tiles.path_of(kind)
    if path.exists():
      stored_tiles.read(path, kind=kind)  # before the work, not after it
    config = plan_known.find_model(self.model)
    layers = [
      tune.layer_of(
        config,
        T=self.T,
        new=self.new,
        batch=batch,
        page=self.page,
        budget=Budget.parse(self.budget),
        codewords=self.codewords,
        dtype=self.dtype,
      )
      for batch in numbers("batch", self.batch)
    ]
    with Bars() as bars:
      rows = tune.run(layers, backend, rounds=self.rounds, repeat=self.repeat, progress=bars)
    self._show(rows)
    held = ", ".join(f"{name} {version}" for name, version in device.versions().items())
    count = tune.store(rows, path, kind=kind, versions=held)
    use = "in use from the next start on"
    if self.out is not None:
      use = f"to put them in use, copy the file to {stored_tiles.path_of(kind)}"
    note(f"tune: tiles of {count} ops and shapes in {path}; {use}")

  def _show(self, rows: Sequence[dict[str, Any]]) -> None:
    from eval import device_tables, tables

    if self.json:
      for row in rows:
        print(json.dumps(row))
    else:
      tables.console().print(device_tables.table("tune", rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Report on this GPU or TPU: kernels against the references, their rates, and decode steps."""

  what: Literal["all", "kernels", "steps"] = "all"
  """kernels: results and rates of every op. steps: decode steps of a model. The card and plain
  copies are always reported."""
  model: str = "llama-3.1-8b"
  """Shape of the model: llama-3.1-8b, qwen2.5-7b, mistral-7b, smollm2-135m, a .gguf file or a
  Hugging Face directory. Weights are random."""
  layers: int = 0
  """Layers of the model; 0 is all it has. Fewer leave room for larger batches."""
  method: str = "a2ats-plus"
  """Beside full attention: a2ats or a2ats-plus, with options as in generate."""
  budget: str = "2048/kv"
  """Far tokens read, as in generate."""
  codewords: int = 1024
  """Codewords of every codebook (one per layer and KV head), up to 65536."""
  T: str = "32768,131072"
  """Prompt lengths in tokens, comma-separated. The kernels run at the longest."""
  batch: str = ""
  """Rows decoded together, comma-separated. Default: 1, and the largest that fits by the arithmetic
  of `a2ats plan` (half of the host's memory counts), or three quarters of it until one runs."""
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  """Of weights, activations and cache."""
  rounds: int = 20
  """Timed steps, and timed rounds of copies and kernels; figures are medians and quartiles."""
  repeat: int = 100
  """Calls of a kernel in one timed run, one after the other on the device."""
  copy_mb: int = 1024
  """10^6 bytes of the array of the plain copies."""
  seed: int = 0
  """Of everything that is drawn."""
  trace: Path | None = None
  """Directory for jax.profiler traces of three more steps of the method at every length and batch:
  they show whether pages are read where they lie."""
  out: Path | None = None
  """File for the result rows as JSON lines, added to as they come."""
  small: bool = False
  """The smallest shapes, in less than a minute, on any backend. Without kernels for it the
  references run."""
  json: bool = False
  """Print the result rows as JSON lines on stdout instead of tables."""

  def run(self) -> None:
    from a2ats_jax import plan_known
    from a2ats_jax.budget import Budget
    from eval import device, device_step
    from eval.tune import SMALLEST

    card = device.card() | {"small": self.small}
    if card["backend"] not in ("gpu", "tpu") and not self.small:
      raise UserError(
        f"device: expected a GPU or a TPU, got {card['backend']}; --small runs the same in little"
      )
    config = plan_known.find_model(self.model, layers=self.layers)
    options = device_step.StepOptions(
      config=config,
      method=self.method,
      budget=Budget.parse(self.budget),
      codewords=self.codewords,
      T=numbers("T", self.T),
      batch=numbers("batch", self.batch) if self.batch else (),
      dtype=self.dtype,
      rounds=self.rounds,
      seed=self.seed,
      trace=self.trace,
    )
    rounds, repeat, size = self.rounds, self.repeat, self.copy_mb * 10**6
    if self.small:
      options, rounds, repeat, size = device_step.small(options), 2, 1, 10**6
    emit = _Emit(self, str(card["device"]))
    emit("card", [card])
    copies = device.copies(size, rounds=rounds)
    emit("copy", copies)
    rates = {row["copy"]: row["gb_per_s"] for row in copies}
    wrong: list[dict[str, Any]] = []
    with Bars() as bars:
      if self.what != "steps":
        layer = SMALLEST if self.small else device_step.layer_of(options)
        rows = device.kernels(layer, copies, rounds=rounds, repeat=repeat, progress=bars)
        wrong = [row for row in rows if row.get("ok") is False]
        emit("kernel", rows)
      if self.what != "kernels":
        chip = device_step.chip_of(card["memory_bytes"], rates)
        emit("step", device_step.run(options, chip, progress=bars))
    if card["backend"] not in ("gpu", "tpu"):
      note(f"device: {_NO_DEVICE}")
    if wrong:
      note(f"device: {len(wrong)} kernels do not run or do not equal the reference")
      raise SystemExit(1)


class _Emit:
  """Rows to stdout and to a file, as they come."""

  def __init__(self, args: Device, device: str):
    self.args, self.device = args, device

  def __call__(self, what: str, rows: Sequence[dict[str, Any]]) -> None:
    from eval import device_tables, tables

    lines = [json.dumps({"device": self.device, "small": self.args.small} | row) for row in rows]
    if self.args.out is not None:
      with open(self.args.out, "a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
    if self.args.json:
      print(*lines, sep="\n", flush=True)
    elif what == "card":
      for name, value in rows[0].items():
        if name not in ("benchmark", "what"):
          print(f"{name:>13}  {value}")
      print()
    else:
      tables.console().print(device_tables.table(what, rows), "")
