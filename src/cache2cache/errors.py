"""The one exception a user is meant to read."""


class C2CError(Exception):
    """Wrong input or surroundings, in one line: what was given, what was expected, the fix.

    The command line prints the message without a traceback and exits with status 1.
    """
