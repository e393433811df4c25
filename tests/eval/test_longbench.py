"""LongBench's files, prompts, batches, and a small run of them."""

import itertools
import json
import sys

import numpy as np
import pytest
import tokenizers

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate, pad_prompts, prefill
from a2ats_jax.methods.full import Full
from a2ats_jax.models.tokenizer import Tokenizer
from eval.answers import answers
from eval.longbench import benchmark, data
from eval.longbench.benchmark import LongbenchOptions, averages, prepare, run
from eval.longbench.tasks import tasks
from eval.longbench.widths import width_of
from eval.options import CommonOptions, cases_of, parse_methods
from tests.eval import tiny

SIGNS = [chr(i) for i in range(32, 127)]


def line(dataset="hotpotqa", **changes):
  """An item as LongBench publishes it."""
  fields = {
    "input": "Who?",
    "context": "Ann went. Bob came.",
    "answers": ["Ann"],
    "length": 5,
    "dataset": dataset,
    "language": "en",
    "all_classes": None,
    "_id": "0f",
  }
  return fields | changes


def write(folder, dataset, lines):
  text = "\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines)
  (folder / f"{dataset}.jsonl").write_text(text + "\n", encoding="utf-8")


def contexts(lengths):
  return [line(context="x" * n, _id=str(i)) for i, n in enumerate(lengths)]


def options(folder, **changes):
  given = {"data": folder, "T": (900,), "new": 4, "budgets": (Budget(ratio=1.0),)}
  return LongbenchOptions(**(given | changes))


# --- datasets -----------------------------------------------------------------------------------


def test_the_datasets_are_longbenchs():
  lengths = {name: task.new for name, task in tasks().items()}
  assert lengths == {
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht"), 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    **dict.fromkeys(("lcc", "repobench-p"), 64),
  }
  plain = {name for name, task in tasks().items() if not task.chat}
  assert plain == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
  assert {name for name, task in tasks().items() if task.one_line} == {"samsum"}
  alone = {name for name, task in tasks().items() if "{input}" not in task.prompt}
  assert alone == {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
  assert all(task.prompt.count("{context}") == 1 for task in tasks().values())


def test_every_file_there_is_run_unless_some_are_asked_for(tmp_path):
  write(tmp_path, "trec", [])
  write(tmp_path, "qasper", [])
  write(tmp_path, "qasper_e", [])
  assert data.datasets_in(tmp_path, ()) == ("qasper", "trec")
  assert data.datasets_in(tmp_path, ("trec",)) == ("trec",)


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    ((), "holds none of LongBench's files, expected such as qasper.jsonl"),
    (("qaspr",), "datasets: expected some of narrativeqa, qasper, .*, got 'qaspr'"),
    (("qasper",), "datasets: there is no .*qasper.jsonl"),
    (("qasper", "qasper"), "datasets: qasper is named twice"),
  ],
)
def test_datasets_that_are_not_there_are_refused(tmp_path, asked, message):
  with pytest.raises(UserError, match=message):
    data.datasets_in(tmp_path, asked)
  with pytest.raises(UserError, match="is not a directory"):
    data.datasets_in(tmp_path / "none", asked)


# --- lines --------------------------------------------------------------------------------------


def test_a_line_becomes_longbenchs_prompt(tmp_path):
  write(tmp_path, "hotpotqa", [line(context="Ann {went}.", answers=["Ann", "Bob"]), "", line()])
  items, digest = data.read(tmp_path / "hotpotqa.jsonl", tasks()["hotpotqa"])
  assert len(items) == 2
  item, text = items[0]
  task = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\n"
  )
  passages = "The following are given passages.\nAnn {went}.\n\n"
  assert text == task + passages + task + "Question: Who?\nAnswer:"
  assert (item.id, item.answers, item.length, item.classes) == ("0f", ("Ann", "Bob"), 5, ())
  assert items[1][0].where == f"{tmp_path / 'hotpotqa.jsonl'}, line 3"
  assert len(digest) == 64


