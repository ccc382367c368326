"""Real text that every machine has: the source of Python's own standard library.

The embedded language model is trained on the `train` split, so the `heldout` split is text that
it has never seen. The rule is by module and by name alone, so it gives the same answer on every
Python version and platform: a document is held out when it belongs to one of `HELD_OUT_MODULES`
or is a test of one.
"""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from .._errors import UserError, one_line
from .harvest import Windows, windows_of
from .load import Subject

Split = Literal["train", "heldout"]
# progress(title, total) is a context manager that gives `advance(n)`
Progress = Callable[[str, int], Any]

HELD_OUT_MODULES = frozenset(
    [
        *["json", "http", "email", "sqlite3", "csv", "heapq", "textwrap", "statistics"],
        *["tomllib", "zipfile", "calendar", "shelve", "gettext", "fractions", "sched", "graphlib"],
    ]
)
# Tests whose name does not start with that of the module they test.
_HELD_OUT_TESTS = ("httplib", "httpservers")

# Not the library's own text: installed packages, build configuration, inputs of tests.
_SKIPPED_FOLDERS = frozenset(
    ["__pycache__", "site-packages", "dist-packages", "data", "encoded_modules", "lib-dynload"]
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "bad_", "badsyntax", "config-")
# Written by a program: character tables, grammar tables. Nothing to learn but digits.
_MIN_SHARE_OF_LETTERS_AND_SPACE = 0.60


def is_test(name: str) -> bool:
    """Whether a document (a path relative to the library) belongs to a test package."""
    parts = PurePosixPath(name).parts
    return parts[0] == "test" or any(p in ("test", "tests", "idle_test") for p in parts[1:-1])


def is_held_out(name: str) -> bool:
    """Whether the document called `name`, such as `json/decoder.py`, is held out of training."""
    parts = PurePosixPath(name).with_suffix("").parts
    if parts[0] == "pydoc_data":
        return False
    if not is_test(name):
        return parts[0] in HELD_OUT_MODULES
    tested = [p.removeprefix("test_") for p in parts]
    return any(p in HELD_OUT_MODULES or p.startswith(_HELD_OUT_TESTS) for p in tested) or any(
        raw.startswith("test_") and p.startswith(tuple(HELD_OUT_MODULES))
        for raw, p in zip(parts, tested, strict=True)
    )


def stdlib_documents(
    split: Split, *, include_tests: bool = True, root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of the running Python's standard library, sorted by name.

    Names are posix paths relative to the library, `json/decoder.py`. The help topics of
    `pydoc_data.topics` are imported, one document each (`pydoc_data/topics/assert`), because
    their source is one line of escapes. Some systems install no test packages; then there are
    none to yield. Deterministic.

    Args:
        split: `"train"`, or `"heldout"`: what the embedded model has not seen.
        include_tests: also the test packages, where they are installed.
        root: another folder to read instead of the running Python's library.

    Raises:
        FileNotFoundError: the library has no source text (a frozen or stripped Python).
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'stdlib_documents: split must be "train" or "heldout", got {split!r}')
    folder = Path(root if root is not None else sysconfig.get_path("stdlib"))
    found = False
    for path in _python_files(folder):
        name = path.relative_to(folder).as_posix()
        found = True
        if is_held_out(name) != (split == "heldout") or (is_test(name) and not include_tests):
            continue
        text = _read(path)
        if text is not None:
            yield name, text
    if not found:
        raise FileNotFoundError(
            f"stdlib_documents: no Python source under {folder}. This Python was installed "
            "without its library's source text; use one that has it, or give text of your own."
        )
    if split == "train" and root is None:
        yield from _help_topics()


def _python_files(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(_SKIPPED_PREFIXES)
        )
        for file in sorted(files):
            path = Path(here, file)
            if (
                file.endswith(".py")
                and not file.startswith(_SKIPPED_PREFIXES)
                and path.relative_to(folder).parts != ("pydoc_data", "topics.py")
            ):
                yield path


def _read(path: Path) -> str | None:
    """The file's text; None for what is not text to learn from."""
    try:
        with tokenize.open(path) as file:  # obeys the coding line; newlines become \n
            text = file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    wordlike = sum(c.isalpha() or c.isspace() for c in text)
    if "decoding_table" in text and path.parent.name == "encodings":
        return None
    if len(text) < 32 or wordlike < _MIN_SHARE_OF_LETTERS_AND_SPACE * len(text):
        return None
    return text


def _help_topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic in sorted(topics):
        text = topics[topic].strip() + "\n"
        if len(text) >= 32:
            yield f"pydoc_data/topics/{topic}", text


def stdlib_windows(
    subject: Subject,
    *,
    tokens: int,
    held_out_tokens: int,
    context: int,
    seed: int,
    progress: Progress,
) -> tuple[Windows, Windows]:
    """Windows to train on and held-out windows, of the standard library's text, shuffled.

    Args:
        tokens, held_out_tokens: how many activations they are to give, the first position of
            every window left out.
        context: tokens of a window, or as many as the model takes.

    Raises:
        UserError: this Python has no text of its library.
    """
    config = subject.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or context
    length = min(context, longest)
    wanted = max(1, tokens // (length - 1))
    wanted_held_out = max(2, held_out_tokens // (length - 1))
    generator = torch.Generator().manual_seed(seed)
    try:
        documents = list(stdlib_documents("train", include_tests=False))
        order = torch.randperm(len(documents), generator=generator).tolist()
        with progress("Reading text", wanted) as advance:

            def told() -> Iterator[tuple[str, str]]:
                for i in order:
                    yield documents[i]

            train = windows_of(told(), subject.tokenizer, length, wanted, per_document=64)
            advance(len(train))
        held_out = windows_of(
            stdlib_documents("heldout", include_tests=False), subject.tokenizer, length,
            per_document=12,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise UserError(one_line(error)) from error
    shuffle = torch.randperm(len(train), generator=generator)
    spread = torch.randperm(len(held_out), generator=generator)[:wanted_held_out]
    return train.select(shuffle), held_out.select(spread)
