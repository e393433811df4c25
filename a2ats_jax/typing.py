"""The dimension glossary and the array types of every public signature.

One letter has one meaning in every file:

====  =====================================================
B     batch rows
T     sequence: tokens of a prompt, or slots of a cache
S     tokens handed in at once (queries of this call)
L     layers
H     query heads
K     KV heads
G     query heads of one KV head (group), H = K * G
D     head size
E     model width
V     vocabulary
C     codewords of one codebook
N     pages of one KV head; in training, calibration tokens
P     tokens of a page
F     pages fetched at once
R     recent tokens in the ring
Z     segments of far positions
M     tokens after the prompt that are cells of their own
====  =====================================================

Arrays of heads are laid out ``[B, S, H, D]`` on the way in and out, and caches
``[L, B, K, T, D]``, so that the tokens of one KV head are contiguous.
"""

from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt, UInt16

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Shaped", "UInt", "UInt16"]
