"""Errors that a command shows as one line."""


class UserError(ValueError):
    """Something the user can put right; the message is one line."""


def one_line(error: BaseException) -> str:
    """The first sentence or two of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
