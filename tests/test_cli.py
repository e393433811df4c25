"""The command: help, exit codes, one line for a user's mistake, and a small run of everything."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from a2ats_jax import cli
from a2ats_jax.codebook import make_codebook, save_codebooks
from a2ats_jax.config_file import expand
from a2ats_jax.errors import UserError
from a2ats_jax.models.model import load_model
from tests.models.tiny_models import tiny_config, tiny_tensors, write_gguf, write_hf

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
  """A random model of two layers that reads bytes, 1024 tokens of context."""
  path = tmp_path_factory.mktemp("model")
  config = tiny_config(context=1024, tied=True)
  write_hf(path, config, tiny_tensors(config))
  return path


@pytest.fixture(scope="module")
def books(model_dir, tmp_path_factory) -> Path:
  """Random codebooks for it."""
  path, model = tmp_path_factory.mktemp("books"), load_model(model_dir)
  shape = (model.config.layers, model.config.kv_heads)
  rng, dim = np.random.default_rng(0), model.config.head_dim
  words = jnp.asarray(rng.normal(size=(*shape, 16, dim)), jnp.float32)
  metric = jnp.broadcast_to(jnp.eye(dim), (*shape, dim, dim))
  book = make_codebook(words, metric)
  save_codebooks(
    path, book, fingerprint=model.fingerprint, rope=model.config.rope, training={"steps": 0}
  )
  return path


@pytest.fixture
def prose(tmp_path) -> Path:
  path = tmp_path / "prose.txt"
  rng = np.random.default_rng(1)
  words = ["river", "stone", "under", "seven", "lamps", "went", "slowly", "past", "her"]
  lines = [" ".join(rng.choice(words, 8)).capitalize() + "." for _ in range(200)]
  path.write_text(" ".join(lines))
  return path


def run(capfd, *arguments) -> tuple[int, str, str]:
  """Exit code, stdout and stderr of the command."""
  code = 0
  try:
    cli.main([str(a) for a in arguments])
  except SystemExit as e:
    code = int(e.code or 0)
  out, err = capfd.readouterr()
  return code, out, err


COMMANDS = (
  ("fetch",),
  ("train",),
  ("generate",),
  ("eval", "fidelity"),
  ("eval", "recall"),
  ("eval", "needle"),
  ("eval", "ruler"),
  ("eval", "longbench"),
  ("eval", "perplexity"),
  ("eval", "generation"),
  ("eval", "compare"),
  ("eval", "speed"),
  ("eval", "report"),
  ("plan",),
  ("methods",),
  ("profile",),
  ("device",),
  ("tune",),
  ("demo",),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains(capfd, command):
  code, out, _ = run(capfd, *command, "--help")
  assert code == 0
  assert "--" in out
  assert "{None}" not in out


def test_units_are_in_the_help(capfd):
  _, out, _ = run(capfd, "eval", "fidelity", "--help")
  text = " ".join(out.replace("│", " ").split())
  assert "Prompt lengths in tokens" in text
  assert "share of the context" in text


def test_generate_prints_json(capfd, model_dir, books):
  common = ("generate", "--model", model_dir, "--prompt", "Seven lamps " * 30, "--new", 5, "--json")
  code, out, _ = run(capfd, *common)
  assert code == 0
  full = json.loads(out)
  assert full["new_tokens"] <= 5
  assert full["prompt_tokens"] >= 100
  budget = ("--method", "a2ats-plus", "--codebook", books, "--budget", "1.0")
  code, out, _ = run(capfd, *common, *budget)
  assert code == 0
  assert json.loads(out)["text"] == full["text"]


def test_generate_streams_the_same_text(capfd, model_dir):
  common = ("generate", "--model", model_dir, "--prompt", "Seven lamps", "--new", 6, "--raw")
  _, out, _ = run(capfd, *common, "--json")
  code, streamed, err = run(capfd, *common)
  assert code == 0
  assert streamed == json.loads(out)["text"] + "\n"
  assert "prompt tokens in" in err


@pytest.mark.parametrize("raw", [("--raw",), ()], ids=["raw", "chat"])
def test_generate_after_a_saved_document(capfd, model_dir, tmp_path, raw):
  """With full attention the answer is that of document and question in one prompt."""
  common = ("generate", "--model", model_dir, "--json", *raw)
  document, question, path = "Seven lamps under stone. ", "Which river?", tmp_path / "document"
  saving = (*common, "--prompt", document, "--save-prefix", path, "--room", 90)
  code, out, _ = run(capfd, *saving)
  assert code == 0
  saved = json.loads(out)
  assert saved["bytes"] == path.stat().st_size
  asking = ("--prompt", question, "--new", 5)
  _, out, _ = run(capfd, *common, "--prompt", document + question, "--new", 5)
  want = json.loads(out)
  code, out, _ = run(capfd, *common, *asking, "--prefix", path)
  assert code == 0
  got = json.loads(out)
  assert (got["text"], got["new_tokens"]) == (want["text"], want["new_tokens"])
  assert got["prefix_tokens"] == saved["prefix_tokens"]
  assert got["prefix_tokens"] + got["prompt_tokens"] == want["prompt_tokens"]
  assert_refused(run(capfd, *common, *asking, "--prefix", path, "--method", "kivi"), "kivi")
  assert_refused(run(capfd, *common, *asking, "--prefix", path, "--new", 90), "its room of 90")
  assert_refused(run(capfd, *common, *asking, "--prefix", tmp_path / "none"), "no such file")
  assert_refused(run(capfd, *saving, "--prefix", path), "either --prefix or --save-prefix")


def test_generate_draws_by_seed(capfd, model_dir):
  """The same seed gives the same text whatever the block; another seed another text."""
  common = ("generate", "--model", model_dir, "--prompt", "Seven lamps", "--new", 12, "--raw")
  warm = ("--temperature", 1.5, "--top-k", 40, "--top-p", 0.95, "--json")

  def text(*more):
    code, out, err = run(capfd, *common, *more)
    assert code == 0, err
    return json.loads(out)["text"]

  drawn = text(*warm, "--seed", 3)
  assert text(*warm, "--seed", 3, "--block", 5) == drawn
  assert text(*warm, "--seed", 4) != drawn
  assert text("--json") != drawn


@pytest.mark.parametrize(("block", "pieces"), [(4, 3), (11, 1), (1, 11)])
def test_generate_streams_at_the_end_of_a_block(model_dir, monkeypatch, block, pieces):
  """The first token at once, then a piece for each block; at the end what is left, and a line."""
  shown = []
  monkeypatch.setattr("builtins.print", lambda *text, **_: shown.append(text))
  words = ("--prompt", "Seven lamps", "--raw", "--new", "12", "--block", str(block))
  cli.main(["generate", "--model", str(model_dir), *words])
  assert len(shown) == 1 + pieces + 2 + 1  # the last is the summary on stderr


@pytest.mark.parametrize("benchmark", ["fidelity", "recall", "needle"])
def test_benchmarks_write_and_print_rows(capfd, model_dir, books, prose, tmp_path, benchmark):
  out_dir = tmp_path / "run"
  code, out, err = run(
    capfd,
    *("eval", benchmark, "--model", model_dir, "--codebook", books, "--text", prose),
    *("--T", 512, "--budget", "0.1", "--limit", 1, "--new", 2, "--out", out_dir, "--json"),
    *("--methods", "a2ats,a2ats-plus"),
    *(("--haystacks", "prose") if benchmark == "needle" else ()),
  )
  assert code == 0, err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["method"] for row in rows] == ["full", "oracle", "a2ats", "a2ats-plus"]
  metrics = json.loads((out_dir / "metrics.json").read_text())
  assert metrics["rows"] == rows
  assert (out_dir / "config.yaml").exists()
  assert len((out_dir / "predictions.jsonl").read_text().splitlines()) == 1


def test_longbench_is_read_from_a_directory(capfd, model_dir, tmp_path):
  fields = ("input", "context", "length", "dataset", "language", "all_classes", "_id")
  line = dict.fromkeys(fields, "Seven lamps.") | {"answers": ["7"], "length": 2}
  (tmp_path / "passage_count.jsonl").write_text(json.dumps(line) + "\n")
  common = ("eval", "longbench", "--model", model_dir, "--data", tmp_path, "--T", 256, "--new", 2)
  code, out, err = run(capfd, *common, "--methods", "full", "--budget", "0.1", "--json")
  assert code == 0, err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [(row["task"], row["method"]) for row in rows] == [("passage_count", "full")]
  assert "1 prompts of 1 datasets in 1 batches of 1 shapes" in err
  assert_refused(run(capfd, *common, "--datasets", "squad"), "datasets", "qasper", "squad")


@pytest.mark.parametrize(
  ("benchmark", "more", "buckets"),
  [
    ("perplexity", ("--prompt", 40), ["40-51", "52-63"]),
    ("generation", ("--new", 6), ["0-2", "3-5"]),
  ],
)
def test_figures_by_position(capfd, model_dir, tmp_path, benchmark, more, buckets):
  code, out, err = run(
    capfd,
    *("eval", benchmark, "--model", model_dir, "--kinds", "identifiers", "--T", 64, *more),
    *("--methods", "full", "--budget", "0.1", "--limit", 1, "--buckets", "2", "--json"),
    *("--out", tmp_path / "run"),
  )
  assert code == 0, err
  rows = [json.loads(line) for line in out.splitlines()]
  assert [row["method"] for row in rows] == ["full", "full", "oracle", "oracle"]
  assert [row["bucket"] for row in rows] == buckets * 2
  assert {row["task"] for row in rows} == {"identifiers"}


def test_train_then_use(capfd, model_dir, prose, tmp_path):
  out_dir = tmp_path / "trained"
  common = ("train", "--model", model_dir, "--text", prose, "--out", out_dir)
  sizes = ("--codewords", 8, "--tokens", 600, "--document-tokens", 128, "--steps", 4)
  code, out, err = run(capfd, *common, *sizes, "--lloyd-steps", 2, "--batch", 64, "--json")
  assert code == 0, err
  assert json.loads(out)["codewords"] == 8
  load_model(model_dir).load_codebooks(out_dir)


# --- mistakes -----------------------------------------------------------------------------------


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
  """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
  code, out, err = result
  lines = [line for line in err.splitlines() if line.startswith("a2ats: ")]
  assert code == 2, (code, err)
  assert out == ""
  assert len(lines) == 1, err
  assert "Traceback" not in err
  for word in words:
    assert word in lines[0]


