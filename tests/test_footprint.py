"""Bytes a token by method: against arithmetic by hand, and against states that were allocated."""

import json

import jax.numpy as jnp
import pytest

from a2ats_jax import cli, footprint, plan_known
from a2ats_jax.budget import Budget
from a2ats_jax.methods.base import Geometry
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.registry import METHODS, parse_method, parse_methods

LLAMA = plan_known.find_model("llama-3.1-8b")  # L = 32, K = 8, D = 128
TOKEN = 2 * 32 * 8 * 128 * 2  # bfloat16
TENTH = Budget(ratio=0.1)

# Device and host bytes a token, from the docstrings.
BY_HAND = {
  "full": (TOKEN, 0),
  "streaming": ((TOKEN + 4 * 8 * 32) / 10, 0),
  "h2o": ((TOKEN + 8 * 8 * 32) / 10, 0),
  # Two layers keep everything, and behind the last one is room for another such.
  "l2norm": ((2 + 29 / 10 + 1) / 32 * (TOKEN + 4 * 8 * 32), 0),
  "kivi": (2 * 32 * 8 * 128 * (4 / 8 + 4 / 32), 0),
  "kivi:prune=0.25": (32 * 8 * (128 + 96) * (4 / 8 + 4 / 32), 0),
  "think": (32 * 8 * (256 - 51) * 2, 0),
  "quest": (TOKEN * (1 + 1 / 16), 0),
  "a2ats": (32 * 8 * (8 + 8 / 16), TOKEN),
  "a2ats:bits=8": (32 * 8 * (8 + 8 / 16), 2 * 32 * 8 * (128 + 128 // 32 * 4)),
}


def cost(text: str, budget: Budget = TENTH, codewords: int = 64):
  return footprint.cost_of(
    parse_method(text), LLAMA, budget=budget, codewords=codewords, dtype=jnp.bfloat16
  )


@pytest.mark.parametrize("text", BY_HAND)
def test_bytes_a_token_by_hand(text):
  found = cost(text)
  device, host = BY_HAND[text]
  assert found.device == pytest.approx(device, rel=1e-3)
  assert found.host == host


def test_codebooks_are_fixed_bytes():
  """Codewords in float32, and what is summed for each."""
  more = cost("a2ats", codewords=128).fixed - cost("a2ats", codewords=64).fixed
  assert more >= 32 * 8 * 64 * 128 * 4


def test_a_number_of_tokens_does_not_grow():
  found = cost("streaming", Budget(tokens=2048))
  assert found.device == 0
  assert found.fixed == 2048 * (TOKEN + 4 * 8 * 32) + 32 * 8 * 4


def test_needs_are_those_of_prefill():
  assert (cost("h2o").sums, cost("h2o").queries) == (True, 0)
  assert (cost("snapkv:window=9").sums, cost("snapkv:window=9").queries) == (False, 9)


def test_states_are_counted_as_they_are_allocated():
  shape = Geometry(
    batch=2, layers=3, heads=4, kv_heads=2, head_dim=8, prompt=20, new=4, dtype=jnp.float32
  )
  assert footprint.state_bytes(Full().init(shape)) == (2 * 3 * 2 * 2 * 24 * 8 * 4, 0)


def test_the_command_lists_every_method(capfd):
  cli.main(["methods", "--json", "--codewords", "64"])
  rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
  assert {row["method"] for row in rows} == set(METHODS) - {"a2ats-reference"}
  assert {row["method"] for row in rows if row["host_bytes_a_token"]} >= {"a2ats", "clusterkv"}
  for row in rows:
    assert row["tested"].startswith("CPU")
    assert row["full_bytes_a_token"] == TOKEN
  cli.main(["methods", "--methods", "kivi,full", "--codewords", "64"])
  out = capfd.readouterr().out
  assert "40,960" in out
  assert "31.2%" in out
  assert len(parse_methods("kivi,full")) == len(out.strip().splitlines()) - 2
