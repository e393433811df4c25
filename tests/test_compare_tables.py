"""The tables of methods side by side are what the record of the comparison says."""

import importlib.util
import json
from pathlib import Path

from a2ats_jax.methods.registry import METHODS

ROOT = Path(__file__).parents[1]


def _module():
  spec = importlib.util.spec_from_file_location("docs_compare", ROOT / "docs" / "compare.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_pages_show_the_record():
  compare = _module()
  rows = [json.loads(line) for line in (ROOT / "docs" / "compare.jsonl").read_text().splitlines()]
  pages = compare.pages(rows)
  assert len(pages) == 2
  for path, text in pages.items():
    assert path.read_text() == text
  changed = [row | {"kl": row["kl"] + 0.5} if "kl" in row else row for row in rows]
  assert all(path.read_text() != text for path, text in compare.pages(changed).items())


def test_every_method_was_compared():
  rows = [json.loads(line) for line in (ROOT / "docs" / "compare.jsonl").read_text().splitlines()]
  assert {row["method"] for row in rows} == set(METHODS) - {"a2ats-reference"}