def generate(capfd, model, *more):
  return run(capfd, "generate", "--model", model, "--new", 4, *more)


@pytest.mark.parametrize(
  ("words", "told"),
  [
    (("perplexity", "--buckets", "4,2"), "buckets"),
    (("perplexity", "--prompt", "4096"), "prompt: expected 1 to 4095"),
    (("perplexity", "--kinds", "prose"), "kinds"),
    (("generation", "--buckets", "few"), "buckets"),
    (("generation", "--temperature=-1"), "temperature"),
    (("generation", "--new", "0"), "new: expected at least 1"),
  ],
)
def test_options_of_long_texts(capfd, words, told):
  assert_refused(run(capfd, "eval", *words), told)


@pytest.mark.parametrize("budget", ["1.5", "-0.1", "lots", "nan"])
def test_budgets_out_of_range(capfd, model_dir, budget):
  refused = generate(capfd, model_dir, "--prompt", "x", f"--budget={budget}")
  assert_refused(refused, "budget", budget)


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (("--temperature", "-1"), ("temperature", "-1")),
    (("--temperature", "1", "--top-p", "0"), ("top_p", "0")),
    (("--top-k", "5"), ("temperature", "no effect", "5")),
    (("--seed", "-1"), ("seed", "-1")),
    (("--block", "0"), ("block", "0")),
  ],
  ids=lambda value: " ".join(value),
)
def test_impossible_draws(capfd, model_dir, options, words):
  assert_refused(generate(capfd, model_dir, "--prompt", "x", *options), *words)


