"""The one exception that means: the caller handed in something that cannot work."""


class UserError(ValueError):
  """Bad input: the message says in one line what it was, what was expected and what was got.

  The command line prints it without a traceback and exits with code 2. Everything else that
  is raised is a bug of ours and keeps its traceback.
  """
