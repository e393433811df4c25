"""The directory of a run: refused when it is another's, whole after a kill."""

import json

import pytest
import yaml

from a2ats_jax.errors import UserError
from eval.results import environment, open_run

CONFIG = {"benchmark": "x", "model": {"name": "m"}, "budgets": ["0.03"], "depths": (0.1, 1e-5)}


def line(index: int, **more):
  """A finished prompt."""
  return {"task": "t", "T": 8, "index": index, "results": []} | more


def test_lines_come_back_after_a_kill_and_a_torn_line_does_not(tmp_path):
  first = open_run(tmp_path, CONFIG)
  lines = [line(0, kl=0.1 + 0.2), line(1, text="ü\u2028")]
  first.append(lines)
  with open(tmp_path / "predictions.jsonl", "a") as file:
    file.write('{"index": 2, "k')
  again = open_run(tmp_path, CONFIG)
  assert again.lines == first.lines == lines
  again.append([line(2)])
  again.keep(lambda line: line["index"] != 1)
  assert [line["index"] for line in open_run(tmp_path, CONFIG).lines] == [0, 2]
  assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == json.loads(json.dumps(CONFIG))
  again.finish([{"kl": 1.0}])
  metrics = json.loads((tmp_path / "metrics.json").read_text())
  assert metrics == {
    "config": json.loads(json.dumps(CONFIG)),
    "environment": environment(),
    "rows": [{"kl": 1.0}],
  }
  assert {p.name for p in tmp_path.iterdir()} == {
    "config.yaml",
    "metrics.json",
    "predictions.jsonl",
  }


def test_another_config_is_refused_by_what_differs(tmp_path):
  open_run(tmp_path, CONFIG)
  with pytest.raises(UserError) as caught:
    open_run(tmp_path, CONFIG | {"model": {"name": "n"}, "seed": 1})
  assert "model.name was 'm' and is now 'n'; seed was None and is now 1" in str(caught.value)


def test_results_without_a_config_are_refused(tmp_path):
  (tmp_path / "metrics.json").write_text("{}")
  with pytest.raises(UserError, match=r"holds metrics\.json without config\.yaml"):
    open_run(tmp_path, CONFIG)


@pytest.mark.parametrize("garbage", ["garbage", "5", "{}", '{"task": "t", "T": 8, "index": 1}'])
def test_a_damaged_line_is_refused(tmp_path, garbage):
  open_run(tmp_path, CONFIG).append([line(0)])
  path = tmp_path / "predictions.jsonl"
  path.write_text(f"{garbage}\n" + path.read_text())
  with pytest.raises(UserError, match="damaged"):
    open_run(tmp_path, CONFIG)


def test_a_prompt_written_twice_counts_once(tmp_path):
  open_run(tmp_path, CONFIG).append([line(0, kl=1.0), line(1), line(0, kl=2.0)])
  assert open_run(tmp_path, CONFIG).lines == [line(0, kl=1.0), line(1)]


def test_an_emptied_config_is_refused(tmp_path):
  open_run(tmp_path, CONFIG)
  (tmp_path / "config.yaml").write_text("")
  with pytest.raises(UserError, match="empty or damaged"):
    open_run(tmp_path, CONFIG)


def test_a_file_in_the_way_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file"):
    open_run(tmp_path / "file", CONFIG)


def test_no_directory_writes_nothing():
  run = open_run(None, CONFIG)
  run.append([{"index": 0, "values": (1, 2)}])
  run.finish([])
  assert run.lines == [{"index": 0, "values": [1, 2]}]


def test_the_environment_names_versions_and_platform_but_no_machine():
  here = environment()
  assert set(here) == {"versions", "platform", "cpu_count"}
  assert {"python", "jax", "jaxlib", "numpy", "a2ats_jax"} <= set(here["versions"])
  assert set(here["platform"]) == {"system", "machine", "backend", "device"}
