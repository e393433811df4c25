"""Rows as tables, lines and pictures."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from a2ats_jax.errors import UserError
from eval import plots, tables

WHO = {"benchmark": "fidelity", "task": "prose", "T": 128, "n": 2}
ROWS = [
  WHO | {"method": "full", "options": "", "budget": None, "kl": 0.0, "read": 1.0, "kl_se": None},
  WHO | {"method": "a2ats", "options": "x=1", "budget": 0.03, "kl": 0.25, "moved_bytes": 2e6},
  WHO | {"method": "a2ats", "options": "x=2", "budget": 0.03, "kl": 0.125},
  WHO | {"method": "a2ats", "options": "x=2", "budget": 64, "kl": 0.0625, "T": 256},
]


def test_json_lines_are_the_rows():
  lines = list(tables.json_lines(ROWS))
  assert [json.loads(line) for line in lines] == ROWS
  assert not any("\n" in line for line in lines)


def test_the_table_shows_who_and_the_benchmarks_figures():
  out = io.StringIO()
  Console(file=out, width=160).print(tables.table(ROWS))
  text = out.getvalue().splitlines()
  assert text[0].strip() == "task prose"
  heads = [tables.HEADS.get(name, name) for name in tables.COLUMNS["fidelity"]]
  assert " ".join(text[1].split()) == " ".join(["T", "method", "budget", *heads, "n"])
  assert "a2ats:x=1" in text[3]
  assert "2.00 MB" in text[3]
  assert "0.25" in text[3]
  assert " - " in text[2]  # what a row does not hold
  assert tables.table([]).row_count == 0


def test_a_plot_has_a_panel_a_length_and_a_line_a_variant(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, **_: seen.append(self))
  plots.plot(ROWS, tmp_path / "kl.png", y="kl")
  left, right = seen[0].axes
  assert [line.get_label() for line in left.lines] == ["a2ats:x=1", "a2ats:x=2"]
  assert left.get_yscale() == "log"
  assert right.get_title() == "prose, T = 256"
  with pytest.raises(UserError, match="no row holds both budget and score"):
    plots.plot(ROWS, tmp_path / "score.png", y="score")


def test_full_attention_is_a_level_where_the_scale_is_linear(tmp_path, monkeypatch):
  seen = []
  monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, **_: seen.append(self))
  rows = [row | {"score": 0.5} for row in ROWS]
  plots.plot(rows, tmp_path / "score.png", y="score")
  assert seen[0].axes[0].lines[0].get_label() == "full"


def test_pictures_are_written(tmp_path):
  plots.plot(ROWS, tmp_path / "kl.png", y="kl")
  plots.heatmaps([("a", np.eye(3)), ("b", np.ones((3, 3)))], tmp_path / "map.png", label="mass")
  for name in ("kl.png", "map.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
