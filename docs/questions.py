"""Write questions about a text in the formats of SQuAD 2.0 and HotpotQA, where none are at hand.

RULER's two tasks of questions need such files. These ask for the word that follows eight others in
one passage, which only that passage can answer. They make the tasks run; their scores compare with
nobody else's.

  python docs/questions.py novels.txt squad.json hotpotqa.json
"""

import argparse
import json
import random
import re
from pathlib import Path

ASKED = 64  # questions of a file
BESIDE = 9  # passages that come with a question of HotpotQA and do not answer it
CONTEXT = 8  # words that a question quotes


def passages(text: str) -> list[str]:
  """Paragraphs of 60 to 150 words, in the text's order."""
  paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
  return list(dict.fromkeys(p for p in paragraphs if 60 <= len(p.split()) <= 150))


def question(passage: str, rng: random.Random) -> tuple[str, str]:
  """Some words of a passage, and the word after them."""
  words = passage.split()
  places = [i for i in range(CONTEXT, len(words)) if re.fullmatch(r"[A-Za-z]{4,}", words[i])]
  at = rng.choice(places)
  quoted = " ".join(words[at - CONTEXT : at])
  return f'Which word follows "{quoted}"?', words[at]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("text", type=Path, help="UTF-8 text with empty lines between paragraphs")
  parser.add_argument("squad", type=Path, help="file to write for --squad")
  parser.add_argument("hotpotqa", type=Path, help="file to write for --hotpotqa")
  given = parser.parse_args()
  rng = random.Random(0)
  found = passages(given.text.read_text("utf-8"))
  if len(found) < ASKED:
    raise SystemExit(f"questions: expected {ASKED} paragraphs of 60 to 150 words, got {len(found)}")
  squad, hotpotqa = [], []
  for number, passage in enumerate(rng.sample(found, ASKED)):
    asked, answer = question(passage, rng)
    entry = {"id": str(number), "question": asked, "answers": [{"text": answer}]}
    squad.append({"context": passage, "qas": [entry | {"is_impossible": False}]})
  for number in range(ASKED):
    several = rng.sample(found, BESIDE + 1)
    asked, answer = question(several[0], rng)
    shown = [(f"Passage {i}", [p]) for i, p in enumerate(rng.sample(several, len(several)))]
    hotpotqa.append({"_id": str(number), "question": asked, "answer": answer, "context": shown})
  given.squad.write_text(json.dumps({"data": [{"title": given.text.stem, "paragraphs": squad}]}))
  given.hotpotqa.write_text(json.dumps(hotpotqa))
  print(f"{given.squad}, {given.hotpotqa}: {ASKED} questions each of {len(found)} paragraphs")


if __name__ == "__main__":
  main()
