import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from a2ats_jax.errors import UserError
from a2ats_jax.models.fetch import fetch
from a2ats_jax.models.gguf_header import read_header
from a2ats_jax.models.tokenizer import Tokenizer
from a2ats_jax.models.tokenizer_gguf import tokenizer_from_gguf
from tests.models.tiny_models import byte_vocabulary

DATA = Path(__file__).parent.parent / "data"


def byte_level(pre: str, merges: list[str], **changes) -> Tokenizer:
  tokens, types = byte_vocabulary(merges)
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": types,
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
  }
  changes = {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}
  return tokenizer_from_gguf(metadata | changes, "test")


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
  return [tokenizer.decode([i]) for i in tokenizer.encode(text, special=False)]


@pytest.fixture(scope="module")
def real(smollm2) -> Tokenizer:
  return smollm2.tokenizer


# The real tokenizer. It has no token for some bytes its training never saw: six control characters
# and the lead bytes of planes 4 to 11, which are unassigned. They are dropped when encoding.

TEXT = st.text(
  st.characters(
    exclude_categories=["Cs", "Cc"], include_characters="\n\t\r", max_codepoint=0x3FFFF
  ),
  max_size=40,
)


@pytest.mark.parametrize("case", range(6))
def test_ids_of_the_real_tokenizer_are_exactly_the_golden_ones(real, golden, case):
  case = golden["tokenizer_cases"][case]
  assert real.encode(case["text"], special=False) == case["ids"]
  assert real.encode(case["text"], special=True) == case["ids_default"]
  assert real.decode(case["ids"], skip_special=False) == case["text"]


def test_the_real_chat_template_renders_and_tokenises_as_golden(real, golden):
  rendered = real.render_chat(golden["chat_messages"])
  assert rendered == golden["chat_rendered"]
  assert real.encode(rendered, special=False) == golden["chat_ids"]
  without = real.render_chat(golden["chat_messages"], add_generation_prompt=False)
  assert rendered == without + "<|im_start|>assistant\n"


def test_special_ids_of_the_real_tokenizer(real):
  assert (real.bos_id, real.eos_ids, real.vocab, real.has_chat) == (1, (2,), 49152, True)


def test_special_tokens_are_left_out_of_decoded_text(real, golden):
  assert "<|im_start|>" not in real.decode(golden["chat_ids"])
  assert "<|im_start|>" in real.decode(golden["chat_ids"], skip_special=False)


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_text_survives_the_round_trip(real, text):
  assert real.decode(real.encode(text, special=False), skip_special=False) == text


@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(real, text):
  stream, shown = real.stream(skip_special=False), ""
  for token in real.encode(text, special=False):
    shown += stream.push(token)
    assert text.startswith(shown)
  assert shown + stream.finish() == text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_streamed_ids_of_any_kind_add_up_to_the_decoded_text(real, ids):
  stream = real.stream()
  assert "".join([stream.push(i) for i in ids]) + stream.finish() == real.decode(ids)


def test_a_character_of_several_tokens_comes_out_whole(real):
  ids = real.encode("🎉", special=False)
  assert len(ids) > 1
  stream = real.stream()
  assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🎉"]
  assert stream.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end(real):
  stream = real.stream()
  assert stream.push(real.encode("🎉", special=False)[0]) == ""
  assert stream.finish() == "\ufffd"
  assert stream.finish() == ""


@pytest.mark.parametrize("bad", [-1, 49152, 10**9])
def test_ids_outside_the_vocabulary_are_refused(real, bad):
  with pytest.raises(UserError, match=f"id {bad} is not in the vocabulary of 49152"):
    real.decode([5, bad])


def test_bytes_without_a_token_are_dropped(real):
  assert real.decode(real.encode("a\x04b", special=False)) == "ab"


def test_text_that_is_not_utf8_is_refused(real):
  with pytest.raises(UserError, match="lone surrogate"):
    real.encode("a\udce9", special=False)


def test_the_hash_tells_tokenizers_and_templates_apart():
  base = byte_level("gpt-2", ["h e"])
  assert base.sha256 == byte_level("gpt-2", ["h e"]).sha256
  others = [
    byte_level("gpt-2", ["h a"]),
    byte_level("smollm", ["h e"]),
    byte_level("gpt-2", ["h e"], chat_template="{{ messages }}"),
    byte_level("gpt-2", ["h e"], ggml__eos_token_id=0),
  ]
  assert len({base.sha256, *(other.sha256 for other in others)}) == 5