@pytest.mark.parametrize(
  ("dataset", "bad", "message"),
  [
    ("hotpotqa", '{"input": "Who', "is damaged, expected a JSON object"),
    ("hotpotqa", "[1]", "expected a JSON object, got list"),
    (
      "hotpotqa",
      {k: v for k, v in line().items() if k not in ("_id", "input")},
      "lacks input, _id",
    ),
    ("hotpotqa", line(context=None), "context: expected a text, got None"),
    ("hotpotqa", line(length="5"), "length: expected a whole number, got '5'"),
    ("hotpotqa", line(answers="Ann"), "answers: expected a list of texts, got 'Ann'"),
    ("hotpotqa", line(answers=[]), "answers: expected a list of texts, got []"),
    ("trec", line(), "all_classes: expected a list of texts, got None"),
    ("passage_retrieval_en", line(answers=["3"]), "answers: expected Paragraph N, got ['3']"),
    ("passage_retrieval_zh", line(answers=["Paragraph 3"]), "answers: expected 段落N"),
  ],
)
def test_a_damaged_line_is_named(tmp_path, dataset, bad, message):
  good = line(answers=["Paragraph 3", "段落3"][dataset.endswith("zh") :][:1], all_classes=["a"])
  write(tmp_path, dataset, [good, bad])
  path = tmp_path / f"{dataset}.jsonl"
  with pytest.raises(UserError) as caught:
    data.read(path, tasks()[dataset])
  assert str(caught.value).startswith(f"{path}, line 2: {message}")
  assert "\n" not in str(caught.value)


def test_an_empty_file_and_one_that_is_not_utf8(tmp_path):
  path = tmp_path / "qasper.jsonl"
  path.write_text("\n\n")
  with pytest.raises(UserError, match=r"qasper.jsonl: is empty"):
    data.read(path, tasks()["qasper"])
  path.write_bytes(b'{"input": "\xff"}')
  with pytest.raises(UserError, match=r"qasper.jsonl, line 1: is damaged"):
    data.read(path, tasks()["qasper"])


# --- prompts ------------------------------------------------------------------------------------


def test_the_middle_is_cut_out_by_tokens():
  tokenizer = tiny.model().tokenizer  # a token a character
  assert data.cut("abcdefghij", tokenizer, 10) == "abcdefghij"
  assert data.cut("abcdefghij", tokenizer, 9) == "abcdghij"
  assert data.cut("abcdefghij", tokenizer, 4) == "abij"


def test_a_first_token_counts_and_is_put_back():
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({chr(i): i for i in range(128)}, unk_token="?")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  backend.decoder = tokenizers.decoders.Fuse()
  backend.add_special_tokens(["\x01"])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="\x01 $A", special_tokens=[("\x01", 1)]
  )
  tokenizer = Tokenizer(backend, bos="\x01", template="<{{ messages[0].content }}>")
  assert data.cut("abcdefghi", tokenizer, 10) == "abcdefghi"
  assert data.cut("abcdefghij", tokenizer, 10) == "abcdfghij"  # 11 tokens; the first half has 5
  item = _item()
  plain = data.prompt_of(item, "abcdefghij", tokenizer, T=6, chat=False)
  assert plain.ids.tolist() == [1, *map(ord, "abhij")]
  chat = data.prompt_of(item, "abcdefghij", tokenizer, T=6, chat=True)
  assert chat.ids.tolist() == list(map(ord, "<abhij>"))  # the template writes what it wants


def _item():
  return data.Item(where="x.jsonl, line 7", id="0f", answers=("y",), length=1, classes=())


def test_a_text_that_has_no_tokens_is_named():
  with pytest.raises(UserError, match=r"x.jsonl, line 7: tokenizer: the text holds a lone"):
    data.prompt_of(_item(), "a\ud800", tiny.model().tokenizer, T=9, chat=False)


