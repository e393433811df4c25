"""RULER's prompts: the wording, and answers that a reader finds again in the prompt's text."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a2ats_jax.errors import UserError
from a2ats_jax.models.checkpoint import read_checkpoint
from a2ats_jax.models.tokenizer import Tokenizer
from eval.ruler.documents import Asked, Documents, read_hotpotqa, read_squad
from eval.ruler.fitting import fit, largest
from eval.ruler.haystack import NOISE, first_words
from eval.ruler.scoring import match_all, match_part
from eval.ruler.tasks import TASKS
from eval.ruler.vocabulary import Vocabulary, english
from tests.eval import tiny
from tests.eval.ruler_material import (
  WORDS,
  documents,
  hotpotqa_file,
  material,
  place,
  squad_file,
)

MADE = "One of the special magic "
# Characters that the last unit may leave unused: its own length, and a little.
SLACK = {
  **dict.fromkeys(("niah_single_1", "niah_multikey_2", "vt"), 120),
  **dict.fromkeys(("niah_multikey_3",), 140),
  **dict.fromkeys(("qa_1", "qa_2"), 130),
}


def prompt(task: str, chat: bool = False, **where):
  mine = place(task, **where)
  return fit(TASKS[task].source(mine), mine, new=TASKS[task].new, chat=chat)


def needles(text: str) -> list[tuple[str, str, str]]:
  """Kind, key and value of every needle in a text."""
  return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s)", text)


def asked(text: str) -> list[str]:
  """The keys that the question names."""
  question = text.split("\n")[-1]
  return re.split(r", and |, ", re.findall(r"magic \w+ for (.+?) mentioned", question)[0])


# --- needles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("task", "kind", "hidden", "keys", "answers"),
  [
    ("niah_single_1", "numbers", 1, 1, 1),
    ("niah_single_2", "numbers", 1, 1, 1),
    ("niah_single_3", "uuids", 1, 1, 1),
    ("niah_multikey_1", "numbers", 4, 4, 1),
    ("niah_multikey_2", "numbers", None, None, 1),
    ("niah_multikey_3", "uuids", None, None, 1),
    ("niah_multivalue", "numbers", 4, 1, 4),
    ("niah_multiquery", "numbers", 4, 4, 4),
  ],
)
def test_a_reader_finds_the_needles(task, kind, hidden, keys, answers):
  value = r"\d{7}" if kind == "numbers" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
  for index in range(4):
    mine = prompt(task, index=index)
    found = needles(mine.text)
    assert {k for k, _, _ in found} == {kind}
    assert all(re.fullmatch(value, v) for _, _, v in found)
    table: dict[str, list[str]] = {}
    for _, key, number in found:
      table.setdefault(key, []).append(number)
    if hidden is not None:
      assert (len(found), len(table)) == (hidden, keys)
    else:  # every line is a needle, none like another
      lines = mine.text.split("\n")[1:-1]
      assert len(lines) == len(found) == len(table) > 8
      assert all(line.startswith(MADE) for line in lines)
    assert len({v for _, _, v in found}) == len(found)
    assert Counter(v for key in asked(mine.text) for v in table[key]) == Counter(mine.answers)
    assert len(mine.answers) == answers
    assert all(mine.text.count(answer) == 1 for answer in mine.answers)


def test_the_wording_of_needles():
  text = prompt("niah_single_3").text
  (key,) = asked(text)
  first, *_, last = text.split("\n")
  assert first == (
    "A special magic uuid is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the uuid afterwards."
  )
  assert last == (
    f"What is the special magic uuid for {key} mentioned in the provided text? "
    f"The special magic uuid for {key} mentioned in the provided text is"
  )
  text = prompt("niah_multiquery").text
  a, b, c, d = asked(text)
  first, *_, last = text.split("\n")
  assert first == (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the numbers afterwards."
  )
  assert last == (
    f"What are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided "
    f"text? The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text are"
  )
  assert all(re.fullmatch(r"[a-z]{4}-[a-z]{4}", key) for key in (a, b, c, d))


def test_what_needles_are_hidden_in():
  text = prompt("niah_single_1").text
  assert Counter(text.split("\n")[1:-1])[NOISE] == len(text.split("\n")) - 3
  prose = " ".join(material().sentences)
  for task in ("niah_single_2", "niah_multivalue"):
    context = prompt(task).text.split("\n")[1]
    left = re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "", context).strip()
    assert left in f"{prose} {prose}"
    assert len(left) > 1000


def test_needles_lie_anywhere():
  """In noise before the last line at latest, in prose at the ends too."""
  for task in ("niah_single_1", "niah_single_2"):
    there, texts = [], [prompt(task, index=index).text for index in range(40)]
    for text in texts:
      start, end = text.index("\n") + 1, text.rindex("\nWhat")
      there.append((text.index(MADE) - start) / (end - start))
    assert min(there) < 0.2
    assert max(there) > 0.8
    assert 0.3 < sum(there) / 40 < 0.7
  assert not any(
    " is: " in prompt("niah_single_1", index=i).text.split("\n")[-2] for i in range(40)
  )


def test_keys_never_repeat():
  """Four keys of two adjectives and two nouns are all there are."""
  few = material(words=Vocabulary(nouns=("hat", "jar"), adjectives=("icy", "odd"), verbs=()))
  for index in range(4):
    keys = asked(prompt("niah_multiquery", index=index, material=few).text)
    assert sorted(keys) == ["icy-hat", "icy-jar", "odd-hat", "odd-jar"]


def test_first_words_go_round_once():
  assert first_words(["a b", "c.", "d e f"], 1, 5) == ["c.", "d e f", "a"]
  assert first_words(["a b", "c.", "d e f"], 2, 2) == ["d e"]
  assert first_words(["a b", "c."], 0, 9) == ["a b", "c."]


# --- variable tracking --------------------------------------------------------------------------


def variables(text: str, value: str) -> set[str]:
  """Runs the assignments in their order and gives the variables that hold a value at the end."""
  held: dict[str, str] = {}
  for name, source, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
    held[name] = held[source] if source else number
  return {name for name, there in held.items() if there == value}


@pytest.mark.parametrize("T", [2048, 4096])
def test_running_the_assignments_gives_the_answer(T):
  question = r"assigned the value (\d{5}) in the text above\."
  for index in range(4):
    mine = prompt("vt", T=T, index=index)
    example, text = mine.text.split("\n\n\n\n")
    (value,), (solved,) = re.findall(question, text), re.findall(question, example)
    assert value != solved
    assert variables(text, value) == set(mine.answers)
    assert len(mine.answers) == len(set(mine.answers)) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in mine.answers)
    assert len(re.findall("VAR .{5} = VAR", text)) == 4
    said = example.split("they are:  ")[1].split(" ")
    assert variables(example, solved) == set(said)
    assert all(re.fullmatch("[A-Z]{3}", name) for name in said)
    assert len(said) == 5
    assert "\n" not in example


def test_the_wording_of_variable_tracking():
  example, text = prompt("vt").text.split("\n\n\n\n")
  value = text.split("the value ")[1][:5]
  assert text.startswith(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  )
  assert text.endswith(
    f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    f"assgined the value {value}, they are: "
  )
  assert example.startswith(" Memorize and track the chain(s) of variable assignment hidden in ")
  # five lines, the fewest there may be, in which the assignments go between sentences
  assert example.count("The grass is green") == 5
  assert example.count("VAR") == 9


def test_few_lines_are_cut_into_sentences():
  text = TASKS["vt"].source(place("vt")).make(1).text.split("\n\n\n\n")[1]
  context = text.split("\n\n")[1]
  assert len(re.findall(r"VAR \w{5} = ", context)) == 5
  bare = re.sub(r"VAR \w{5} = (VAR )?\w{5}", "", context.split("Question")[0])
  assert " ".join(bare.split()) == NOISE


# --- counting words -----------------------------------------------------------------------------


def listed(text: str) -> Counter[str]:
  """The words of a numbered list; the numbers count up from 1."""
  pairs = re.findall(r"(\d+)\. (\S+)", text)
  assert [int(number) for number, _ in pairs] == list(range(1, len(pairs) + 1))
  return Counter(word for _, word in pairs)


@pytest.mark.parametrize(
  ("T", "example", "often", "seldom"), [(2048, (20, 3, 1), 6, 1), (4096, (40, 10, 3), 30, 3)]
)
def test_counting_the_list_gives_the_answer(T, example, often, seldom):
  mine = TASKS["cwe"].source(place("cwe", T=T)).make(15)
  start = "Below is a numbered list of words."
  end = "\nQuestion: What are the 10 most common words in the above list?"
  _, first, second = mine.text.split(start)
  counts = listed(second.split(end)[0])
  assert sorted(counts.values()) == [seldom] * 5 + [often] * 10
  assert {word for word, _ in counts.most_common(10)} == set(mine.answers)
  solved, said = first.split(f"{end}{mine.prefix}")
  there = listed(solved)
  words, common, others = example
  assert sorted(there.values()) == [others] * (words - 10) + [common] * 10
  assert {word for word, _ in there.most_common(10)} == set(listed(said))
  assert not counts.keys() & there.keys()
  assert mine.prefix == " Answer: The top 10 words that appear most often in the list are:"
  assert second.startswith(
    " In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n1. "
  )


def test_when_words_run_out_the_list_is_shorter():
  few = Vocabulary(nouns=tuple(WORDS[:40]), adjectives=(), verbs=())
  mine = prompt("cwe", T=4000, material=material(words=few))
  assert len(mine.ids) < 2000
  assert len(listed(mine.text.split("in the list are:")[1].split("most often.\n")[1])) == 20


@pytest.mark.parametrize("T", [1024, 4096])
def test_counting_the_coded_text_gives_the_answer(T):
  for index in range(4):
    mine = prompt("fwe", T=T, index=index)
    start, end = "coded words. ", "\nQuestion: Do not provide any explanation."
    counts = Counter(mine.text.split(start)[1].split(end)[0].split(" "))
    (dots, most), *others = counts.most_common()
    assert dots == "..."
    assert [word for word, _ in others[:3]] == list(mine.answers)
    assert most > others[0][1] > others[1][1] > others[2][1] > others[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in others)


def test_counts_of_the_coded_text_by_hand():
  """100 k^-2 / (pi^2 / 6) = 60.8, 15.2, 6.8, 3.8, 2.4, 1.7, 1.2, 0.9."""
  mine = TASKS["fwe"].source(place("fwe")).make(100)
  words = mine.text.split("coded words. ")[1].split("\n")[0].split(" ")
  assert sorted(Counter(words).values(), reverse=True) == [60, 15, 6, 3, 2, 1, 1]
  assert mine.text.startswith(
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
  )
  assert mine.text.endswith(
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
  )
  assert mine.prefix == (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
  )


# --- documents ----------------------------------------------------------------------------------


def test_documents_hold_the_answer_and_fill_the_prompt():
  numbered = []
  for index in range(12):
    mine = prompt("qa_1", index=index)
    shown = re.findall(r"Document (\d+):\nTown (\d+) has (\d+) lamps", mine.text)
    assert [int(number) for number, _, _ in shown] == list(range(1, len(shown) + 1))
    town = re.findall(r"Question: How many lamps has town (\d+)\? Answer:$", mine.text)[0]
    assert {name: lamps for _, name, lamps in shown}[town] == mine.answers[0]
    assert len({name for _, name, _ in shown}) == len(shown) > 10
    numbered.append(next(int(number) for number, name, _ in shown if name == town))
    # what belongs to the question comes before any other document
    assert {"000", "001"} <= {name for _, name, _ in shown}
  assert len(set(numbered)) > 3
  assert mine.text.startswith(
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\nDocument 1:\nTown"
  )
  assert (
    "\n\nAnswer the question based on the given documents. Only give me the answer and do "
    in (mine.text[200:])
  )


def test_near_documents_come_first():
  near = TASKS["qa_1"].source(place("qa_1"))
  text = near.make(3).text
  town = re.findall(r"has town (\d+)\?", text)[0]
  mine = documents().asked[int(town)]
  assert set(re.findall(r"Document \d+:\n(.*?)\n\n", text)) == {*mine.needed, *mine.near}


def test_all_lengths_ask_the_same_questions_and_no_question_twice():
  def questions(T):
    return [prompt("qa_1", T=T, index=i).text.split("Question: ")[1] for i in range(100)]

  short = questions(600)
  assert short == questions(900)
  assert len(set(short)) == 100
  with pytest.raises(UserError, match="limit: qa_1 has a file of 100 questions"):
    prompt("qa_1", index=100)


def test_squad_files(tmp_path):
  read = read_squad(squad_file(tmp_path / "squad.json"))
  assert [one.question for one in read.asked] == [
    "How many lamps has Ulm?",
    "How many lamps has Bonn?",
    "How many lamps has Kiel?",
  ]
  assert read.asked[0] == Asked(
    question="How many lamps has Ulm?",
    answers=("seven",),
    needed=("Ulm has seven lamps.",),
    near=("Bonn has nine lamps.",),
  )
  # the paragraph of a question without an answer is a document all the same
  assert read.documents == (
    "Bonn has nine lamps.",
    "Kiel has two lamps.",
    "Trier has none lamps.",
    "Ulm has seven lamps.",
  )


def test_hotpotqa_files(tmp_path):
  read = read_hotpotqa(hotpotqa_file(tmp_path / "hotpot.json"))
  lamps, bridges = "Lamps\nThey are lit. At dusk.", "Bridges\nThere are two."
  assert read.documents == (bridges, lamps)
  assert read.asked[0].needed == (lamps, bridges)
  assert [one.answers for one in read.asked] == [("at dusk",), ("two",)]


@pytest.mark.parametrize(
  "text", ["{", "[]", '{"data": [{}]}', "[1]", '{"data": []}', '{"data": [{"paragraphs": 3}]}']
)
@pytest.mark.parametrize("read", [read_squad, read_hotpotqa])
def test_other_files_are_refused(tmp_path, read, text):
  path = tmp_path / "file.json"
  path.write_text(text)
  with pytest.raises(UserError, match=r"(squad|hotpotqa) .*file\.json: expected"):
    read(path)


# --- lengths, seeds, words ----------------------------------------------------------------------


@pytest.mark.parametrize("T", [1024, 2048, 4096])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_with_their_answers_fill_T(task, T):
  mine = place(task, T=T)
  if (task, T) in (("vt", 1024), ("cwe", 1024), ("cwe", 4096)):  # the example is too long for T
    with pytest.raises(UserError, match=rf"{task} needs at least \d{{4}} tokens, T is {T}"):
      prompt(task, T=T)
    return
  made = fit(TASKS[task].source(mine), mine, new=TASKS[task].new, chat=False)
  assert made.ids == tuple(map(ord, made.text))
  slack = SLACK.get(task, 60)
  if task == "cwe":
    slack = 40
  assert T - slack <= len(made.ids) + TASKS[task].new <= T


@pytest.fixture(scope="module")
def real() -> Tokenizer:
  return read_checkpoint("smollm2-135m-instruct").tokenizer


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1"])
def test_prompts_fit_the_real_tokenizer(real, task):
  T, new = 1024, TASKS[task].new
  mine = place(task, T=T, tokenizer=real)
  for chat in (False, True):
    made = fit(TASKS[task].source(mine), mine, new=new, chat=chat)
    assert list(made.ids) == real.encode(made.text, special=not chat)
    assert T - 110 <= len(made.ids) + new <= T


@pytest.mark.parametrize("task", TASKS)
def test_prompts_depend_on_seed_task_length_and_index_alone(task):
  ours = prompt(task)
  assert prompt(task) == ours
  others = [prompt(task, seed=1), prompt(task, index=1), prompt(task, T=2047)]
  assert len({ours.text, *(other.text for other in others)}) == 4


@pytest.mark.parametrize("task", ["niah_multiquery", "vt", "cwe"])
def test_the_answer_begins_after_the_chat_template(task):
  mine, source = place(task), TASKS[task].source(place(task))
  made = fit(source, mine, new=TASKS[task].new, chat=True)
  question = source.make(source.least)
  assert made.text.startswith("[")
  assert made.text.endswith(f"]{question.prefix}")
  assert len(made.ids) + TASKS[task].new <= 2048


def test_bos_is_counted():
  made = prompt("fwe", tokenizer=tiny.model(bos=True).tokenizer)
  assert made.ids == (1, *map(ord, made.text))
  assert len(made.ids) + 50 <= 2048


def test_too_little_prose_is_refused():
  few = material(sentences=material().sentences[:10])
  with pytest.raises(UserError, match=r"niah_single_2: all there is makes \d+ tokens, T is 2048"):
    prompt("niah_single_2", material=few)


def test_fewer_documents_than_fit_are_all_shown():
  few = Documents(documents=documents().documents[:5], asked=documents().asked[:5], sha256="")
  assert prompt("qa_1", material=material(squad=few)).text.count("has 10") == 5


@settings(max_examples=60, deadline=None)
@given(
  st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(0, 1500), st.integers(0, 5)
)
def test_largest_is_what_counting_up_finds(sizes, room, least):
  least, most = min(least, len(sizes) - 1), len(sizes) - 1

  def count(units):
    return sum(sizes[: units + 1])

  fits = [units for units in range(least, most + 1) if count(units) <= room]
  assert largest(count, least=least, most=most, room=room) == (fits[-1] if fits else None)


def test_largest_counts_few_times():
  asked_for = []

  def count(units):
    asked_for.append(units)
    return 100 + 7 * units + units % 3

  assert count(largest(count, least=1, most=131072, room=131072)) <= 131072
  assert len(asked_for) <= 8


@pytest.mark.parametrize(
  ("prediction", "answers", "every", "some"),
  [
    (" 1234567. The", ["1234567"], 1.0, 1.0),
    ("123456 7", ["1234567"], 0.0, 0.0),
    ("one, three", ["one", "two", "THREE"], 2 / 3, 1.0),
    ("ONE", ["two", "One"], 1 / 2, 1.0),
    ("", ["1"], 0.0, 0.0),
  ],
)
def test_scoring_by_hand(prediction, answers, every, some):
  assert match_all(prediction, answers) == every
  assert match_part(prediction, answers) == some


def test_the_table():
  assert list(TASKS) == [
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
  ]
  assert [task.new for task in TASKS.values()] == [128] * 8 + [30, 120, 50, 32, 32]
  assert [name for name, task in TASKS.items() if task.score is match_part] == ["qa_1", "qa_2"]


def test_the_words():
  pytest.importorskip("wonderwords")
  words = english()
  assert len(words.all) > 5000
  assert {"apple", "abacus"} <= {*words.nouns}
  assert "quiet" in words.adjectives
  assert "accept" in words.verbs
  assert len(set(words.all)) == len(words.all)


def test_words_without_their_package(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "wonderwords", None)
  with pytest.raises(UserError, match=r"a2ats_jax\[eval\]"):
    english.__wrapped__()