def test_no_prompt_and_empty_prompt(capfd, model_dir, tmp_path):
  assert_refused(generate(capfd, model_dir), "--prompt")
  assert_refused(generate(capfd, model_dir, "--prompt", ""), "empty")
  empty = tmp_path / "empty.txt"
  empty.write_text("")
  assert_refused(generate(capfd, model_dir, "--prompt-file", empty), "empty")
  assert_refused(generate(capfd, model_dir, "--prompt-file", tmp_path / "none"), "none")


def test_prompt_longer_than_the_context(capfd, model_dir):
  refused = generate(capfd, model_dir, "--prompt", "x" * 2000, "--raw")
  assert_refused(refused, "2000", "1024")


def test_unknown_model_and_method(capfd, model_dir):
  assert_refused(generate(capfd, "no-such-model", "--prompt", "x"), "no-such-model")
  assert_refused(generate(capfd, model_dir, "--prompt", "x", "--method", "magic"), "magic", "a2ats")
  refused = generate(capfd, model_dir, "--prompt", "x", "--method", "a2ats")
  assert_refused(refused, "codebooks", "a2ats train")


def test_codebook_of_another_model(capfd, books, tmp_path):
  config = tiny_config(context=1024, tied=True)
  write_hf(tmp_path / "other", config, tiny_tensors(config, seed=5))
  refused = generate(
    capfd, tmp_path / "other", "--prompt", "x", "--method", "a2ats", "--codebook", books
  )
  assert_refused(refused, "another model", "model_fingerprint")


