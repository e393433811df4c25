"""A report holds what runs hold, loads nothing, and says what is not finished."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from a2ats_jax import cli
from a2ats_jax.errors import UserError
from eval import report

WHO = {"benchmark": "needle", "model": "tiny", "T": 128, "batch": 1, "dtype": "float32", "seed": 0}
ROWS = [
  WHO | {"task": "niah", "method": "full", "options": "", "budget": None, "score": 1.0, "n": 2},
  WHO | {"task": "niah", "method": "a<b>", "options": "x=1", "budget": 0.03, "score": 0.5, "n": 2},
]
RESULTS = [
  {"method": "full", "options": "", "budget": None, "per": None, "score": 1.0},
  {"method": "a<b>", "options": "x=1", "budget": 0.03, "per": "query_head", "score": 0.0},
]
LINES = [
  {"task": "niah", "T": 128, "index": 0, "depth": 0.1, "results": RESULTS},
  {
    "task": "niah",
    "T": 128,
    "index": 1,
    "depth": 0.9,
    "results": [r | {"score": 1.0} for r in RESULTS],
  },
]


@pytest.fixture
def runs(tmp_path):
  """A finished needle run below, and one that was stopped."""
  done = tmp_path / "runs" / "needle"
  done.mkdir(parents=True)
  config = {"benchmark": "needle", "methods": ["full", "a<b>:x=1"], "T": [128], "seed": 0}
  (done / "config.yaml").write_text(yaml.safe_dump(config))
  metrics = {"config": config, "environment": {"cpu_count": 2}, "rows": ROWS}
  (done / "metrics.json").write_text(json.dumps(metrics))
  (done / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
  (done / "command.txt").write_text("a2ats eval needle --T 128 --out 'a run'\n")
  half = tmp_path / "runs" / "fidelity"
  half.mkdir()
  (half / "config.yaml").write_text(yaml.safe_dump({"benchmark": "fidelity", "T": [128]}))
  (half / "predictions.jsonl").write_text(json.dumps(LINES[0]) + "\n" + '{"task": "ni')
  (tmp_path / "runs" / "books").mkdir()  # no run: a training's configuration
  (tmp_path / "runs" / "books" / "config.yaml").write_text("codewords: 5\n")
  return tmp_path / "runs"


def test_the_page_holds_figures_commands_and_settings_and_loads_nothing(runs):
  page, markdown = report.write(runs)
  text = page.read_text()
  assert "a2ats eval needle --T 128 --out &#39;a run&#39;" in text
  assert "a&lt;b&gt;" in text
  assert "<b>" not in text
  assert "Not finished: 1 prompts are done." in text
  assert "cpu_count: 2" in text
  for source in re.findall(r"(?:src|href)=\"([^\"]*)", text):
    assert source.startswith(("data:image/png;base64,", "#"))
  assert "http" not in text
  lines = markdown.read_text().splitlines()
  assert "| full | - | - | 1 | - | - |" in lines
  assert "| a<b> | 0.03 | - | 0.5 | - | - |" in lines
  assert "codewords" not in text


def test_the_heat_map_is_the_share_found_at_each_depth(runs):
  (needle,) = (run for run in report.find_runs(runs) if run.name == "needle")
  figure = report.heat_maps(needle)["niah"]
  panels = {axis.get_title(): axis.images[0].get_array().tolist() for axis in figure.axes[:2]}
  assert panels == {"full": [[1.0], [1.0]], "a<b> 0.03": [[0.0], [1.0]]}
  assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["0.1", "0.9"]


def test_recall_is_told_layer_by_layer(runs):
  run = runs / "recall"
  run.mkdir()
  (run / "config.yaml").write_text(yaml.safe_dump({"benchmark": "recall", "T": [128]}))
  # Two texts, two layers of two query heads.
  masses = [[[1.0, 0.5], [0.2, 0.4]], [[0.5, 0.5], [0.4, 0.6]]]
  lines = [
    {"task": "prose", "T": 128, "index": i, "results": [RESULTS[1] | {"mass": mass}]}
    for i, mass in enumerate(masses)
  ]
  (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (recall,) = (run for run in report.find_runs(runs) if run.name == "recall")
  (table,) = report.by_layer(recall)
  assert table.head == ["layer", "a<b> 0.03"]
  assert table.body == [["0", "0.625 (0.500)"], ["1", "0.400 (0.300)"]]
  _, markdown = report.write(runs)
  assert "| 0 | 0.625 (0.500) |" in markdown.read_text().splitlines()
  (needle,) = (run for run in report.find_runs(runs) if run.name == "needle")
  assert report.by_layer(needle) == []


def test_bad_directories_are_one_line(runs, tmp_path):
  with pytest.raises(UserError, match="expected a directory with runs"):
    report.write(tmp_path / "none")
  with pytest.raises(UserError, match="found none"):
    report.write(runs / "books")
  (runs / "needle" / "metrics.json").write_text("{")
  with pytest.raises(UserError, match="needle: is damaged"):
    report.write(runs)
  assert not list(tmp_path.rglob("report.*"))


def test_the_command_writes_both(runs, tmp_path, capfd):
  cli.main(["eval", "report", str(runs), "--out", str(tmp_path / "out")])
  assert capfd.readouterr().out.split() == [
    str(tmp_path / "out" / "report.html"),
    str(tmp_path / "out" / "report.md"),
  ]


def test_a_browser_draws_it(runs, tmp_path):
  """In a browser, where there is one: the page is drawn, in more colours than a blank one."""
  browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
  if browser is None:
    pytest.skip("no browser here")
  page, _ = report.write(runs)
  shot = tmp_path / "shot.png"
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
  command = [browser, *flags, f"--screenshot={shot}", page.as_uri()]
  subprocess.run(command, check=True, capture_output=True, timeout=120)
  from matplotlib.image import imread

  image = (imread(shot)[..., :3] * 255).astype(int)
  assert image.shape[:2] == (1600, 1200)
  colours = {tuple(pixel) for pixel in image[::4, ::4].reshape(-1, 3)}
  assert len(colours) > 100  # text, and the heat map's colours
