"""The RULER benchmark: what runs, what is written, and a run that goes on after a kill."""

import json

import pytest
import yaml

from a2ats_jax import cli
from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate
from a2ats_jax.methods.full import Full
from eval import answers
from eval.options import parse_methods
from eval.ruler import benchmark
from eval.ruler.benchmark import RulerOptions, gather, make_prompts, not_run, run
from tests.eval import tiny
from tests.eval.ruler_material import VOCABULARY, hotpotqa_file, material, squad_file
from tests.models.tiny_models import tiny_config, tiny_tensors, write_hf


def options(**changes) -> RulerOptions:
  given = {
    "tasks": ("niah_single_1", "qa_1", "qa_2"),
    "T": (640,),
    "limit": 2,
    "methods": parse_methods("oracle,a2ats-plus:window=8"),
    "budgets": (Budget(ratio=1.0),),
  }
  return RulerOptions(**given | changes)


def go(model=None, kinds=None, **changes):
  kinds = material(hotpotqa=None) if kinds is None else kinds
  progress = changes.pop("progress", None)
  return run(
    model or tiny.model(),
    options(**changes),
    kinds,
    codebooks={"default": tiny.codebook()},
    progress=progress,
  )


def test_every_method_answers_and_a_killed_run_goes_on(tmp_path, monkeypatch):
  shapes = []

  def recorded(decoder, tokens, *rest, **more):
    shapes.append(tokens.shape)
    return record(decoder, tokens, *rest, **more)

  record = answers.record
  monkeypatch.setattr(answers, "record", recorded)
  seen = []

  def kill(phase, done, total, **figures):
    seen.append((phase, done, total))
    if phase == "ruler" and done == 4:
      raise KeyboardInterrupt

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  rows = go(out=whole, limit=1)
  assert set(shapes) == {(1, 1024)}  # one width for prompts of 512 and of 608 tokens
  assert [(row["task"], row["method"]) for row in rows] == [
    (task, method)
    for task in ("niah_single_1", "qa_1", "average")
    for method in ("full", "oracle", "a2ats-plus")
  ]
  lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
  assert [(line["task"], line["index"]) for line in lines] == [("niah_single_1", 0), ("qa_1", 0)]
  made = make_prompts(tiny.model(), options(), material(hotpotqa=None))
  for line in lines:
    prompt = made[line["task"], 640][line["index"]]
    new = {"niah_single_1": 128, "qa_1": 32}[line["task"]]
    assert line["tokens"] == len(prompt.ids) <= 640 - new
    assert line["answers"] == list(prompt.answers)
    blocks = list(generate(tiny.model().decoder, Full(), [prompt.ids], new=new))
    full = [token for block in blocks for token in block.tokens[0].tolist()]
    assert len(full) == new
    predictions = [result["prediction"] for result in line["results"]]
    # the whole budget is exact attention
    assert predictions == [tiny.model().tokenizer.decode(full)] * 3
  assert all(row["score"] == 0.0 and row["read"] == 1.0 for row in rows)
  config = yaml.safe_load((whole / "config.yaml").read_text())
  assert config["not_run"] == {"qa_2": "needs --hotpotqa FILE"}
  assert config["generated"] == {"niah_single_1": 128, "qa_1": 32}
  with pytest.raises(KeyboardInterrupt):
    go(out=cut, limit=1, progress=kill)
  assert seen[:2] == [("prompts", 0, 2), ("prompts", 1, 2)]
  assert not (cut / "metrics.json").exists()
  go(out=cut, limit=1)
  for name in ("metrics.json", "predictions.jsonl"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  assert (cut / "score.png").exists()


def test_scores_and_averages_by_hand(monkeypatch):
  """Of niah_single_1 one of two is right, of qa_1 both: 0.75; errors 0.5 and 0 over two tasks."""

  def answer(model, cases, prompts, score, *, new, room, width, step, progress):
    assert (room, width) == (128, 1024)
    results = []
    for row in range(len(prompts)):
      said = told[new][row]
      results.append(
        [case.identity | {"prediction": said, "score": score(row, said)} for case in cases]
      )
    return results

  mine = make_prompts(tiny.model(), options(), material(hotpotqa=None))
  told = {
    128: [f" {mine['niah_single_1', 640][0].answers[0]}.", " 1234567"],
    32: [f" It has {mine['qa_1', 640][i].answers[0]}." for i in range(2)],
  }
  monkeypatch.setattr(answers, "scored", answer)
  rows = go(batch=2)
  full = [row for row in rows if row["method"] == "full"]
  assert [(row["task"], row["score"], row["n"]) for row in full] == [
    ("niah_single_1", 0.5, 2),
    ("qa_1", 1.0, 2),
    ("average", 0.75, 4),
  ]
  assert [row["score_se"] for row in full] == pytest.approx([0.5, 0.0, 0.25])
  assert full[2]["tasks"] == 2
  sizes = [len(prompt.ids) for of_task in mine.values() for prompt in of_task]
  assert full[2]["tokens"] == pytest.approx(sum(sizes) / 4)


def test_prompts_do_not_depend_on_what_else_is_asked():
  def prompts(**changes):
    return make_prompts(tiny.model(), options(**changes), material())

  some = prompts(tasks=("fwe", "niah_multivalue"), T=(1500, 1200))
  more = prompts(tasks=("niah_multivalue", "qa_2", "fwe"), T=(1200, 1500, 1300), limit=3)
  assert list(some) == [
    *(("fwe", 1200), ("niah_multivalue", 1200), ("fwe", 1500), ("niah_multivalue", 1500))
  ]
  for key, mine in some.items():
    assert more[key][:2] == mine


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tasks": ("niah_single_9",)}, "tasks: expected some of niah_single_1, .*got 'niah_single_9'"),
    ({"tasks": ()}, "tasks: expected at least one"),
    ({"tasks": ("vt", "vt")}, "tasks: vt is named twice"),
    ({"tasks": ("qa_2",)}, "none of those asked for can run: qa_2 needs --hotpotqa FILE"),
    ({"T": (4096,)}, "T: 4096 tokens exceed the model's context of 2048"),
    ({"T": (300,)}, "niah_single_1 needs at least"),
    ({"limit": 101, "tasks": ("qa_1",)}, "limit: qa_1 has a file of 100 questions"),
  ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    go(out=tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_the_whole_context_may_be_asked_for():
  made = make_prompts(tiny.model(), options(T=(2048,), limit=1), material())
  assert len(made["niah_single_1", 2048][0].ids) <= 2048 - 128


def test_material_is_named_in_the_config(tmp_path, monkeypatch):
  monkeypatch.setattr(benchmark, "english", lambda: VOCABULARY)
  squad, hotpot = squad_file(tmp_path / "s.json"), hotpotqa_file(tmp_path / "h.json")
  prose = tiny.prose()
  made = gather((prose,), squad, None)
  assert made.hashes.keys() == {"text tiny prose", "words", "squad"}
  assert made.hashes["text tiny prose"] == prose.sha256
  assert not_run(options(), made) == {"qa_2": "needs --hotpotqa FILE"}
  assert not_run(options(), gather((prose,), squad, hotpot)) == {}
  assert len(gather((prose, tiny.prose(seed=1)), None, None).sentences) == 240
  with pytest.raises(UserError, match="text: expected at least one"):
    gather((), None, None)


def test_the_command(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr(benchmark, "english", lambda: VOCABULARY)
  config = tiny_config(context=1024, tied=True, vocab=259)
  write_hf(tmp_path / "model", config, tiny_tensors(config))
  (tmp_path / "prose.txt").write_text(tiny.prose().text)
  squad = squad_file(tmp_path / "squad.json")
  words = ["eval", "ruler", "--model", tmp_path / "model", "--text", tmp_path / "prose.txt"]
  words += ["--T", 1000, "--tasks", "niah_multikey_1,qa_1,qa_2", "--squad", squad, "--limit", 1]
  words += ["--methods", "full,oracle", "--out", tmp_path / "run"]
  cli.main([str(word) for word in words])
  out = capfd.readouterr().out
  assert "not run: qa_2 needs --hotpotqa FILE" in out
  assert "average" in out
  cli.main([str(word) for word in [*words, "--json"]])
  out, err = capfd.readouterr()
  rows = [json.loads(line) for line in out.splitlines()]
  assert rows == json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]
  assert {row["task"] for row in rows} == {"niah_multikey_1", "qa_1", "average"}
  assert "not run: qa_2 needs --hotpotqa FILE" in err
