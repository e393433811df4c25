"""Progress for people, and for logs."""

import io

from rich.console import Console

from a2ats_jax import bars as module
from a2ats_jax.bars import Bars


def shown(monkeypatch, terminal: bool, steps) -> str:
  out = io.StringIO()
  console = Console(file=out, force_terminal=terminal, width=120)
  monkeypatch.setattr(module, "Console", lambda stderr: console)
  with Bars() as bars:
    for phase, done, total, figures in steps:
      bars(phase, done, total, **figures)
  return out.getvalue()


STEPS = [
  ("collect", 0, 10, {}),
  ("collect", 10, 10, {}),
  ("adam", 3, 9, {"loss": 0.25}),
  ("adam", 9, 9, {"loss": 0.125}),
  ("collect", 2, 10, {}),  # a phase that comes again
]


def test_a_terminal_sees_a_bar_a_phase(monkeypatch):
  text = shown(monkeypatch, True, STEPS)
  assert "collect" in text
  assert "2/10" in text
  assert "loss 0.125" in text


def test_a_log_gets_lines_when_a_phase_ends(monkeypatch):
  lines = shown(monkeypatch, False, STEPS).splitlines()
  assert lines == ["collect 10/10", "adam 9/9 loss 0.125"]


def test_a_log_gets_lines_now_and_then(monkeypatch):
  monkeypatch.setattr(module, "_SECONDS", 0.0)
  assert len(shown(monkeypatch, False, STEPS).splitlines()) == len(STEPS)