def test_chat_models_are_asked_through_their_template_but_for_few_shot_and_code(tmp_path):
  for name in ("hotpotqa", "lcc"):
    write(tmp_path, name, [line()])
  write(tmp_path, "trec", [line(all_classes=["Ann"])])

  def texts(**changes):
    work = prepare(tiny.model(), options(tmp_path, **changes))
    return work.chat, ["".join(map(chr, batch.prompts[0].ids)) for batch in work.batches]

  chat, (hotpot, trec, lcc) = texts()
  assert chat
  assert hotpot.startswith("[Answer the question")
  assert hotpot.endswith("\nAnswer:]")
  assert trec == tasks()["trec"].prompt.format(context="Ann went. Bob came.", input="Who?")
  assert lcc == "Please complete the code given below. \nAnn went. Bob came.Next line of code:\n"
  chat, (plain, *others) = texts(chat=False)
  assert not chat
  assert plain == hotpot[1:-1]
  assert others == [trec, lcc]


# --- batches ------------------------------------------------------------------------------------


def test_widths_are_few():
  expected = {1: 512, 512: 512, 513: 1024, 1025: 1536, 1537: 2048, 2049: 3072, 3073: 4096}
  assert {n: width_of(n, 10**6) for n in expected} == expected
  assert width_of(4097, 5000) == 5120  # not 6144, which no prompt needs
  assert width_of(600, 5000) == 1024
  assert len({width_of(n, 128_000) for n in range(1, 128_001, 64)}) == 16


def test_prompts_of_like_length_run_together(tmp_path):
  write(tmp_path, "hotpotqa", contexts([900, 10, 30, 300, 20]))
  work = prepare(tiny.model(), options(tmp_path, T=(2000,), batch=2))
  frame = len(tasks()["hotpotqa"].prompt) - len("{context}{input}") + len("Who?") + 2
  assert frame == 278
  units = [batch.unit.indices for batch in work.batches]
  assert units == [(1, 4), (2, 3), (0,)]
  lengths = [[len(p.ids) for p in batch.prompts] for batch in work.batches]
  assert lengths == [[288, 298], [308, 578], [1178]]
  assert [batch.shape for batch in work.batches] == [(2, 512, 4), (2, 1024, 4), (1, 1536, 4)]
  assert work.summary.startswith("5 prompts of 1 datasets in 3 batches of 3 shapes")


def test_the_seed_draws_which_prompts_are_asked(tmp_path):
  write(tmp_path, "hotpotqa", contexts(range(20)))

  def asked(**changes):
    work = prepare(tiny.model(), options(tmp_path, **changes))
    return set(itertools.chain.from_iterable(batch.unit.indices for batch in work.batches))

  assert asked() == set(range(20))
  five = asked(limit=5)
  assert len(five) == 5
  assert asked(limit=5) == five < asked(limit=9)
  assert asked(limit=5, seed=1) != five


def test_answers_are_as_long_as_longbenchs_and_no_longer_than_asked(tmp_path):
  write(tmp_path, "hotpotqa", [line()])
  assert prepare(tiny.model(), options(tmp_path, new=512)).batches[0].new == 32
  assert prepare(tiny.model(), options(tmp_path, new=31)).batches[0].new == 31


def test_prompts_beyond_the_context_are_refused_before_anything_runs(tmp_path):
  write(tmp_path, "hotpotqa", contexts([10, 2000]))
  with pytest.raises(
    UserError, match=r"a prompt of 2278 tokens \(.*line 2\) and 4 new ones exceed"
  ):
    prepare(tiny.model(), options(tmp_path, T=(4000,)))
  work = prepare(tiny.model(), options(tmp_path, T=(2042,)))
  assert len(work.batches[-1].prompts[0].ids) == 2044  # the template's two tokens come on top


