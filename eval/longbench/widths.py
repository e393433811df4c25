"""Few widths for prompts of many lengths."""

from a2ats_jax.generate import CHUNK


def width_of(tokens: int, longest: int) -> int:
  """Slots for prompts of up to so many tokens: few widths, so that few shapes compile.

  512 times 1, 2, 3, 4, 6, 8, 12, ..., but no more than the longest prompt of all needs.

  Args:
    tokens: of a batch's longest prompt, without the last token.
    longest: the same over all batches.
  """
  most = CHUNK * -(-longest // CHUNK)
  power = CHUNK
  while power < tokens:
    power *= 2
  between = 3 * power // 4
  width = between if between % CHUNK == 0 and between >= tokens else power
  return min(width, most)
