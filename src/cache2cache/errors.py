"""The one exception a user is meant to read."""


class C2CError(Exception):
    """Wrong input or surroundings, in one line: what was given, what was expected, the fix.

    The command line prints the message without a traceback and exits with status 1.
    """


class Unreachable(C2CError):
    """Something elsewhere that doesn't answer now: no fault of what was asked."""


def short(value: object, limit: int = 60) -> str:
    """A value from a file as an error quotes it: on one line, without control characters, of that many characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
