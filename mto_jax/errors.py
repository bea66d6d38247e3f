"""The one error that a user can fix: `main.py` prints its message only, without a traceback."""


class UserError(Exception):
    """Bad config, data, checkpoint or path: names the value given, what is expected and what to do."""
