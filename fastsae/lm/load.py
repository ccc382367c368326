"""A language model with its tokenizer and the site that is studied."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._errors import UserError, one_line
from ..nn import Origin
from .sites import blocks_of, find_site

EMBEDDED = "embedded"  # what an SAE's origin calls it
EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny_python_lm"


@dataclass
class Subject:
    """The language model that is studied."""

    name: str
    model: Any
    tokenizer: Any
    site: str
    module: nn.Module
    n_layers: int
    origin: Origin


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights: the same in fp32, bf16 and fp64, on every device.

    By a few values of every parameter: enough to tell models apart, not to tell that nothing was
    changed. "", which says nothing, for a model of which a part is offloaded, quantised or in fp16
    (whose rounding is another).
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, p in sorted(model.named_parameters()):
        if p.is_meta or p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            return ""
        flat = p.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).cpu()
        digest.update(f"{name} {list(p.shape)}".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _width(config: Any) -> int | None:
    """Of the residual stream."""
    width: int | None = getattr(config.get_text_config(), "hidden_size", None)
    return width


def load_subject(
    model: str | None = None,
    *,
    device: str = "cpu",
    layer: int | None = None,
    hook: str | None = None,
    width: int | None = None,
) -> Subject:
    """Loads model and tokenizer, in eval mode and without gradients.

    Args:
        model: hub id or path; None: the embedded model.
        device: a torch device.
        layer: block whose output is the site, from 0; None: the middle one.
        hook: a module's dotted path instead of layer.
        width: of the activations that are wanted. A model whose blocks put out others is refused
            before its weights are read.

    Raises:
        UserError: the model, a file of it or the network is missing; another width.
    """
    embedded = model is None
    if embedded and not (EMBEDDED_MODEL / "config.json").exists():
        raise UserError(
            f"the embedded model is missing from this installation ({EMBEDDED_MODEL}); "
            "reinstall fastsae or name a model with --model"
        )
    source = str(EMBEDDED_MODEL) if model is None else model
    if embedded:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to look up
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # a missing network is one line of ours, not a warning for each of the hub's retries
    getLogger("huggingface_hub").setLevel(ERROR)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    path = Path(source).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(f"no such folder: {source}")
    if path.is_dir():
        source = str(path)
        if not (path / "config.json").exists():
            raise UserError(f"{source} holds no config.json, so it is no transformers model")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:
        raise UserError(f"device {device!r}: {one_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config: Any = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder:
            raise NotImplementedError("an encoder-decoder model; a causal language model is needed")
        of_block = hook is None or re.search(r"\.\d+$", hook)
        if width is not None and of_block and _width(config) not in (None, width):
            raise UserError(
                f"{source} has activations of width {_width(config)}, and the SAE is of width "
                f"{width}: it belongs to another model (--model)"
            )
        if getattr(config, "activation_function", None) == "gelu_new":
            # the same function as one kernel instead of seven; 1.6x for a whole GPT-2 on a CPU
            config.activation_function = "gelu_pytorch_tanh"
        dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
        found: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    except UserError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, httpx errors and more
        raise UserError(f"cannot load {source!r}: {one_line(error)}") from error
    found = found.to(place).eval().requires_grad_(False)
    try:
        if layer is None and hook is None:
            layer = len(blocks_of(found)[1]) // 2
        site, module = find_site(found, layer, hook)
    except ValueError as error:
        raise UserError(str(error)) from error
    name = "embedded: tiny_python_lm" if embedded else source
    n_layers = int(getattr(found.config.get_text_config(), "num_hidden_layers", 0))
    where = EMBEDDED if embedded else str(path.resolve()) if path.is_dir() else source
    revision = getattr(found.config, "_commit_hash", None) or ""
    origin = Origin(where, revision, fingerprint(found), site)
    return Subject(name, found, tokenizer, site, module, n_layers, origin)
