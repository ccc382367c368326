"""Steering without an SAE: a direction from two sets of prompts, added, or ablated everywhere.

`difference_of_means` of `prompt_activations` is the vector of Rimsky et al. 2023, "Steering Llama 2
via Contrastive Activation Addition"; added as there it is `[add_vector(v, alpha)]` with
`positions.generated_only()`. `ablate_direction` is the ablation of Arditi et al. 2024, "Refusal in
Language Models Is Mediated by a Single Direction".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..lm.harvest import activations_at
from ..lm.sites import blocks_of, device_of, find_site
from ..lm.tokens import encoded
from .attach import Receipt, Steerer, attach
from .operations import Program, project_out
from .positions import Positions

# What the families of transformers call a block's attention and its MLP.
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "feed_forward", "block_sparse_moe")


def prompt_activations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    layer: int | None = None,
    hook: str | None = None,
    position: str = "last",
    batch: int = 16,
    bos: bool = True,
) -> torch.Tensor:
    """What a site of a causal model puts out for each prompt.

    Args:
        layer, hook: the site, as in `attach`.
        position: "last", the last token's activation; "mean", over the tokens without the BOS.
        batch: prompts of one forward pass.
        bos: False: no BOS is put in front (`lm.tokens.encoded`).

    Returns:
        [P, D], in the model's dtype.

    Raises:
        ValueError: no prompts, an empty one, or no such site.
    """
    if position not in ("last", "mean"):
        raise ValueError(f"prompt_activations: position must be 'last' or 'mean', got {position!r}")
    module = find_site(model, layer, hook)[1]
    device = device_of(model)
    rows = [encoded(tokenizer, text, bos=bos) for text in prompts]
    if not rows or not all(rows):
        raise ValueError("prompt_activations: needs prompts, none of them empty")
    out = []
    for first in range(0, len(rows), batch):
        some = rows[first : first + batch]
        longest = max(map(len, some))
        # padded on the right: a causal model's real tokens do not see it
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in some], device=device)
        x = activations_at(model, module, ids)  # [b, T, D]
        for row, states in zip(some, x):
            head = int(row[0] == tokenizer.bos_token_id and len(row) > 1)
            chosen = states[len(row) - 1] if position == "last" else states[head : len(row)].mean(0)
            out.append(chosen)
    return torch.stack(out)


def difference_of_means(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """mean(positive) - mean(negative) of activations [P, D] and [N, D]: a vector [D].

    Its length is that of the difference itself: `add_vector(v, 1.0)` moves one mean to the other.

    Raises:
        ValueError: one of them is empty, or the widths differ.
    """
    if positive.dim() != 2 or negative.dim() != 2 or positive.shape[1] != negative.shape[1]:
        raise ValueError(
            "difference_of_means: positive and negative must be [P, D] and [N, D], got "
            f"{list(positive.shape)} and {list(negative.shape)}"
        )
    if len(positive) == 0 or len(negative) == 0:
        raise ValueError(
            f"difference_of_means: {len(positive)} positive and {len(negative)} negative rows; "
            "both are needed"
        )
    means = [x.float().mean(0) if x.dtype != torch.float64 else x.mean(0)
             for x in (positive, negative)]  # fmt: skip
    return (means[0] - means[1]).to(positive.dtype)


class Everywhere:
    """Every place that writes to the residual stream, steered as one. Made by `attach_everywhere`.

    Attributes:
        steerers: one per site.
    """

    def __init__(self, steerers: list[Steerer]) -> None:
        self.steerers = steerers

    @contextmanager
    def steer(
        self,
        programs: Sequence[Program | None],
        positions: Positions | None = None,
        *,
        prompt_length: int | None = None,
        unedited: str = "error",
    ) -> Iterator[Everywhere]:
        """`Steerer.steer` at every site; each has a receipt of its own (`receipts`)."""
        with ExitStack() as stack:
            for steerer in self.steerers:
                block = steerer.steer(
                    programs, positions, prompt_length=prompt_length, unedited=unedited
                )
                stack.enter_context(block)
            yield self

    @property
    def receipts(self) -> list[Receipt]:
        """Of every site, in the order of `steerers`."""
        return [steerer.receipt for steerer in self.steerers]

    def detach(self) -> None:
        """Takes all hooks off."""
        for steerer in self.steerers:
            steerer.detach()


def attach_everywhere(
    model: nn.Module, *, max_slots: int = 8, max_ops: int = 4, max_batch: int = 1024
) -> Everywhere:
    """Makes steerable, with operations on directions, what every block is given and puts out and
    what its attention and its MLP write: 3 L + 1 sites for L blocks.

    Raises:
        ValueError: the blocks, or their attention and MLP, are not where the families of
            transformers keep them; or a site is attached already.
    """
    path, blocks = blocks_of(model)
    sizes = {"max_slots": max_slots, "max_ops": max_ops, "max_batch": max_batch}
    sites = [(f"{path}.0", True)]
    for i, block in enumerate(blocks):
        for kind, names in (("attention", ATTENTIONS), ("MLP", MLPS)):
            found = [name for name in names if isinstance(getattr(block, name, None), nn.Module)]
            if not found:
                raise ValueError(
                    f"attach_everywhere: {path}.{i} ({type(block).__name__}) has no {kind} under "
                    f"{', '.join(names)}"
                )
            sites.append((f"{path}.{i}.{found[0]}", False))
        sites.append((f"{path}.{i}", False))
    steerers: list[Steerer] = []
    try:
        for name, inputs in sites:
            steerers.append(attach(model, hook=name, inputs=inputs, **sizes))
    except ValueError:
        Everywhere(steerers).detach()
        raise
    return Everywhere(steerers)


@contextmanager
def ablate_direction(model: nn.Module, direction: torch.Tensor) -> Iterator[Everywhere]:
    """Inside the block the residual stream has no component along `direction` [D], anywhere.

    x - (x . r) r at every block's input and output and at the output of every attention and MLP,
    for all sequences and positions. For other programs than this one, `attach_everywhere`.
    """
    everywhere = attach_everywhere(model, max_slots=1, max_ops=1, max_batch=1)
    try:
        with everywhere.steer([[project_out(direction)]]):
            yield everywhere
    finally:
        everywhere.detach()
