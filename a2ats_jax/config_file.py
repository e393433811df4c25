"""Options of a command out of a YAML file."""

from pathlib import Path

import yaml

from a2ats_jax.errors import UserError


def expand(argv: list[str]) -> list[str]:
  """Put the options of a ``--config FILE`` before those that were typed, which then win.

  The file is a YAML mapping from option names to values; a list gives an option several values,
  false and null leave it out.

  Raises:
    UserError: the file is missing or not such a mapping.
  """
  argv = [
    part
    for word in argv
    for part in (word.split("=", 1) if word.startswith("--config=") else [word])
  ]
  if "--config" not in argv:
    return argv
  if argv[0] == "--config":
    raise UserError("config: --config belongs after the command")
  place = argv.index("--config")
  if place + 1 == len(argv):
    raise UserError("config: expected a file after --config")
  path = Path(argv[place + 1])
  try:
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise UserError(f"config {path}: {e.strerror}") from e
  except (UnicodeDecodeError, yaml.YAMLError) as e:
    raise UserError(f"config {path}: is not readable YAML") from e
  if not isinstance(options, dict):
    raise UserError(f"config {path}: expected a mapping of options, got {type(options).__name__}")
  written: list[str] = []
  for name, value in options.items():
    if isinstance(value, dict):
      raise UserError(f"config {path}: {name} is a mapping, expected a value or a list")
    values = value if isinstance(value, list) else [value]
    if value is not False and value is not None:
      written += [f"--{name}", *(str(v) for v in values if v is not True)]
  return [*argv[:place], *written, *argv[place + 2 :]]