def test_the_hash_does_not_depend_on_the_process():
  """Python shuffles its hashes from process to process; the tokenizer's may not follow."""
  code = (
    "from tests.models.test_tokenizer import byte_level; print(byte_level('qwen2', ['h e']).sha256)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == byte_level("qwen2", ["h e"]).sha256


# How text is cut before merging.

MERGES = ["1 2", "12 3", "123 4", "' S", "! Ċ", "Ċ Ċ", "Ġ Ġ", "ĠĠ Ġ", "Ġ a", "a b", "- >", "a -"]


@pytest.mark.parametrize(
  ("pre", "text", "expected"),
  [
    ("gpt-2", "1234", ["1234"]),
    ("smollm", "1234", ["1", "2", "3", "4"]),
    ("qwen2", "1234", ["1", "2", "3", "4"]),
    ("llama-bpe", "1234", ["123", "4"]),
    ("default", "1234", ["123", "4"]),
    ("gpt-2", "IT'S", ["I", "T", "'", "S"]),
    ("qwen2", "IT'S", ["I", "T", "'S"]),
    ("llama-bpe", "IT'S", ["I", "T", "'S"]),
    ("gpt-2", "!\n\n", ["!", "\n\n"]),
    ("llama-bpe", "!\n\n", ["!\n", "\n"]),
    ("qwen2", "!\n\n", ["!\n", "\n"]),
    ("gpt-2", "   ab", ["  ", " a", "b"]),
    ("qwen2", "   ab", ["  ", " a", "b"]),
    ("smollm", "   ab", ["  ", " a", "b"]),
    ("gpt-2", "a->b", ["a", "->", "b"]),
    ("default", "a->b", ["a", "->", "b"]),
  ],
)
def test_text_is_cut_as_its_kind_of_tokenizer_does(pre, text, expected):
  assert pieces(byte_level(pre, MERGES), text) == expected


def test_qwen_text_is_composed_first():
  assert byte_level("qwen2", []).encode("e\u0301", special=False) == byte_level("qwen2", []).encode(
    "\u00e9", special=False
  )
  assert len(byte_level("gpt-2", []).encode("e\u0301", special=False)) == 3


def test_llama_takes_whole_words_that_no_merge_builds():
  tokens, types = byte_vocabulary([])
  words = {"ggml__tokens": [*tokens, "hello"], "ggml__token_type": [*types, 1]}
  assert pieces(byte_level("llama-bpe", [], **words), "hello") == ["hello"]
  assert pieces(byte_level("gpt-2", [], **words), "hello") == list("hello")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_no_text_is_lost_between_the_cuts(pre):
  text = "It's  1234 naïve\tcafé,\r\n\n  你好 🎉!\n   "
  tokenizer = byte_level(pre, MERGES)
  assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@pytest.mark.parametrize(
  ("pre", "changes", "first", "last"),
  [
    ("gpt-2", {}, [], []),
    ("llama-bpe", {}, [1], []),
    ("llama-bpe", {"ggml__add_bos_token": False}, [], []),
    ("gpt-2", {"ggml__add_bos_token": True}, [1], []),
    ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, [1], [2]),
  ],
)
def test_what_is_added_by_default(pre, changes, first, last):
  tokenizer = byte_level(pre, [], **changes)
  plain = tokenizer.encode("ab", special=False)
  assert len(plain) == 2
  assert tokenizer.encode("ab", special=True) == first + plain + last


def test_several_tokens_may_end_a_generation():
  assert byte_level("gpt-2", [], ggml__eot_token_id=0, ggml__eom_token_id=2).eos_ids == (2, 0)


def test_user_defined_tokens_are_found_and_kept_when_decoding():
  tokens, types = byte_vocabulary([])
  words = {"ggml__tokens": [*tokens, "<tool>"], "ggml__token_type": [*types, 4]}
  tokenizer = byte_level("gpt-2", [], **words)
  ids = tokenizer.encode("a<tool>b", special=False)
  assert ids[1] == len(tokens)
  assert tokenizer.decode(ids) == "a<tool>b"


