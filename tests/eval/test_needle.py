"""Needle prompts: one needle, where it was asked for, never too long; and the scoring."""

import json
import random

import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate
from a2ats_jax.methods.full import Full
from eval import single_needle
from eval.needle import NeedleOptions, make_prompts, run
from eval.options import parse_methods
from eval.ruler.scoring import match_all
from tests.eval import tiny


def _options(**changes):
  given = {"T": (700, 1500), "limit": 5, "new": 4, "haystacks": ("noise", "prose")}
  return NeedleOptions(**(given | changes))


def _prompts(**changes):
  model = changes.pop("model", tiny.model())
  return make_prompts(model, _options(**changes), [tiny.prose()])


def test_a_prompt_holds_one_needle_at_its_depth_and_no_more_than_T_tokens():
  prompts = _prompts()
  assert list(prompts) == [
    ("niah-noise", 700),
    ("niah-noise", 1500),
    ("niah-tiny prose", 700),
    ("niah-tiny prose", 1500),
  ]
  for (task, T), of_length in prompts.items():
    assert [p.depth for p in of_length] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for prompt in of_length:
      assert prompt.ids == tuple(map(ord, prompt.text))
      unit = 91 if task == "niah-noise" else 80  # characters of a unit, at most
      assert T - unit < len(prompt.ids) <= T
      assert prompt.text.count(prompt.answer) == 1
      start = prompt.text.index("\n") + 1
      context = prompt.text[start : prompt.text.rindex("\nWhat is the special")]
      needle = context[context.index("One of the special magic numbers for ") :]
      needle = needle[: needle.index(prompt.answer) + 8]
      assert needle.endswith(f" is: {prompt.answer}.")
      there = context.index(needle) / (len(context) - len(needle))
      assert abs(there - prompt.depth) < 0.5 * unit / (len(context) - len(needle)) + 0.05


def test_the_wording_is_rulers():
  prompt = _prompts(haystacks=("noise",))["niah-noise", 700][0]
  lines = prompt.text.split("\n")
  key = lines[-1].split(" for ")[1].split(" mentioned")[0]
  assert lines[0] == (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
  )
  assert lines[-1] == (
    f"What is the special magic number for {key} mentioned in the provided text? "
    f"The special magic number for {key} mentioned in the provided text is"
  )
  filler = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
  )
  needle = f"One of the special magic numbers for {key} is: {prompt.answer}."
  assert set(lines[1:-1]) == {filler, needle}
  assert prompt.answer.isdigit()
  assert len(prompt.answer) == 7


def test_depth_0_and_1_are_the_ends():
  for task, T in (("niah-noise", 700), ("niah-tiny prose", 700)):
    first, last = _prompts(depths=(0.0, 1.0), limit=2)[task, T]
    assert "afterwards.\nOne of the special" in first.text
    assert f" is: {last.answer}.\nWhat is the special" in last.text


def test_prompts_are_the_same_for_a_seed_and_others_for_another():
  assert _prompts() == _prompts()
  ours, theirs = _prompts(), _prompts(seed=1)
  answers = [[p.answer for p in of_length] for of_length in ours.values()]
  assert len({a for group in answers for a in group}) == 20
  assert all(a.text != b.text for key in ours for a, b in zip(ours[key], theirs[key]))
  # a prompt does not depend on how many others there are
  assert _prompts(limit=2, T=(700,))["niah-noise", 700] == ours["niah-noise", 700][:2]


def test_the_chat_template_wraps_the_question_and_bos_is_counted():
  prompt = _prompts(chat=True, T=(700,))["niah-noise", 700][0]
  assert prompt.text.startswith("[A special magic number")
  assert "provided text?] The special magic number for" in prompt.text
  assert len(prompt.ids) == len(prompt.text) <= 700
  plain = _prompts(model=tiny.model(bos=True), T=(700,))["niah-noise", 700][0]
  assert plain.ids == (1, *map(ord, plain.text))
  assert len(plain.ids) <= 700


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"T": (200,)}, "the question alone takes"),
    ({"T": (1500,), "haystacks": ("prose",), "short": True}, "T is 1500"),
    ({"depths": (1.5,)}, "depths: expected numbers in [0, 1]"),
    ({"haystacks": ()}, "haystacks: expected noise or prose, got none"),
  ],
)
def test_what_cannot_be_asked_is_refused(changes, message):
  kinds = [tiny.prose(10) if changes.pop("short", False) else tiny.prose()]
  with pytest.raises(UserError) as caught:
    make_prompts(tiny.model(), _options(**changes), kinds)
  assert message in str(caught.value)


def test_prose_needs_a_text():
  with pytest.raises(UserError, match="prose needs a text"):
    make_prompts(tiny.model(), _options(), [])


@pytest.mark.parametrize(
  ("prediction", "answers", "expected"),
  [
    (" 1234567. The", ["1234567"], 1.0),
    ("123456 7", ["1234567"], 0.0),
    ("it is ABC-def!", ["abc-DEF"], 1.0),
    ("one, three", ["one", "two", "THREE"], 2 / 3),
    ("", ["1"], 0.0),
  ],
)
def test_scoring_by_hand(prediction, answers, expected):
  assert match_all(prediction, answers) == expected


def test_a_drawn_first_sentence_leaves_enough_text():
  sentences = single_needle.sentences_of(tiny.prose())
  tokenizer = tiny.model().tokenizer
  for seed in range(20):
    first = single_needle.first_sentence(sentences, tokenizer, 1500, random.Random(seed))
    assert len(" ".join(sentences[first:])) + 1 >= 1500
  assert single_needle.first_sentence(sentences, tokenizer, 10**6, random.Random(0)) == 0


def test_every_method_answers_the_same_prompts_and_a_killed_run_resumes(tmp_path):
  def options(out):
    return _options(
      methods=parse_methods("a2ats-plus:window=8"),
      budgets=(Budget(ratio=1.0),),
      T=(450,),
      limit=2,
      haystacks=("noise",),
      out=out,
    )

  def kill(phase, done, total, **figures):
    if phase == "needle" and done == 4:
      raise KeyboardInterrupt

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  rows = run(tiny.model(), options(whole), codebooks={"default": tiny.codebook()})
  assert [row["method"] for row in rows] == ["full", "oracle", "a2ats-plus"]
  lines = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
  for line in lines:
    assert line["tokens"] <= 450
    predictions = [result["prediction"] for result in line["results"]]
    assert len(predictions[0]) == 4
    assert set(predictions) == {predictions[0]}  # the whole budget is exact attention
  # What full attention answers is what it generates from the same prompt.
  model = tiny.model()
  prompts = make_prompts(model, options(whole), [])["niah-noise", lines[0]["T"]]
  for line in lines:
    ids = prompts[line["index"]].ids
    blocks = list(generate(model.decoder, Full(), [ids], new=4))
    made = [token for block in blocks for token in block.tokens[0].tolist()]
    assert line["results"][0]["prediction"] == model.tokenizer.decode(made)
  for row in rows:
    assert row["task"] == "niah-noise"
    assert row["score"] == 0.0
    assert row["read"] == 1.0
  with pytest.raises(KeyboardInterrupt):
    run(tiny.model(), options(cut), codebooks={"default": tiny.codebook()}, progress=kill)
  assert not (cut / "metrics.json").exists()
  run(tiny.model(), options(cut), codebooks={"default": tiny.codebook()})
  for name in ("metrics.json", "predictions.jsonl"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()
  assert (cut / "score.png").exists()
