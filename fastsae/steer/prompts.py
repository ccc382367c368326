"""Where the prompt of a `generate` call ends, for steerers that treat it and the rest differently.

A pass of the model does not say it: a prompt may be read in chunks, and a pass may begin with
tokens that another model proposed. `generate` is given the whole prompt.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import nn


class Watcher(Protocol):
    """A steerer in a block."""

    def begin_generate(self, prompt_length: int) -> None:
        """A call of `generate` with so many columns begins."""

    def end_generate(self) -> None:
        """It has ended."""


_watchers: weakref.WeakKeyDictionary[nn.Module, list[Watcher]] = weakref.WeakKeyDictionary()


class _Generate:
    """In place of a model's `generate` while somebody watches; a copy of the model has nobody."""

    def __init__(self, model: nn.Module, own: Any) -> None:
        self.model, self.own = model, own  # what the instance had in its place, or None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        length = _length(args, kwargs)
        told = list(_watchers.get(self.model, ())) if length is not None else []
        for watcher in told:
            watcher.begin_generate(length)  # type: ignore[arg-type]
        try:
            if self.own is not None:
                return self.own(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            for watcher in told:
                watcher.end_generate()


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    names = ("inputs", "input_ids", "inputs_embeds")
    prompt = (
        args[0] if args else next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
    )
    return prompt.shape[1] if isinstance(prompt, torch.Tensor) and prompt.dim() > 1 else None


def watch(model: nn.Module, watcher: Watcher) -> None:
    """Tells `watcher` of the model's calls of `generate`, until `unwatch`."""
    if not hasattr(type(model), "generate"):
        return
    watchers = _watchers.setdefault(model, [])
    if not watchers:
        model.__dict__["generate"] = _Generate(model, model.__dict__.get("generate"))
    watchers.append(watcher)


def unwatch(model: nn.Module, watcher: Watcher) -> None:
    """Undoes `watch`."""
    watchers = _watchers.get(model, [])
    if watcher not in watchers:
        return
    watchers.remove(watcher)
    if not watchers:
        ours = model.__dict__.get("generate")
        if not isinstance(ours, _Generate):
            return  # somebody has put another in its place since, which stays
        del model.__dict__["generate"]
        if ours.own is not None:
            model.__dict__["generate"] = ours.own
