"""Where a language model is read and edited: blocks, modules by path, and their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn

# Where the families of transformers keep their list of blocks.
BLOCK_PATHS = (
    "transformer.h",  # GPT-2, GPT-Neo, GPT-J, Falcon, BLOOM
    "gpt_neox.layers",  # GPT-NeoX, Pythia
    "model.layers",  # Llama, Mistral, Gemma, Qwen, Phi, OLMo
    "model.language_model.layers",  # the text part of Gemma 3, Qwen-VL
    "model.decoder.layers",  # OPT
)


def refuse_encoder_decoder(model: nn.Module, where: str) -> None:
    """Two streams of tokens in one call: which of them a site sees, a mask is of, or a cache holds
    differs from model to model.

    Raises:
        NotImplementedError: the model is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{where}: {type(model).__name__} is an encoder-decoder model; only models that read "
            "and write one sequence (causal language models) are supported"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where to put what the model is given: where its first parameter lies; on the CPU where all
    are offloaded, for what brings them in (accelerate's hooks) moves the input along."""
    places = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(places, torch.device("cpu"))


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the model's list of blocks, and the list.

    Raises:
        ValueError: no list of blocks under any known path.
    """
    for path in BLOCK_PATHS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return path, found
    raise ValueError(
        f"{type(model).__name__}: its blocks are not under {', '.join(BLOCK_PATHS)}; "
        "name the module whose output to read with hook="
    )


def find_site(
    model: nn.Module, layer: int | None = None, hook: str | None = None
) -> tuple[str, nn.Module]:
    """The module whose output is read or edited, and its dotted path.

    Args:
        model: a causal language model.
        layer: block counted from 0; its output is the residual stream after it.
        hook: path of any submodule instead, `"model.layers.3.mlp"`.

    Raises:
        ValueError: both or neither given, the layer out of range, or no module at `hook`.
    """
    if (layer is None) == (hook is None):
        raise ValueError("find_site: give layer or hook, one of them")
    if hook is not None:
        try:
            return hook, model.get_submodule(hook)
        except AttributeError:
            names = [name for name, _ in model.named_modules() if name]
            last = hook.rsplit(".", 1)[-1]
            near = [n for n in names if n.rsplit(".", 1)[-1] == last] or names
            raise ValueError(
                f"{type(model).__name__} has no module {hook!r}; some of its modules: "
                f"{', '.join(near[:4])}"
            ) from None
    assert layer is not None
    path, blocks = blocks_of(model)
    if not 0 <= layer < len(blocks):
        raise ValueError(
            f"layer must lie in [0, {len(blocks) - 1}] ({path} has {len(blocks)}), got {layer}"
        )
    return f"{path}.{layer}", blocks[layer]


def output_of(output: Any) -> torch.Tensor:
    """The hidden states in a module's output: the output, or the first of its parts.

    Raises:
        TypeError: there is no tensor there.
    """
    if isinstance(output, torch.Tensor):  # first: a hook asks at every token
        return output
    found = None
    if isinstance(output, tuple | list):
        found = output[0] if output else None
    elif isinstance(output, Mapping):
        found = next(iter(output.values()), None)
    if not isinstance(found, torch.Tensor):
        raise TypeError(
            f"a module's output must be a tensor or begin with one, got {type(output).__name__}"
            + ("" if found is None else f" that begins with {type(found).__name__}")
        )
    return found


def by_token(x: torch.Tensor, tokens: Sequence[int], site: str) -> torch.Tensor:
    """A module's output as [B, T, D], for a call of `tokens` = B, T.

    Raises:
        ValueError: it is neither that nor [B * T, D]: of heads, of experts, of some tokens only.
    """
    batch, length = tokens
    if x.dim() == 3 and x.shape[0] == batch and x.shape[1] == length:
        return x
    if x.dim() == 2 and x.shape[0] == batch * length:
        return x.reshape(batch, length, -1)
    raise ValueError(
        f"{site} puts out {list(x.shape)} in a call of {batch} sequences of {length} tokens; a "
        "module that puts out [B, T, D] or [B * T, D] can be read and edited"
    )


def replaced(output: Any, new: torch.Tensor) -> Any:
    """The same output with other hidden states; nothing is written to."""
    if isinstance(output, torch.Tensor):
        return new
    if isinstance(output, Mapping):
        changed = copy(output)  # also an output of transformers, a mapping with attributes
        changed[next(iter(output))] = new  # type: ignore[index]
        return changed
    if isinstance(output, tuple | list):
        rest = [new, *output[1:]]
        if hasattr(output, "_fields"):  # a named tuple
            return type(output)(*rest)
        return type(output)(rest)
    raise TypeError(f"replaced: no hidden states in {type(output).__name__}")


@contextmanager
def edited(module: nn.Module, edit: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block, `edit(x)` takes the place of the module's output x [..., D].

    The hook is removed when the block is left, also by an exception.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replaced(output, edit(output_of(output)))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
