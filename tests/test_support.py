"""The support matrix in the README is what the record says."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _support():
  spec = importlib.util.spec_from_file_location("support", ROOT / "docs" / "support.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_readme_shows_the_record():
  support = _support()
  lines = [json.loads(line) for line in (ROOT / "docs" / "support.jsonl").read_text().splitlines()]
  readme = (ROOT / "README.md").read_text()
  assert support.filled(readme, lines) == readme
  assert support.filled(readme, lines[1:]) != readme


def test_an_op_with_a_program_that_went_wrong_is_not_compiled():
  support = _support()
  rows = [
    {"program": "page_fetch from host", "chip": "v5e:1x1"},
    {"program": "page_fetch, 65536 pages", "chip": "v5e:1x1", "problem": "no call"},
    {"program": "paged_decode", "chip": "v5e:1x1"},
    {"program": "control: half a tile a page", "chip": "v5e:1x1", "refused": "as it should be"},
    {"program": "paged_decode", "chip": "v5e:1x1", "schedules": {}},
    {"program": "decode step", "chips": "v5e:2x2"},
    {"case": "decode_step-bfloat16-H32-D128"},
  ]
  got = support.compiled(rows, date="2026-01-01", versions="jax 1")
  assert {(line["op"], line["device"], line["programs"]) for line in got} == {
    ("paged_decode", "TPU v5e", 1),
    ("decode step", "H100", 1),
  }


def test_what_ran_on_a_device():
  """Small shapes are not a measurement; one kernel that is wrong takes its op out."""
  support = _support()
  where = {"device": "NVIDIA H100 80GB HBM3", "small": False}
  kernel = where | {"what": "kernel", "implementation": "gpu", "ok": True}
  rows = [
    where | {"what": "card", "versions": {"jax": "1"}},
    where | {"what": "copy", "ms": 1.0},
    kernel | {"op": "page_fetch", "ms": 1.0},
    kernel | {"op": "page_fetch", "ok": False, "problem": "bytes differ"},
    kernel | {"op": "paged_decode", "ms": 1.0},
    kernel | {"op": "vq_encode", "ms": 1.0, "small": True},
    kernel | {"op": "vq_encode", "implementation": "reference", "ms": 1.0},
    where | {"what": "step", "method": "a2ats", "problem": "out of memory"},
    where | {"what": "step", "method": "full", "ms": 1.0},
    kernel | {"op": "page_write", "device": "cpu"},
  ]
  got = support.ran(rows, date="2026-01-01")
  assert {(line["op"], line["what"]) for line in got} == {
    ("paged_decode", "ran"),
    ("paged_decode", "measured"),
    ("vq_encode", "ran"),
  }
  assert {line["device"] for line in got} == {"H100"}
  step = where | {"what": "step", "method": "a2ats-plus", "ms": 2.0}
  assert len(support.ran([rows[0], step], date="2026-01-01")) == 2
  kinds = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "cpu")
  cards = [(rows[0] | {"device": kind}, step | {"device": kind}) for kind in kinds]
  found = [support.ran(card, date="2026-01-01") for card in cards]
  columns = [{line["device"] for line in lines} for lines in found]
  assert columns == [{"TPU v5e"}, {"TPU v5p"}, {"TPU v6e"}, set()]
