"""The one error that is meant for people."""


class OspError(ValueError):
    """Bad input, told in one line: what, where, and what would be right.

    Commands print the message without a traceback and exit with status 2.
    """
