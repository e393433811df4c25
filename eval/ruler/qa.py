"""Questions about some of many documents (RULER's ``qa`` tasks)."""

import random

from a2ats_jax.errors import UserError
from eval.ruler.documents import Documents
from eval.ruler.question import Place, Question, Source

_TEXT = (
  "Answer the question based on the given documents. Only give me the answer and do not output any "
  "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on "
  "the given documents. Only give me the answer and do not output any other words.\n\n"
  "Question: {query}"
)
_PREFIX = " Answer:"


def squad(place: Place) -> Source:
  """RULER's ``qa_1``: one paragraph answers."""
  return _source(place, place.material.squad)


def hotpotqa(place: Place) -> Source:
  """RULER's ``qa_2``: two of ten articles answer together."""
  return _source(place, place.material.hotpotqa)


def _source(place: Place, documents: Documents | None) -> Source:
  """A unit is a document: those of the question, others of its article, then any."""
  if documents is None:
    raise UserError(f"ruler: {place.task} needs a file with documents, got none")
  if place.index >= len(documents.asked):
    raise UserError(f"limit: {place.task} has a file of {len(documents.asked)} questions")
  picked = place.draws_of_task().sample(documents.asked, len(documents.asked))[place.index]
  rng = place.draws()
  belonging = {*picked.needed, *picked.near}
  others = [document for document in documents.documents if document not in belonging]
  near = rng.sample(picked.near, len(picked.near))
  order = [*picked.needed, *near, *rng.sample(others, len(others))]
  positions = rng.random()

  def make(units: int) -> Question:
    shown = random.Random(positions).sample(order[:units], units)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(shown, 1))
    return Question(
      text=_TEXT.format(context=context, query=picked.question),
      prefix=_PREFIX,
      answers=picked.answers,
    )

  return Source(make=make, least=len(picked.needed), most=len(order))
