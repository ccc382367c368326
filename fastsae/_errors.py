"""Errors that a command shows as one line."""


class UserError(ValueError):
    """Something the user can put right; the message is one line."""


def one_line(error: BaseException) -> str:
    """The first sentence or two of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def not_a_tensor(value: object) -> str:
    """What to pass in place of something that is no tensor."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__name__}" if kind.__module__ != "builtins" else kind.__name__
    how = "torch.from_numpy(...)" if kind.__module__ == "numpy" else "torch.tensor(...)"
    return f"a torch tensor is needed, got {name} ({how} makes one)"
