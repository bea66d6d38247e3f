"""The one error that a user can mend: `main.py` prints its message alone, without a traceback."""


class UserError(Exception):
    """Bad config, data, checkpoint or path: says what was got, what was expected and what to do."""
