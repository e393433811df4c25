"""Methods by name: what is read, what is refused, what is built."""

import dataclasses

import pytest

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.far import FarPosition
from a2ats_jax.methods.full import Full
from a2ats_jax.methods.registry import METHODS, build, parse_method, parse_methods
from eval import options
from tests.eval import tiny

BUDGET = Budget(ratio=0.1)


def test_the_published_method_and_ours_are_presets():
  published, ours = (
    build(spec, budget=BUDGET, codebooks={"default": tiny.codebook()})
    for spec in parse_methods("a2ats,a2ats-plus")
  )
  assert (published.far, published.tail) == (FarPosition.constant(2048), "none")
  assert (ours.far, ours.tail) == (FarPosition.segments(8), "centroid")
  assert (published.window, published.sinks, published.budget) == (64, 8, BUDGET)


def test_options_in_text_form():
  text = "full, a2ats:far=segments(16,32):window=7 ,a2ats:tail=centroid:sinks=0"
  full, first, second = parse_methods(text)
  assert build(full) == Full()
  method = build(first, budget=BUDGET, codebooks={"default": tiny.codebook()})
  assert (method.far, method.window) == (FarPosition.segments(16, 32), 7)
  near = "a2ats:far=segments(16,32):tail=none:window=7:sinks=8:book=default"
  assert str(first) == near + ":page=16:fetch=0:order=cell:placement=auto:bits=16"
  assert parse_method(str(first)) == first
  assert second.options_text.startswith("far=constant(2048):tail=centroid:window=64:sinks=0:book=")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("qest", f"unknown name 'qest'; known: {', '.join(METHODS)}"),
    ("a2ats:b=3", "a2ats: unknown option 'b=3'; options: far, tail, window, sinks"),
    ("full:window=3", "full: unknown option 'window=3'; options: none"),
    ("oracle:window", "unknown option 'window'; options: window, sinks"),
    ("oracle:window=-1", "window: expected a whole number, got '-1'"),
    ("a2ats:tail=mean", "tail: expected none or centroid, got 'mean'"),
    ("a2ats:far=2048", "far: expected constant"),
    ("a2ats:far=constant(1,2)", "far: expected constant"),
    ("a2ats:far=segments(0)", "expected 1 to 4096 segments"),
    ("a2ats:window=1:window=2", "window is given twice"),
    ("full,full", "full is named twice"),
    (" , ", "expected at least one of full"),
  ],
)
def test_what_cannot_be_read_is_refused_by_name(text, message):
  with pytest.raises(UserError) as caught:
    parse_methods(text)
  assert message in str(caught.value)


def test_missing_parts_are_refused():
  with pytest.raises(UserError, match="needs codebooks; train some with `a2ats train`"):
    build(parse_method("a2ats"), budget=BUDGET)
  with pytest.raises(UserError, match="oracle: needs a budget"):
    build(parse_method("oracle"))
  for name in ("a2ats", "oracle", "unquantised", "true-distance"):
    (spec,) = options.parse_methods(f"{name}:window=0")
    with pytest.raises(UserError, match="window must be at least 1"):
      build(spec, budget=BUDGET, codebooks={"default": tiny.codebook()}, table=options.TABLE)


def test_every_entry_builds_with_its_defaults():
  for name, entry in options.TABLE.items():
    spec = options.parse_methods(name)[0]
    method = build(spec, budget=BUDGET, codebooks={"default": tiny.codebook()}, table=options.TABLE)
    assert entry.summary
    fields = {f.name for f in dataclasses.fields(method)}
    assert ("budget" in fields) == entry.takes_budget
    assert ("codebook" in fields) == entry.takes_codebook
    assert set(entry.options) - {"book"} <= fields
    assert ("book" in entry.options) == entry.takes_codebook


def test_full_and_the_oracle_are_always_there():
  asked = options.CommonOptions(
    methods=options.parse_methods("a2ats,oracle:window=9"),
    budgets=(Budget(ratio=0.1), Budget(tokens=64)),
  )
  cases = options.cases_of(asked, {"default": tiny.codebook()})
  assert [(c.spec.name, c.identity["budget"]) for c in cases] == [
    ("full", None),
    ("oracle", 0.1),
    ("oracle", 64),
    ("a2ats", 0.1),
    ("a2ats", 64),
  ]
  assert cases[1].identity["options"] == "window=9:sinks=8"


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"limit": 0}, "limit: expected at least 1, got 0"),
    ({"new": 0}, "new: expected at least 1"),
    ({"batch": -1}, "batch: expected at least 1, got -1"),
    ({"seed": -1}, "seed: expected 0 or more"),
    ({"T": ()}, "T: expected at least one"),
    ({"T": (1,)}, "T: expected at least 2 tokens, got 1"),
    ({"T": (64, 64)}, "T: 64 is named twice"),
    ({"budgets": (Budget(tokens=2), Budget(tokens=2))}, "budgets: 2 is named twice"),
  ],
)
def test_options_out_of_range_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    options.CommonOptions(**changes)
  assert message in str(caught.value)


def test_a_method_picks_its_codebook_by_name():
  books = {"one": tiny.codebook(), "two": tiny.codebook()}
  for name, book in books.items():
    spec = options.parse_methods(f"a2ats:book={name}")[0]
    assert build(spec, budget=BUDGET, codebooks=books).codebook is book
  with pytest.raises(UserError, match="no codebook is named 'default'; given: one, two"):
    build(options.parse_methods("a2ats")[0], budget=BUDGET, codebooks=books)
