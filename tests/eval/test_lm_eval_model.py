"""The model that lm-eval takes: likelihoods, rolling likelihoods and answers against plain ones."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from a2ats_jax.errors import UserError
from a2ats_jax.generate import generate, pad_prompts, prefill
from a2ats_jax.methods.full import Full
from a2ats_jax.models.tokenizer import Tokenizer
from eval.lm_eval_model import KVModel
from eval.metrics import log_softmax
from tests.eval import tiny

TEXT = "Ann lost her key. Bob has it. Cleo went home by train and read a book about rivers. "


def instances(kind: str, *arguments) -> list[Instance]:
  return [Instance(kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def plain(ids: list[int]) -> np.ndarray:
  """Log-probabilities of every next token, each from a forward pass of its own."""
  model, rows = tiny.model(), []
  for end in range(1, len(ids) + 1):
    tokens, lengths = pad_prompts([ids[:end]], model.config, new=0)
    rows.append(np.asarray(prefill(model.decoder, Full(), tokens, lengths, new=0)[0][0]))
  return log_softmax(np.asarray(rows))


@pytest.mark.parametrize("method", ["full", "snapkv", "kivi:bits=16:group=8:residual=8"])
def test_likelihoods_equal_forward_passes(method):
  """Contexts of one token and of many, continuations of one token and over a block of 32."""
  model = KVModel(tiny.model(), method=method, budget="1")
  pairs = [(TEXT[:20], TEXT[20:60]), (TEXT[:20], "k"), ("A", "nn lost"), (TEXT[:33], " her")]
  got = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
  for (context, rest), (total, greedy) in zip(pairs, got, strict=True):
    context, rest = context.rstrip(), context[len(context.rstrip()) :] + rest
    ids = [ord(sign) for sign in context + rest]
    chances = plain(ids)[len(context) - 1 : -1]
    want = [chances[i, token] for i, token in enumerate(ids[len(context) :])]
    assert total == pytest.approx(math.fsum(want), abs=1e-3)
    assert greedy == all(c.argmax() == t for c, t in zip(chances, ids[len(context) :]))


def test_a_greedy_continuation_is_told():
  model = KVModel(tiny.model())
  ids = list(map(ord, TEXT[:20]))
  (block, *_) = generate(tiny.model().decoder, Full(), [ids], new=1)
  best = int(block.tokens[0, 0])
  assert model.score(ids, [best]) == (pytest.approx(plain(ids)[-1].max(), abs=1e-4), True)
  assert model.score(ids, [best ^ 1])[1] is False


def test_rolling_likelihood_predicts_every_token_once():
  """A text longer than the model's context, in windows that each keep what comes before."""
  short = tiny.model(context=64)
  backend = short.tokenizer._backend
  short = dataclasses.replace(short, tokenizer=Tokenizer(backend, eos=("~",)))
  model = KVModel(short)
  text = (TEXT * 2)[:100]
  (total,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
  ids, first = list(map(ord, text)), model.prefix_token_id
  want = 0.0
  for start, end in ((0, 63), (63, 100)):
    window = [first, *ids[:62]] if start == 0 else ids[99 - 63 : 99]
    tokens = [*window, ids[end - 1]]
    chances = plain(tokens)[:-1]
    mine = ids[start:end]
    want += math.fsum(chances[len(chances) - len(mine) + i, t] for i, t in enumerate(mine))
  assert total == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("context", [TEXT[:30], "A"])
def test_answers_are_greedy_and_end_before_a_stop(context):
  model = KVModel(tiny.model())
  ids = list(map(ord, context))
  want = ""
  for block in generate(tiny.model().decoder, Full(), [ids], new=12):
    want += "".join(chr(t) for t in block.tokens[0].tolist() if t >= 0)
  options = {"until": [], "max_gen_toks": 12}
  (whole,) = model.generate_until(instances("generate_until", (context, options)))
  assert whole == want[:12]
  stop = whole[5:7]
  options = {"until": ["never", stop], "max_gen_toks": 12, "do_sample": False}
  (cut,) = model.generate_until(instances("generate_until", (context, options)))
  assert cut == whole[: whole.index(stop)]


def test_requests_are_answered_in_their_order_with_one_prefill_a_context(monkeypatch):
  from eval import lm_eval_model

  seen = []
  record = lm_eval_model.record
  monkeypatch.setattr(
    lm_eval_model, "record", lambda *a, **k: seen.append(int(a[2][0])) or record(*a, **k)
  )
  model = KVModel(tiny.model())
  pairs = [(TEXT[:30], "a"), (TEXT[:12], "b"), (TEXT[:30], "c"), (TEXT[:12], "d")]
  got = model.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
  assert len(seen) == 2
  encoded = [
    (list(map(ord, c.rstrip())), list(map(ord, c[len(c.rstrip()) :] + rest))) for c, rest in pairs
  ]
  alone = [model.score(*pair) for pair in encoded]
  assert [total for total, _ in got] == pytest.approx([total for total, _ in alone], abs=1e-5)


def test_a_small_budget_changes_what_is_scored():
  """The method is under the continuation, not beside it."""
  ids = list(map(ord, TEXT * 4))
  full = KVModel(tiny.model()).score(ids[:300], ids[300:320])[0]
  few = KVModel(tiny.model(), method="streaming", budget="8").score(ids[:300], ids[300:320])[0]
  assert abs(full - few) > 1e-3
  assert jnp.isfinite(few)


def test_bad_input_is_one_line():
  with pytest.raises(UserError, match="unknown name 'nope'"):
    KVModel(tiny.model(), method="nope")
  with pytest.raises(UserError, match="needs codebooks"):
    KVModel(tiny.model(), method="a2ats")
  with pytest.raises(UserError, match="no token that ends a text"):
    KVModel(tiny.model()).loglikelihood(instances("loglikelihood", ("", "a")), disable_tqdm=True)
  model = KVModel(tiny.model(context=64))
  with pytest.raises(UserError, match="exceeds the model's context of 64"):
    model.score([65], [66] * 65)
  asked = ("Ann", {"until": ["."], "do_sample": True, "temperature": 0.7})
  with pytest.raises(UserError, match="do_sample"):
    model.generate_until(instances("generate_until", asked))


SCRIPT = """
import json, sys
import lm_eval
from eval.lm_eval_model import KVModel
from tests.eval import tiny

shared = {
  "dataset_path": "json",
  "dataset_kwargs": {"data_files": {"test": sys.argv[1]}},
  "test_split": "test",
  "doc_to_text": "{{q}}",
  "target_delimiter": "",
}
choice = shared | {
  "task": "choice",
  "output_type": "multiple_choice",
  "doc_to_choice": "{{choices}}",
  "doc_to_target": "{{answer}}",
  "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
open_ = shared | {
  "task": "open",
  "output_type": "generate_until",
  "doc_to_target": "{{choices[answer]}}",
  "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
  "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
model = KVModel(tiny.model(), method="snapkv", budget="0.5")
found = lm_eval.simple_evaluate(model=model, tasks=[choice, open_], bootstrap_iters=0)
samples = found["samples"]
print(json.dumps([
  found["results"]["choice"]["acc,none"],
  [float(response[0][0]) for response in samples["choice"][0]["resps"]],
  samples["open"][0]["resps"][0][0],
]))
"""


def test_the_packages_evaluator_takes_it(tmp_path):
  """Tasks of a choice and of an open answer, from a file, by lm-eval's own loop."""
  data = tmp_path / "data.jsonl"
  rows = [{"q": TEXT[:25], "choices": [" it.", " no"], "answer": 0}]
  data.write_text("".join(json.dumps(row) + "\n" for row in rows))
  root = Path(__file__).parents[2]
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(data)],
    cwd=root,
    env=os.environ
    | {"HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=400,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  accuracy, likelihoods, answer = json.loads(run.stdout.splitlines()[-1])
  model, ids = KVModel(tiny.model(), method="snapkv", budget="0.5"), list(map(ord, TEXT[:25]))
  want = [model.score(ids, list(map(ord, choice)))[0] for choice in (" it.", " no")]
  assert likelihoods == pytest.approx(want, abs=1e-4)
  assert accuracy == float(want[0] > want[1])
  assert answer == model.answer(ids, ["."], new=6)
