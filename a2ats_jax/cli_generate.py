"""Generation as a command: a prompt, or questions after a document that was read before."""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from a2ats_jax.bars import Bars
from a2ats_jax.cli_args import MethodArgs, codebooks, load, note
from a2ats_jax.errors import UserError

if TYPE_CHECKING:
  from a2ats_jax.methods.base import Method
  from a2ats_jax.models.model import Model
  from a2ats_jax.models.tokenizer import Tokenizer
  from a2ats_jax.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(MethodArgs):
  """Continue a prompt and stream the text."""

  prompt: str | None = None
  """The prompt itself."""
  prompt_file: Path | None = None
  """A UTF-8 file with the prompt."""
  method: str = "full"
  """A KV method, such as full, a2ats or a2ats-plus:far=segments(16)."""
  budget: str = "0.03"
  """Far tokens a query head reads: 0.03 is a share of the context, 2048 a number of tokens."""
  new: int = 128
  """Tokens to generate at most."""
  temperature: float = 0.0
  """What logits are divided by before a token is drawn; 0 takes the likeliest token."""
  top_k: int = 0
  """Draw among this many of the likeliest tokens; 0 is all."""
  top_p: float = 1.0
  """Draw among the fewest tokens that hold this much probability, above 0 to 1."""
  seed: int = 0
  """Of the draws: the same seed gives the same text, whatever --block is."""
  block: int = 16
  """Tokens between two updates of the stream. More waits less for the device; the text stays."""
  raw: bool = False
  """Take the prompt as it is instead of as a chat message."""
  save_prefix: Path | None = None
  """Write the cache of the prompt to this file and stop: a document, to be asked with --prefix."""
  room: int = 1024
  """With --save-prefix, tokens that a question and its answer may have together."""
  prefix: Path | None = None
  """A file that --save-prefix wrote, same model and method: the prompt is a question about it."""
  json: bool = False
  """Print one JSON object at the end instead of streaming."""

  def run(self) -> None:
    from a2ats_jax.budget import Budget
    from a2ats_jax.methods import registry
    from a2ats_jax.sampling import Sampling

    if (self.prompt is None) == (self.prompt_file is None):
      raise UserError("prompt: give either --prompt or --prompt-file")
    if self.new < 1:
      raise UserError(f"new: expected at least 1 token, got {self.new}")
    if self.prefix is not None and self.save_prefix is not None:
      raise UserError("prefix: give either --prefix or --save-prefix")
    text = self.prompt if self.prompt_file is None else _read(self.prompt_file)
    if not text:
      raise UserError("prompt: is empty, expected some text")
    spec, budget = registry.parse_method(self.method), Budget.parse(self.budget)
    sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
    model = load(self)
    method = registry.build(spec, budget=budget, codebooks=codebooks(self, model))
    if self.save_prefix is not None:
      _save_prefix(self, self.save_prefix, model, method, text)
    else:
      _stream(self, model, method, text, sampling)


def _read(path: Path) -> str:
  from eval.texts import read_text

  return read_text(path).text


def _ids(args: Generate, tokenizer: "Tokenizer", text: str) -> list[int]:
  """Tokens of a prompt; of a document all that precedes a question, and of a question the rest."""
  chat = not args.raw and tokenizer.has_chat
  if not chat:
    return tokenizer.encode(text, special=args.prefix is None)
  mark, saves = "[a question]", args.save_prefix is not None
  content = text + mark if saves else mark + text if args.prefix is not None else text
  rendered = tokenizer.render_chat([{"role": "user", "content": content}])
  before, found, after = rendered.partition(mark)
  if found:
    rendered = before if saves else after
  return tokenizer.encode(rendered, special=False)


def _save_prefix(args: Generate, path: Path, model: "Model", method: "Method", text: str) -> None:
  from a2ats_jax.prefix import read_prefix
  from a2ats_jax.prefix_file import save_prefix

  ids = _ids(args, model.tokenizer, text)
  with Bars() as bars:
    document = read_prefix(
      model.decoder, method, ids, new=args.room, progress=partial(bars, "prefill")
    )
  save_prefix(path, document, fingerprint=model.fingerprint)
  size = path.stat().st_size
  if args.json:
    record = {"prefix": str(path), "prefix_tokens": len(ids), "room": args.room, "bytes": size}
    print(json.dumps(record | {"method": args.method}))
  else:
    print(f"{len(ids)} tokens, {size / 1e6:.1f} MB, in {path}; ask with --prefix {path}")


def _stream(
  args: Generate, model: "Model", method: "Method", text: str, sampling: "Sampling"
) -> None:
  import numpy as np

  from a2ats_jax.generate import generate
  from a2ats_jax.prefix import continue_prefix
  from a2ats_jax.prefix_file import load_prefix

  tokenizer, document = model.tokenizer, None
  ids = _ids(args, tokenizer, text)
  stream, pieces, read, started = tokenizer.stream(), [], [], time.perf_counter()

  def emit(piece: str) -> None:
    pieces.append(piece)
    if not args.json:
      print(piece, end="", flush=True)

  made = []
  with Bars() as bars:
    options = {
      "new": args.new,
      "sampling": sampling,
      "stop": tokenizer.eos_ids,
      "seed": args.seed,
      "block": args.block,
    }
    if args.prefix is None:
      progress = partial(bars, "prefill")
      blocks = generate(model.decoder, method, [ids], progress=progress, **options)
    else:
      document = load_prefix(args.prefix, method, fingerprint=model.fingerprint)
      blocks = continue_prefix(model.decoder, document, [ids], **options)
    block = next(blocks)
    first = time.perf_counter() - started
  while block is not None:
    tokens = [token for token in block.tokens[0].tolist() if token not in tokenizer.eos_ids]
    made += tokens
    emit("".join(stream.push(token) for token in tokens))
    if block.stats is not None:
      steps = block.tokens.shape[1]
      share = (
        np.asarray(block.stats.read)[:steps] / np.asarray(block.stats.length)[:steps, ..., None]
      )
      read += share.mean((1, 2, 3, 4)).tolist()
    block = next(blocks, None)
  emit(stream.finish())
  seconds = time.perf_counter() - started - first
  record = {
    "text": "".join(pieces),
    "prompt_tokens": len(ids),
    "prefix_tokens": 0 if document is None else len(document.tokens),
    "new_tokens": len(made),
    "method": args.method,
    "read": sum(read) / len(read) if read else None,
    "prefill_s": first,
    "decode_s": seconds,
  }
  if args.json:
    print(json.dumps(record))
  else:
    print()
    share = f", {record['read']:.1%} of the cache read a step" if read else ""
    note(
      f"{len(ids)} prompt tokens in {first:.1f} s, {len(made)} new ones in {seconds:.1f} s{share}"
    )
