"""Profiles: curves of a model's own attention, and budgets that follow from them."""

import dataclasses

import numpy as np
import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods.base import Needs
from a2ats_jax.methods.layer_budget import POINTS, load_profile
from a2ats_jax.methods.registry import build, parse_method
from eval import fidelity, profile
from eval.options import parse_methods
from eval.record import Recorder, record
from tests.eval import tiny


def test_it_is_the_mean_of_what_prompts_show(tmp_path):
  """Two prompts of a text; each curve from the attention that a recording of the prompt holds."""
  model, text = tiny.model(), tiny.prose()
  seen = []
  curves = profile.measure(
    model,
    [text],
    tmp_path / "p.json",
    T=50,
    limit=2,
    progress=lambda phase, done, of, **_: seen.append((phase, done, of)),
  )
  assert ("profile", 2, 2) in seen
  assert load_profile(str(tmp_path / "p.json")) == curves
  ids = model.tokenizer.encode(text.text, special=False)
  windows = np.asarray(ids[: len(ids) // 50 * 50]).reshape(-1, 50)
  picked = np.sort(np.random.default_rng(0).permutation(len(windows))[:2])
  want = np.zeros((2, POINTS + 1))
  for row in picked:
    tokens, lengths = pad_prompts([windows[row].tolist()], model.config, new=0)
    recording = record(model.decoder, tokens, lengths, methods=[Recorder(Needs(sums=True))])
    sums = np.asarray(recording.prompt.sums)[:, 0, :, :50].astype(np.float64)
    np.testing.assert_allclose(sums.sum(axis=-1), 50, rtol=1e-5)  # every query gives 1
    for layer in range(2):
      best = np.sort(sums[layer].mean(axis=0))[::-1]
      carried = np.concatenate([[0], np.cumsum(best)]) / best.sum()
      want[layer] += np.interp(np.linspace(0, 1, POINTS + 1), np.linspace(0, 1, 51), carried) / 2
  np.testing.assert_allclose(curves, want, atol=1e-6)


def profiled(path, T: int):
  profile.measure(tiny.model(), [tiny.prose()], path, T=T, limit=1)
  return path


def test_a_method_takes_it_by_name(tmp_path):
  path = tmp_path / "p.json"
  profile.measure(tiny.model(), [tiny.prose()], path, T=40, limit=1)
  method = build(parse_method(f"h2o:profile={path}"), budget=Budget(ratio=0.5))
  assert dataclasses.asdict(method)["profile"] == load_profile(str(path))


def test_a_run_knows_the_profile_by_what_it_holds(tmp_path):
  """Another profile under the same name does not go on with the run."""
  path, out = tmp_path / "p.json", tmp_path / "run"
  options = fidelity.FidelityOptions(
    methods=parse_methods(f"h2o:profile={profiled(path, 40)}"),
    budgets=(Budget(ratio=0.5),),
    T=(48,),
    limit=1,
    new=2,
    out=out,
  )
  fidelity.run(tiny.model(), options, [tiny.prose()])
  profiled(path, 60)
  with pytest.raises(UserError, match="profile_sha256"):
    fidelity.run(tiny.model(), options, [tiny.prose()])


def test_bad_input_is_one_line(tmp_path):
  with pytest.raises(UserError, match="it has"):
    profile.measure(tiny.model(), [tiny.prose(2)], tmp_path / "p.json", T=500, limit=3)
  with pytest.raises(UserError, match="context"):
    profile.measure(tiny.model(context=64), [tiny.prose()], tmp_path / "p.json", T=65, limit=1)
  assert not list(tmp_path.iterdir())
