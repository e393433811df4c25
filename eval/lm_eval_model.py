"""Any task of the ``lm-eval`` package under any method: a model that its evaluator takes.

A context goes through exact attention but for its last token. That token is decoded under the
method, and so is everything after it: what is scored and generated is the method's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2ats_jax.budget import Budget
from a2ats_jax.errors import UserError
from a2ats_jax.generate import pad_prompts
from a2ats_jax.methods import registry
from a2ats_jax.models.model import Model, load_model
from eval.ablation import TABLE
from eval.decode import fed_block, greedy_from
from eval.longbench.widths import width_of
from eval.metrics import log_softmax
from eval.options import parse_methods
from eval.record import Recording, record, replay

try:
  from lm_eval import utils
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
except ImportError as error:
  raise UserError(
    "lm-eval: the package is of an extra, pip install 'a2ats_jax[lm-eval]'"
  ) from error

BLOCK = 32  # tokens of a continuation fed at once
GENERATED = 256  # tokens at most, where a task does not say


class KVModel(TemplateLM):
  """A model and a KV method, as ``lm_eval.simple_evaluate(model=KVModel(...), tasks=[...])`` takes.

  Requests run one by one, in the order of their contexts; those that share one, such as the answers
  of a multiple choice, share its prefill. Contexts that are too long for the model lose their
  beginning, as in lm-eval's own models. Generation is greedy.

  Args:
    model: a model, or what :func:`a2ats_jax.load_model` takes.
    method: as a command line writes it, ``a2ats-plus:far=segments(16)``.
    budget: for methods that take one, ``0.03``, ``2048`` or ``2048/kv``.
    codebook: directory of codebooks, for methods that need them.

  Raises:
    UserError: any of these cannot be read, or does not fit the others.
  """

  def __init__(
    self,
    model: Model | str = "smollm2-135m-instruct",
    method: str = "full",
    budget: str = "0.03",
    codebook: str = "",
  ):
    super().__init__()
    (spec,) = parse_methods(method)
    self.spec = spec
    self.model = load_model(model) if isinstance(model, str) else model
    books = (
      {registry.DEFAULT_BOOK: self.model.load_codebooks(Path(codebook))[0]} if codebook else {}
    )
    granted = Budget.parse(budget) if TABLE[spec.name].takes_budget else None
    self.method = registry.build(spec, budget=granted, codebooks=books, table=TABLE)
    self._held: tuple[tuple[int, ...], Recording, np.ndarray] | None = None

  # --- what lm-eval asks of a tokenizer ---

  @property
  def eot_token_id(self) -> int:
    if not self.model.tokenizer.eos_ids:
      raise UserError("lm-eval: this model's tokenizer has no token that ends a text")
    return self.model.tokenizer.eos_ids[0]

  @property
  def prefix_token_id(self) -> int:
    """What an empty context is replaced by: the tokenizer's first token, if it has one."""
    first = self.model.tokenizer.bos_id
    return self.eot_token_id if first is None else first

  @property
  def tokenizer_name(self) -> str:
    return self.model.tokenizer.sha256

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    special = True if add_special_tokens is None else add_special_tokens
    return self.model.tokenizer.encode(string, special=special)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return self.model.tokenizer.template if chat_template else ""

  def apply_chat_template(
    self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
  ) -> str:
    return self.model.tokenizer.render_chat(
      chat_history, add_generation_prompt=add_generation_prompt
    )

  # --- requests ---

  def _loglikelihood_tokens(
    self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for place in sorted(range(len(requests)), key=lambda i: (len(requests[i][1]), requests[i][1])):
      asked, context, continuation = requests[place]
      results[place] = self.score(context, continuation)
      self.cache_hook.add_partial("loglikelihood", asked, results[place])
    return results

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    results = []
    for request in requests:
      (text,) = request.args
      windows = utils.get_rolling_token_windows(
        self.tok_encode(text, add_special_tokens=False),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.model.config.context - 1,
        context_len=1,
      )
      pairs = map(utils.make_disjoint_window, windows)
      results.append(sum(self.score(context, rest)[0] for context, rest in pairs))
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
    return results

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    results = [""] * len(requests)
    contexts = [self.tok_encode(request.args[0]) for request in requests]
    for place in sorted(range(len(requests)), key=lambda i: (len(contexts[i]), contexts[i])):
      _, given = requests[place].args
      options = dict(given)
      until = options.pop("until", None) or []
      until = [until] if isinstance(until, str) else list(until)
      new = int(options.pop("max_gen_toks", options.pop("max_new_tokens", GENERATED)))
      if options.get("do_sample") and options.get("temperature", 1.0):
        raise UserError("lm-eval: expected a task that is answered greedily, got do_sample")
      results[place] = self.answer(contexts[place], until, new=new)
      self.cache_hook.add_partial("generate_until", requests[place].args, results[place])
    return results

  # --- under the method ---

  def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would produce it.

    Args:
      context: tokens, at least one. continuation: tokens.
    """
    if not continuation:
      return 0.0, True
    limit = self.model.config.context
    if len(continuation) > limit:
      raise UserError(
        f"lm-eval: a continuation of {len(continuation)} tokens exceeds the model's context of "
        f"{limit}"
      )
    context = context[-(limit - len(continuation) + 1) :]
    recording, lengths, last = self._read(context)
    room = BLOCK * -(-len(continuation) // BLOCK)
    state = replay(self.model.config, recording, self.method, new=room)
    fed, targets = [*last, *continuation[:-1]], np.asarray(continuation)
    total, greedy = 0.0, True

    def count(logits: np.ndarray, here: np.ndarray) -> None:
      nonlocal total, greedy
      chances = log_softmax(logits)
      total += float(chances[np.arange(len(here)), here].sum())
      greedy &= bool(np.all(chances.argmax(axis=-1) == here))

    if not last:
      count(np.asarray(recording.logits), targets[:1])
      targets = targets[1:]
    inputs = np.asarray([fed], np.int32)
    for start in range(0, len(fed), BLOCK):
      logits, _, state = fed_block(
        self.model.decoder, self.method, state, inputs, lengths, start=start, block=BLOCK
      )
      count(logits[0], targets[start : start + BLOCK])
    return total, greedy

  def answer(self, context: Sequence[int], until: Sequence[str], *, new: int) -> str:
    """Greedy text after a context, cut before the first of the strings that end it.

    Args:
      new: tokens at most, fewer where the model's context ends.
    """
    limit = self.model.config.context
    context = context[-(limit - min(new, limit // 2)) :]
    new = min(new, limit - len(context))
    recording, lengths, last = self._read(context)
    state = replay(self.model.config, recording, self.method, new=new)
    tokenizer = self.model.tokenizer
    stop, made = tokenizer.eos_ids, []
    if not last:
      last = [int(np.asarray(recording.logits)[0].argmax())]
      made, new = [token for token in last if token not in stop], new - 1
    if new and (made or len(context) > 1):
      (more,), _ = greedy_from(
        self.model.decoder, self.method, state, last, lengths, new=new, stop=stop
      )
      made += more
    text = tokenizer.decode(made)
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text

  def _read(self, context: Sequence[int]) -> tuple[Recording, np.ndarray, list[int]]:
    """A context's recording without its last token, the tokens in it, and that last token.

    A context of one token is recorded whole: it attends to itself alone under any method.
    """
    ids, last = (tuple(context[:-1]), [context[-1]]) if len(context) > 1 else (tuple(context), [])
    if self._held is None or self._held[0] != ids:
      config = self.model.config
      tokens, lengths = pad_prompts([ids], config, new=0)
      width = width_of(tokens.shape[1], config.context)
      tokens = np.pad(tokens, ((0, 0), (0, max(width - tokens.shape[1], 0))))
      recording = record(self.model.decoder, tokens, lengths, methods=[self.method])
      self._held = ids, recording, lengths
    return self._held[1], self._held[2], list(last)