@pytest.mark.parametrize("kept", [3, 200, 0.5, 0.99])
def test_truncated_gguf(capfd, tmp_path, kept):
  config = tiny_config()
  path = tmp_path / "model.gguf"
  write_gguf(path, config, tiny_tensors(config))
  data = path.read_bytes()
  path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
  assert_refused(generate(capfd, path, "--prompt", "x"), "model.gguf")


def test_weights_that_are_not_finite(capfd, tmp_path):
  config = tiny_config(tied=True)
  tensors = tiny_tensors(config)
  tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = np.nan
  write_hf(tmp_path, config, tensors)
  assert_refused(generate(capfd, tmp_path, "--prompt", "x"), "k_proj", "finite")


def test_full_disk_while_training(capfd, model_dir, prose, tmp_path, monkeypatch):
  """One line and nothing that loads; the same command then finishes."""
  training = importlib.import_module("train_codebooks.train")

  def full(*_, **__):
    raise OSError(28, "No space left on device", "codebook.safetensors")

  common = ("train", "--model", model_dir, "--text", prose, "--out", tmp_path / "run")
  sizes = ("--codewords", 4, "--tokens", 300, "--document-tokens", 64, "--steps", 2)
  with monkeypatch.context() as patch:
    patch.setattr(training, "save_codebooks", full)
    refused = run(capfd, *common, *sizes, "--lloyd-steps", 1, "--batch", 32)
  assert_refused(refused, "No space left", "codebook.safetensors")
  with pytest.raises(UserError, match="missing"):
    load_model(model_dir).load_codebooks(tmp_path / "run")
  code, _, err = run(capfd, *common, *sizes, "--lloyd-steps", 1, "--batch", 32)
  assert code == 0, err


def test_unknown_options_exit_with_2(capfd):
  code, _, err = run(capfd, "train", "--no-such-option", "1")
  assert code == 2
  assert "no-such-option" in err


# --- configuration files ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_understood(path, monkeypatch, capfd):
  """Each one parses as the command that its comment names."""
  line = next(x for x in path.read_text().splitlines() if f"--config configs/{path.name}" in x)
  words = line.removeprefix("#   a2ats ").split()
  assert words[words.index("--config") + 1] == f"configs/{path.name}"
  words[words.index("--config") + 1] = str(path)
  seen = []
  for command in (cli.Train, cli.Eval):
    monkeypatch.setattr(command, "run", lambda self: seen.append(self))
  code, _, err = run(capfd, *words)
  assert code == 0, err
  ran = seen[0].benchmark if isinstance(seen[0], cli.Eval) else seen[0]
  for name, value in yaml.safe_load(path.read_text()).items():
    read = getattr(ran, name.replace("-", "_"))
    assert (" ".join(map(str, read)) if isinstance(read, tuple) else read) == value


def test_typed_options_win_over_the_file(tmp_path):
  path = tmp_path / "options.yaml"
  path.write_text("seed: 3\njson: true\ntext: [a, b]\nout: null\nno-guard: false\n")
  want = ["train", "--seed", "3", "--json", "--text", "a", "b", "--seed", "4"]
  assert expand(["train", "--config", str(path), "--seed", "4"]) == want
  assert expand(["train", f"--config={path}", "--seed", "4"]) == want


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "seed: {a: 1}\n", None])
def test_config_files_that_cannot_be_read(capfd, tmp_path, text):
  path = tmp_path / "bad.yaml"
  if text is not None:
    path.write_text(text)
  assert_refused(run(capfd, "train", "--config", path), "bad.yaml")


def test_the_installed_command_runs():
  done = subprocess.run(
    [Path(sys.executable).with_name("a2ats"), "generate", "--prompt", "x", "--budget", "7.5"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr == "a2ats: budget: a ratio must lie in [0, 1], got 7.5\n"