def test_a_missing_package_is_told_before_files_are_read(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge", None)
  write(tmp_path, "qmsum", ["damaged"])
  with pytest.raises(UserError, match=r"a2ats_jax\[eval\]"):
    prepare(tiny.model(), options(tmp_path))


# --- runs ---------------------------------------------------------------------------------------


def _sample(folder):
  """Two datasets; trec's score is one over the number of different signs in the first line."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for name in ("hotpotqa", "trec"):
    texts = ["".join(rng.choice(SIGNS, n)) for n in (60, 400)]
    write(folder, name, [line(context=t, answers=SIGNS, all_classes=SIGNS) for t in texts])
  return folder


def test_every_method_answers_the_same_prompts_and_a_killed_run_resumes(tmp_path):
  folder = _sample(tmp_path / "data")
  methods = parse_methods("oracle,streaming")

  def measure(out, progress=None, **changes):
    asked = options(folder, methods=methods, T=(500,), out=out, **changes)
    work = prepare(tiny.model(), asked)
    return run(tiny.model(), asked, work, progress=progress)

  def kill(phase, done, total, **figures):
    if phase == "longbench" and done == 4:
      raise KeyboardInterrupt

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  rows = measure(whole, batch=2)
  assert [row["task"] for row in rows] == ["hotpotqa"] * 3 + ["trec"] * 3 + ["average"] * 3
  assert [row["method"] for row in rows[:3]] == ["full", "oracle", "streaming"]
  lines = [json.loads(x) for x in (whole / "predictions.jsonl").read_text().splitlines()]
  assert [(x["task"], x["index"]) for x in lines] == [
    *(("hotpotqa", 0), ("hotpotqa", 1), ("trec", 0), ("trec", 1))
  ]
  model = tiny.model()
  asked = {
    (batch.unit.task, index): prompt.ids.tolist()
    for batch in prepare(model, options(folder, T=(500,))).batches
    for index, prompt in zip(batch.unit.indices, batch.prompts)
  }
  for x in lines:
    ids = asked[x["task"], x["index"]]
    assert x["tokens"] == len(ids) <= 502
    full, *others = (result["prediction"] for result in x["results"])
    assert set(others) == {full}  # the whole budget is exact attention
    # What full attention answers is what it generates from the same prompt.
    blocks = list(generate(model.decoder, Full(), [ids], new=4))
    made = [token for block in blocks for token in block.tokens[0].tolist()]
    assert full == model.tokenizer.decode(made)
    if x["task"] == "trec":
      signs = set(full.lstrip("\n").split("\n")[0]) & set(SIGNS)
      assert x["results"][0]["score"] == (1 / len(signs) if signs else 0.0)
  assert any(x["results"][0]["score"] > 0 for x in lines if x["task"] == "trec")
  for row in rows[:6]:
    mine = [x["results"] for x in lines if x["task"] == row["task"]]
    scores = [result["score"] for results in mine for result in results[:1]]
    assert row["score"] == pytest.approx(np.mean(scores))
    assert (row["n"], row["read"]) == (2, 1.0)
  for row, first, second in zip(rows[6:], rows, rows[3:]):
    assert row["score"] == pytest.approx((first["score"] + second["score"]) / 2)
    both = np.hypot(first["score_se"], second["score_se"]) / 2
    assert (row["n"], row["score_se"]) == (4, pytest.approx(both))
    assert row["method"] == first["method"]

  with pytest.raises(KeyboardInterrupt):
    measure(cut, kill, batch=2)
  assert not (cut / "metrics.json").exists()
  assert len((cut / "predictions.jsonl").read_text().splitlines()) == 2
  measure(cut, batch=2)
  for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  assert (cut / "score.png").exists()
  config = json.loads((whole / "metrics.json").read_text())["config"]
  assert config["datasets"] == ["hotpotqa", "trec"]
  assert set(config["data"]) == {"hotpotqa", "trec"}
  assert config["chat"] is True
  # Another file in the same place is another run.
  write(folder, "trec", [line(answers=SIGNS, all_classes=SIGNS)])
  with pytest.raises(UserError, match=r"belongs to another run: data\.trec was"):
    measure(cut, batch=2)


def test_an_answer_of_one_line_is_not_empty_and_ends_at_a_newline():
  """With the likeliest token as the one that ends an answer, the second likeliest comes first."""
  model, ids = tiny.model(), list(map(ord, "Ann lost her key. Bob has it. "))
  cases = cases_of(CommonOptions(methods=parse_methods("full")), {})[:1]
  tokens, lengths = pad_prompts([ids], model.config, new=0)
  logits, _ = prefill(model.decoder, Full(), tokens, lengths, new=0)
  likeliest, second = np.argsort(-np.asarray(logits[0]))[:2].tolist()

  def answer(new, **more):
    rows = next(answers(model, cases, [ids], new=new, width=512, stop=[likeliest], **more))
    return [ord(sign) for sign in rows[0]["prediction"]]

  assert answer(4) == []
  assert answer(1, some=True) == [second]
  # what follows is what follows the prompt with that token put to it
  blocks = generate(model.decoder, Full(), [[*ids, second]], new=3, stop=[likeliest])
  made = [token for block in blocks for token in block.tokens[0].tolist()]
  assert answer(4, some=True) == [
    second,
    *(token for token in made if token not in (-1, likeliest)),
  ]


def test_a_newline_ends_answers_of_samsum_alone(tmp_path, monkeypatch):
  seen = []

  def fake(model, cases, prompts, *, stop, some, **rest):
    seen.append((list(stop), some))
    return iter([[case.identity | {"prediction": "Ann went.", "read": 1.0}] for case in cases])

  monkeypatch.setattr(benchmark, "answers", fake)
  for name in ("hotpotqa", "samsum"):
    write(tmp_path, name, [line(answers=["Bob", "Ann"])])
  asked = options(tmp_path, methods=parse_methods("full"))
  rows = run(tiny.model(), asked, prepare(tiny.model(), asked))
  assert seen == [([], False), ([ord("\n")], True)]
  scores = {row["task"]: row["score"] for row in rows}  # precision 1/2, recall 1
  expected = {"hotpotqa": 2 / 3, "samsum": 2 / 3, "average": 2 / 3}
  assert scores == pytest.approx(expected, abs=1e-7)


def test_one_dataset_has_no_average(tmp_path):
  write(tmp_path, "hotpotqa", [line(), line()])
  asked = options(tmp_path, methods=parse_methods("full,oracle"), batch=2)
  rows = run(tiny.model(), asked, prepare(tiny.model(), asked))
  assert [row["task"] for row in rows] == ["hotpotqa"] * 2


def test_every_dataset_has_the_same_weight_in_the_average():
  who = {"T": 100, "options": "", "budget": None, "per": None, "n": 1, "score_std": 0.5}
  full, other = who | {"method": "full"}, who | {"method": "snapkv"}
  rows = [
    full | {"task": "lcc", "score": 0.2, "score_se": 0.3, "read": 1.0, "tail": 0.0},
    other | {"task": "lcc", "score": 0.1, "score_se": None, "read": 0.5},
    full | {"task": "trec", "score": 0.6, "score_se": 0.4, "read": 1.0, "n": 9},
    other | {"task": "trec", "score": 0.3, "score_se": 0.1, "read": 0.1},
  ]
  first, second = averages(rows)
  assert (first["method"], first["task"], first["n"], first["T"]) == ("full", "average", 10, 100)
  assert (first["score"], first["score_se"]) == (pytest.approx(0.4), pytest.approx(0.25))
  assert (first["read"], first["score_std"]) == (1.0, None)
  assert "tail" not in first  # not every dataset has it
  assert (second["method"], second["score_se"]) == ("snapkv", None)
  assert (second["score"], second["read"]) == (pytest.approx(0.2), pytest.approx(0.3))
