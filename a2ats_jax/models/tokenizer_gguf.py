"""A tokenizer rebuilt from the vocabulary inside a GGUF file."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from a2ats_jax.errors import UserError
from a2ats_jax.models.tokenizer import Tokenizer

# Kinds of token in tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-pair tokenizer cuts text before merging: patterns applied one after the other, to the
# pieces the one before left.
PRE_TOKENIZERS: Mapping[str, tuple[str, ...]] = {
  "gpt-2": (_GPT2,),
  "smollm": (r"\p{N}", _GPT2),
  "llama-bpe": (_CL100K % 3,),
  "qwen2": (_CL100K % 1,),
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
  """Builds the tokenizer described by ``tokenizer.*`` metadata.

  Supported are byte-level BPE (``gpt2``) cut by one of :data:`PRE_TOKENIZERS` and SentencePiece
  BPE with scores (``llama``).

  Raises:
    UserError: another kind of tokenizer, named in the message, or damaged lists.
  """

  def get(key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.{key}", default)
    if value is not None and not isinstance(value, kind):
      raise UserError(f"{source}: tokenizer.{key} must be a {kind.__name__}, got {value!r}")
    return value

  tokens = get("ggml.tokens", list, [])
  kinds = get("ggml.token_type", list, [_NORMAL] * len(tokens))
  vocab = {token: i for i, token in enumerate(tokens)}
  if not tokens or len(vocab) != len(tokens) or len(kinds) != len(tokens):
    raise UserError(
      f"{source}: a vocabulary of {len(tokens)} tokens ({len(vocab)} distinct) and "
      f"{len(kinds)} token types is damaged"
    )
  model, pre = get("ggml.model", str, ""), get("ggml.pre", str, "default")
  try:
    if model == "gpt2":
      if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{source}: pre-tokenizer {pre!r} is not supported; supported: {known}")
      backend = _byte_level(vocab, get("ggml.merges", list, []), pre)
    elif model == "llama":
      backend = _sentencepiece(
        vocab,
        [kind == _NORMAL for kind in kinds],
        get("ggml.scores", list, []),
        get("ggml.add_space_prefix", bool, True),
      )
    else:
      raise UserError(f"{source}: tokenizer {model!r} is not supported; supported: gpt2, llama")
  except UserError:
    raise
  except Exception as error:  # the tokenizers package raises bare Exception
    raise UserError(f"{source}: damaged vocabulary: {error}") from error
  special = {_CONTROL: True, _USER_DEFINED: False}
  backend.add_tokens(
    [
      AddedToken(token, special=special[kind], normalized=False)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in special
    ]
  )

  def token(key: str) -> str | None:
    index = get(f"ggml.{key}_token_id", int)
    if index is None:
      return None
    if not 0 <= index < len(tokens):
      raise UserError(f"{source}: {key} token {index} is not among {len(tokens)} tokens")
    return tokens[index]

  bos, eos = token("bos"), token("eos")
  add_bos = get("ggml.add_bos_token", bool, model == "llama" or pre == "llama-bpe")
  add_eos = get("ggml.add_eos_token", bool, False)
  first = [bos] if add_bos and bos is not None else []
  last = [eos] if add_eos and eos is not None else []
  if first or last:
    backend.post_processor = processors.TemplateProcessing(
      single=[*first, "$A", *last],
      special_tokens=[(text, vocab[text]) for text in dict.fromkeys(first + last)],
    )
  named = {"unk_token": token("unknown"), "pad_token": token("padding")}
  return Tokenizer(
    backend,
    bos=bos,
    eos=[text for text in (eos, token("eot"), token("eom")) if text is not None],
    template=get("chat_template", str),
    specials={key: text for key, text in named.items() if text is not None},
  )


def _byte_level(vocab: dict[str, int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
  pairs = []
  for merge in merges:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
      raise ValueError(f"merge {merge!r} is not a pair")
    pairs.append((left, right))
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
  )
  if pre == "qwen2":
    backend.normalizer = normalizers.NFC()
  cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in PRE_TOKENIZERS[pre]]
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(
  vocab: dict[str, int], normal: list[bool], scores: list[float], prefix: bool
) -> tokenizers.Tokenizer:
  """SentencePiece BPE: the best-scored piece that two neighbours make is merged first."""
  if len(scores) != len(vocab):
    raise ValueError(f"{len(vocab)} tokens, {len(scores)} scores")
  pieces = {token: i for token, i in vocab.items() if normal[i]}
  pairs = []
  for token, index in pieces.items():
    for cut in range(1, len(token)):
      left, right = pieces.get(token[:cut]), pieces.get(token[cut:])
      if left is not None and right is not None:
        pairs.append((-scores[index], index, left, right, cut, token))
  merges = [(token[:cut], token[cut:]) for _, _, _, _, cut, token in sorted(pairs)]
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True)
  )
  space = [normalizers.Replace(" ", "▁")]
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prefix else space)
  strip = [decoders.Strip(" ", 1, 0)] if prefix else []
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
  )
  return backend
