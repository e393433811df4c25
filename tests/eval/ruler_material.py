"""What tiny RULER prompts are made of: words, sentences and documents without any package."""

import itertools
import json
from pathlib import Path

from eval.ruler.documents import Asked, Documents
from eval.ruler.haystack import sentences_of
from eval.ruler.question import Material, Place
from eval.ruler.vocabulary import Vocabulary
from tests.eval import tiny

WORDS = ["".join(letters) for letters in itertools.product("bdfgk", "aeiou", "lmnrs", "aeiou")]
VOCABULARY = Vocabulary(
  nouns=tuple(WORDS[:300]), adjectives=tuple(WORDS[300:400]), verbs=tuple(WORDS[400:600])
)


def documents(count: int = 100, near: int = 2) -> Documents:
  """Documents of some 45 characters; the first ``near`` others belong to every question."""
  texts = tuple(f"Town {i:03} has {1000 + i} lamps, lit at dusk." for i in range(count))
  asked = tuple(
    Asked(
      question=f"How many lamps has town {i:03}?",
      answers=(str(1000 + i),),
      needed=(text,),
      near=tuple(other for other in texts[: near + 1] if other != text)[:near],
    )
    for i, text in enumerate(texts)
  )
  return Documents(documents=texts, asked=asked, sha256="none")


def material(**changes) -> Material:
  """Enough for 4096 characters of everything."""
  given = {
    "sentences": tuple(sentences_of(tiny.prose().text)),
    "words": VOCABULARY,
    "squad": documents(),
    "hotpotqa": documents(near=0),
  }
  return Material(**given | changes)


def place(task: str, T: int = 2048, index: int = 0, seed: int = 0, **changes) -> Place:
  """One prompt of the tiny model's tokenizer, a token a character."""
  given = {"material": material(), "tokenizer": tiny.model().tokenizer}
  return Place(seed=seed, task=task, T=T, index=index, **given | changes)


def squad_file(path: Path) -> Path:
  """Two articles of two paragraphs; one question has no answer."""

  def paragraph(town: str, lamps: str, **entry):
    question = {"question": f"How many lamps has {town}?", "answers": [{"text": lamps}] * 2}
    return {"context": f"{town} has {lamps} lamps.", "qas": [question | entry]}

  articles = [
    {"paragraphs": [paragraph("Ulm", "seven"), paragraph("Bonn", "nine")]},
    {
      "paragraphs": [
        paragraph("Kiel", "two", is_impossible=False),
        paragraph("Trier", "none", is_impossible=True),
      ]
    },
  ]
  path.write_text(json.dumps({"version": "v2.0", "data": articles}))
  return path


def hotpotqa_file(path: Path) -> Path:
  """Two questions, whose documents overlap."""
  lamps, bridges = ["Lamps", ["They are lit. ", "At dusk."]], ["Bridges", ["There are two."]]
  entries = [
    {"question": "Lit when?", "answer": "at dusk", "context": [lamps, bridges]},
    {"question": "How many bridges?", "answer": "two", "context": [bridges]},
  ]
  path.write_text(json.dumps(entries))
  return path