# SentencePiece.


@pytest.mark.parametrize("kind", ["with_prefix", "without_prefix"])
def test_sentencepiece_vocabularies_give_the_ids_of_sentencepiece(kind):
  """Cases made with the sentencepiece library on a vocabulary of 600 it was trained for."""
  made = json.loads((DATA / "sentencepiece.json").read_text("utf-8"))[kind]
  metadata = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": made["tokens"],
    "tokenizer.ggml.scores": made["scores"],
    "tokenizer.ggml.token_type": made["token_type"],
    "tokenizer.ggml.add_space_prefix": kind == "with_prefix",
    "tokenizer.ggml.bos_token_id": 1,
  }
  tokenizer = tokenizer_from_gguf(metadata, "test")
  for case in made["cases"]:
    assert tokenizer.encode(case["text"], special=False) == case["ids"], case
    assert tokenizer.encode(case["text"], special=True) == [1, *case["ids"]]
    assert tokenizer.decode(case["ids"]) == case["decoded"]
    stream = tokenizer.stream()
    streamed = "".join([stream.push(i) for i in case["ids"]]) + stream.finish()
    assert streamed == case["decoded"]


def test_the_best_scored_piece_is_merged_first_whatever_its_id():
  metadata = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "bc"],
    "tokenizer.ggml.scores": [-9.0, -9.0, -9.0, -2.0, -1.0],
    "tokenizer.ggml.add_space_prefix": False,
  }
  assert tokenizer_from_gguf(metadata, "test").encode("abc", special=False) == [0, 4]


def test_sentencepiece_without_scores_is_refused():
  with pytest.raises(UserError, match="damaged vocabulary: 1 tokens, 0 scores"):
    tokenizer_from_gguf({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}, "test")


@pytest.mark.slow
def test_gemma_is_fetched_and_tokenised_exactly():
  metadata, _ = read_header(fetch("gemma-3-270m"))
  tokenizer = tokenizer_from_gguf(metadata, "gemma")
  golden = json.loads((DATA / "gemma-3-270m.json").read_text("utf-8"))
  for case in golden["tokenizer_cases"]:
    assert tokenizer.encode(case["text"], special=False) == case["ids"]
    assert tokenizer.encode(case["text"], special=True) == case["ids_default"]
    assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]


# Chat templates.

ASK = [{"role": "user", "content": 'Say "é" <now>'}]


def chat(template: str | None) -> Tokenizer:
  changes = {} if template is None else {"chat_template": template}
  return byte_level("gpt-2", [], **changes)


def test_without_a_template_there_is_no_chat():
  assert not chat(None).has_chat
  with pytest.raises(UserError, match="no chat template"):
    chat(None).render_chat(ASK)


@pytest.mark.parametrize(
  ("template", "expected"),
  [
    ("{{ bos_token }}|{{ eos_token }}", "<|im_start|>|<|im_end|>"),
    ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Say \\"é\\" <now>"}'),
    ("{% if true %}\n  {% set x = 1 %}\n{{ x }}\n{% endif %}\nend", "1\nend"),
    ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{{ messages[0]['content'] }}", 'Say "é" <now>'),
    ("{{ add_generation_prompt }}", "True"),
  ],
)
def test_templates_see_what_they_are_used_to(template, expected):
  assert chat(template).render_chat(ASK) == expected


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
    ("{% if %}", "chat template: Expected an expression"),
    ("{{ messages[0].nope.deeper }}", "chat template: .* has no attribute"),
    ("{{ 1 / 0 }}", "chat template: division by zero"),
    ("{{ messages.append(1) }}", "chat template: .*unsafe"),
    ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
  ],
)
def test_templates_that_fail_or_reach_out_end_in_one_line(template, message):
  with pytest.raises(UserError, match=message) as error:
    chat(template).render_chat(ASK)
  assert "\n" not in str(error.value)


def test_special_tokens_must_exist():
  backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
  with pytest.raises(UserError, match="special token '</s>' is not in the vocabulary"):
    Tokenizer(backend, eos=["</s>"])


def test_truncation_and_padding_of_the_file_are_switched_off():
  backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
  backend.enable_truncation(2)
  backend.enable_padding(length=8)
  assert Tokenizer(backend).encode("aaaaa", special=True) == [0] * 5
