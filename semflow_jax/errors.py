"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Bad input. The message is one line: the place, the rule, the value found, the remedy.

    `main.py` and the `semflow` command print it without a traceback and exit with code 2.
    """
