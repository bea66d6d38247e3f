"""The errors that a user can fix: `main.py` prints their message only, without a traceback."""


class UserError(Exception):
    """Bad config, data, checkpoint or path: names the value given, what is expected and what to do. Exit code 2."""

    exit_code = 2


class Temporary(UserError):
    """What the same command may not meet again: a host that has not come, a save that failed. Exit code 75, as sysexits
    has it, so that what starts jobs can tell it from a mistake."""

    exit_code = 75
