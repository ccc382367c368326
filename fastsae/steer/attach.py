"""Steering inside a running model: one hook per site, programs written into fixed buffers."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._capture import is_capturing
from .._stamp import stamp
from ..lm.sites import by_token, find_site, output_of, refuse_encoder_decoder, replaced
from ..nn import Description
from ..ops.steer import Site, steer
from ..ops.topk_member import Selection, spread, topk_member
from ..reference.steer import normalised
from .buffers import Buffers
from .compile import Compiler, Entry
from .describe import describe
from .operations import Operation, Program
from .positions import Positions, is_bos, past_length, prompt_and_generated, token_mask
from .prompts import unwatch, watch

# module -> which of its sides are attached: its inputs (True), its output (False)
_taken: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    sae: Any = None,
    *,
    layer: int | None = None,
    hook: str | None = None,
    inputs: bool = False,
    max_slots: int = 64,
    max_ops: int = 32,
    max_batch: int = 1024,
) -> Steerer:
    """Makes a site of the model steerable. Attach before capturing a graph.

    Graphs that `torch.compile` has made do not look for new hooks: where there are any, all of the
    process are dropped (`torch.compiler.reset`) and made anew when next called.

    Args:
        model: a causal language model of transformers (any module whose forward takes
            `input_ids` will do).
        sae: what `describe` takes, or None: then only operations on directions are possible.
        layer: the residual stream after this block, counted from 0.
        hook: path of any module instead, whose output is edited.
        inputs: edit the activation that the module is given, not its output.
        max_slots: how many different programs one call may use.
        max_ops: entries of a program (a gate on a latent that the program does not read is one).
        max_batch: sequences of one call.

    Raises:
        ValueError: no such site, or it is attached already (`detach` the other first).
        NotImplementedError: the SAE is a transcoder, the model an encoder-decoder or scripted.
    """
    refuse_encoder_decoder(model, "attach")
    name, module = find_site(model, layer, hook)
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise NotImplementedError(
            f"attach: {name} is compiled by torch.jit, which runs no hooks; attach to the model "
            "that it was made of"
        )
    if inputs in _taken.get(module, ()):
        raise ValueError(f"attach: {name} is attached already; detach() that steerer first")
    steerer = Steerer(model, None if sae is None else describe(sae), name, module, inputs,
                      max_slots, max_ops, max_batch)  # fmt: skip
    if isinstance(sae, nn.Module):
        steerer.follow(sae)
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        torch.compiler.reset()
    return steerer


@dataclass
class Receipt:
    """What passed through a site since programs were put in force.

    Attributes:
        site: the module's path.
        calls: of the site.
        tokens: that it put out in them (those that positions leave alone included); of a compiled
            model 0, where only that there was a call is known.
        chosen: how many of the tokens positions did not leave alone, as a tensor where the model
            lies; None: not counted, because positions leave none alone or the model is compiled.
    """

    site: str
    calls: int = 0
    tokens: int = 0
    chosen: torch.Tensor | None = None

    def add(self, tokens: int | None) -> None:
        """Counts a call; None: of a compiled model."""
        if tokens is None:
            self.calls = 1  # a graph that counted would be compiled anew for every number
            return
        self.calls += 1
        self.tokens += tokens


def _weights(source: nn.Module) -> list[Any]:
    """Changes when a weight is written to or another is put in its place."""
    return [(stamp(t), t.dtype) for t in (*source.parameters(), *source.buffers())]


class Steerer:
    """A site that can be steered. Made by `attach`.

    Entering `steer(...)` copies programs into buffers of fixed address and leaving it, also by an
    exception, clears them: nothing is allocated and nothing waits for the device while the model
    runs, apart from exact TopK membership (`ops.topk_member`), for which int8 codes of W_enc are
    kept on a CPU. The buffers lie where the site's parameters do, in their dtype; where activations
    of another device or dtype arrive (an offloaded or converted model), they are made anew there.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: Description | None,
        name: str,
        module: nn.Module,
        inputs: bool,
        max_slots: int,
        max_ops: int,
        max_batch: int,
    ) -> None:
        self.site, self.sae = name, sae
        # the site's own: a model may lie on several devices, or be of several dtypes
        floats = (p for m in (module, model) for p in m.parameters() if p.is_floating_point())
        like = next(floats, torch.empty(0))
        config = getattr(model, "config", None)
        if sae is not None:
            width = sae.W_dec.shape[1]
            if sae.W_enc.shape[1] != width:
                raise NotImplementedError(
                    f"attach: a transcoder reads {sae.W_enc.shape[1]} and writes {width} wide "
                    "activations at two sites; one site can be steered"
                )
        else:
            text = config.get_text_config() if config is not None else None
            if text is None:
                raise ValueError("attach: without an SAE the model must have a config")
            width = text.hidden_size
        bos = getattr(config, "bos_token_id", None)
        eos = getattr(config, "eos_token_id", None)
        self._bos, self._eos = (
            () if i is None else tuple(i) if isinstance(i, list) else (int(i),) for i in (bos, eos)
        )
        self._pad = getattr(config, "pad_token_id", None)
        # offloaded parameters say nothing: the first activation will
        device = torch.device("cpu") if like.is_meta else like.device
        self._buffers = Buffers(max_slots, max_ops, width, max_batch, like.dtype, device)
        self._sequences = 0  # of the programs in force; 0: none
        self.receipt = Receipt(name)
        self._source: nn.Module | None = None  # of the description
        self._source_stamp: Any = None
        # may an entry ask for membership among the k, and does one now?
        self._exact = sae is not None and sae.exact_membership
        self._selects = False
        self._member: Selection | None = None
        self._fast = self._fast_site()
        self._positions = prompt_and_generated()
        self._only: torch.Tensor | None = None
        self._prompt_length: int | None = None
        self._guessed = False  # by the first call
        self._unchecked = True  # what `exclude` names, against a prompt
        self._in_pass = self._seen = False  # of the model; the site, in it
        self._tokens: torch.Tensor | None = None  # that the pass is given, [B, T] or [B, T, D]
        self._mask: torch.Tensor | None = None
        self._model, self._module, self._inputs = model, module, inputs
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._ids_first = self._names[:1] == ("input_ids",)
        _taken.setdefault(module, set()).add(inputs)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_pre_hook(self._on_inputs, with_kwargs=True)
            if inputs
            else module.register_forward_hook(self._after),
            model.register_forward_hook(self._passed, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy (of the model, with its hooks) is in no block: it steers nothing."""
        return {**self.__dict__, "_sequences": 0, "_mask": None, "_tokens": None}

    def follow(self, source: nn.Module) -> None:
        """Describes the SAE anew at every `set` before which its weights were written to, or others
        put in their place (`.to(...)`)."""
        self._source, self._source_stamp = source, _weights(source)

    def _described_anew(self) -> None:
        if self._source is None or self.sae is None or self._source_stamp == _weights(self._source):
            return
        now = _weights(self._source)
        self.sae = describe(self._source, self.sae.max_activation)
        self._source_stamp = now  # not before: a description that fails is asked for again
        self._exact, self._member = self.sae.exact_membership, None

    def detach(self) -> None:
        """Takes the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
            # a second detach must not free a site that another steerer has taken since
            _taken.get(self._module, set()).discard(self._inputs)
        self._handles = []

    # -- programs ---------------------------------------------------------------------------------

    @contextmanager
    def steer(
        self,
        programs: Sequence[Program | None],
        positions: Positions | None = None,
        *,
        prompt_length: int | None = None,
        unedited: str = "error",
    ) -> Iterator[Steerer]:
        """Inside the block, sequence b of every call is edited by `programs[b]`.

        A call with a multiple of `len(programs)` sequences (beams, several samples of a prompt)
        gives each program that many neighbouring sequences, as `generate` lays them out.

        Args:
            programs: one list of operations per sequence, or None to leave a sequence alone.
            positions: which tokens, `positions.prompt_and_generated()` by default.
            prompt_length: columns that belong to the prompt; by default those that `generate` is
                given, and of a model that is called by hand those of the first call.
            unedited: what happens when the block ends and no token was edited: "error", "warn" or
                "ignore". `receipt` says what was.

        Raises:
            ValueError: too many programs or entries, a latent out of range, unit="max" without
                statistics, a vector of another width.
            TypeError: an operation where a list of them is due.
            RuntimeError: already inside a block of this steerer, it was detached, or nothing was
                edited.
        """
        if unedited not in ("error", "warn", "ignore"):
            raise ValueError(f"steer: unedited must be error, warn or ignore, got {unedited!r}")
        self.set(programs, positions, prompt_length=prompt_length)
        try:
            yield self
        finally:
            self.clear()
        if unedited != "ignore" and any(programs):
            message = None
            if not self.receipt.calls:
                message = (
                    f"steer: nothing passed through {self.site} inside the block, so nothing was "
                    "edited. Was the model compiled before attach, another copy of it run, or a "
                    "captured graph replayed (then: unedited='ignore')?"
                )
            elif self.receipt.chosen is not None and not bool(self.receipt.chosen):
                message = (
                    f"steer: {self.receipt.tokens} tokens passed through {self.site}, and "
                    "positions left all of them alone, so nothing was edited"
                )
            if message is not None and unedited == "error":
                raise RuntimeError(message)
            if message is not None:
                warnings.warn(message, stacklevel=3)

    def set(
        self,
        programs: Sequence[Program | None],
        positions: Positions | None = None,
        *,
        prompt_length: int | None = None,
    ) -> None:
        """`steer` without a block: until `clear`."""
        if not self._handles:
            raise RuntimeError(f"steer: this steerer was detached from {self.site}; attach again")
        if self._sequences:
            raise RuntimeError(
                f"steer: {self.site} is being steered already; leave that block first"
            )
        self._refuse_other_than_programs(programs)
        if not isinstance(positions, Positions | None):
            raise TypeError(
                "steer: positions must come from fastsae.steer.positions, such as "
                f"positions.generated_only(), got {positions!r}"
            )
        where = positions or prompt_and_generated()
        only = where.only
        self._described_anew()
        here = self._buffers.enc.device
        tokens = None if only is None else torch.tensor(only, device=here)  # may refuse a number
        self._put_in_force(programs)
        self._positions, self._only = where, tokens
        self._prompt_length, self._guessed = prompt_length, False
        self._unchecked = prompt_length is None  # else a call need not begin with a prompt
        self.receipt = Receipt(self.site)
        if prompt_length is None and where.prompt != where.generated:
            watch(self._model, self)

    @staticmethod
    def _refuse_other_than_programs(programs: Any) -> None:
        lists = not isinstance(programs, Operation | str) and isinstance(programs, Sequence)
        if lists:
            lists = all(
                one is None or (not isinstance(one, Operation | str) and isinstance(one, Sequence))
                for one in programs
            )
        if not lists:
            raise TypeError(
                "steer: one list of operations per sequence, as in steer([[clamp(...)]])"
            )
        for one in programs:
            for operation in one or ():
                if not isinstance(operation, Operation):
                    raise TypeError(
                        "steer: a program holds operations, such as fastsae.steer.clamp(3, 5.0), "
                        f"got {operation!r}"
                    )

    def begin_generate(self, prompt_length: int) -> None:
        """Of `prompts.Watcher`: `generate` was given so many columns."""
        self._prompt_length, self._guessed, self._unchecked = prompt_length, False, True

    def end_generate(self) -> None:
        """Of `prompts.Watcher`: the next call has a prompt of its own."""
        self._prompt_length = None

    def _put_in_force(self, programs: Sequence[Program | None]) -> None:
        asked = self._buffers.write(programs, self._entries)
        # a captured graph must serve the next program too, which a CPU need not wait for
        self._selects = self._exact and (asked or self._buffers.enc.device.type != "cpu")
        self._programs, self._sequences = programs, len(programs)
        self._fast = self._fast_site()

    def _fast_site(self) -> Site:
        sae, tables = self.sae, self._buffers.tables
        if sae is None:
            return Site(*tables)
        if not self._selects or sae.input_scale != 1.0:
            return Site(*tables, sae.norm, sae.eps)
        centre = sae.b_dec if sae.subtract_b_dec else None
        return Site(*tables, sae.norm, sae.eps, self._selection(), self._buffers.asked, centre)

    def check(self, program: Program) -> None:
        """Raises ValueError when the program does not fit the site, its SAE or max_ops."""
        self._buffers.check(self._entries(program))

    def clear(self) -> None:
        """Nothing is steered any more; replayed graphs neither."""
        self._buffers.clear()
        self._sequences = 0
        self._mask = self._tokens = None
        self._in_pass = self._seen = False
        unwatch(self._model, self)

    def _entries(self, program: Program) -> list[Entry]:
        return Compiler(self.sae, self.site, self._buffers.enc.shape[2]).entries(program)

    # -- the model runs ---------------------------------------------------------------------------

    def _passed(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._in_pass, self._tokens = False, None

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        where = self._positions
        if not self._sequences:
            return
        self._in_pass, self._seen = True, False
        tokens = args[0] if args and self._ids_first else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        self._tokens = tokens
        if where.everywhere:
            return
        if args:
            kwargs = {**dict(zip(self._names, args)), **kwargs}
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        if self._prompt_length is None:  # the first pass
            self._prompt_length, self._guessed = int(past_length(kwargs)) + tokens.shape[1], True
        elif self._guessed and where.prompt != where.generated and tokens.shape[1] > 1:
            self._refuse_ambiguous(kwargs)
        if self._unchecked:
            self._unchecked = False
            self._refuse_unseen(where, kwargs)
        self._mask = token_mask(where, kwargs, self._prompt_length, self._bos, self._only)
        if not torch.compiler.is_compiling() and not is_capturing(self._mask.device):
            chosen, before = self._steered(self._mask).sum(), self.receipt.chosen
            self.receipt.chosen = chosen if before is None else before + chosen

    def _steered(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask [B, T] without the sequences that no program is for."""
        each, rest = divmod(len(mask), self._sequences)
        if rest:
            return mask  # refused at the site
        programmed = (self._buffers.current > 0).to(mask.device)
        return mask & programmed.repeat_interleave(each)[:, None]

    def _refuse_ambiguous(self, kwargs: dict[str, Any]) -> None:
        """Several tokens behind a cache: the rest of a prompt that is read in chunks, or tokens
        that another model proposed."""
        if torch.compiler.is_compiling() or is_capturing(self._buffers.enc.device):
            return
        if int(past_length(kwargs)) > 0:
            raise ValueError(
                "steer: a call of several tokens behind a cache (a prompt in chunks, assisted "
                "decoding, prompt lookup): say where the prompt ends, by steer(..., prompt_length=)"
            )

    def _refuse_unseen(self, where: Positions, kwargs: dict[str, Any]) -> None:
        """What was asked to be left out must be there and be known. Looks once, at a prompt."""
        ids, masked = kwargs.get("input_ids"), kwargs.get("attention_mask") is not None
        like = kwargs["inputs_embeds"] if ids is None else ids
        if torch.compiler.is_compiling() or is_capturing(like.device):
            return
        unknown = "pad" in where.exclude and not masked
        if ids is None:
            if unknown and len(like) > 1:
                raise ValueError(
                    "steer: exclude='pad' for several sequences of inputs_embeds needs an "
                    "attention_mask, which says where padding is"
                )
            return
        begins = where.prompt and int(past_length(kwargs)) == 0
        if begins and "bos" in where.exclude and not bool(is_bos(ids, self._bos).any(1).all()):
            raise ValueError(
                f"steer: exclude='bos', but in a sequence of this call no token is the model's BOS "
                f"({', '.join(map(str, self._bos))}); put it in front, or leave the exclusion out"
            )
        # generate() gives the model no mask where there is no padding
        if not unknown:
            return
        pads = self._eos if self._pad is None else (self._pad,)
        padding = torch.isin(ids, torch.tensor(pads, dtype=ids.dtype, device=ids.device))
        if set(pads) & {*self._bos, *self._eos}:
            # may stand for itself: alone, inside, and as the BOS in front
            edges = torch.stack([padding[:, 0] & padding[:, 1:2].any(1), padding[:, -1]])
            padding = edges if len(ids) > 1 else edges[:0]
        if bool(padding.any()):
            names = ", ".join(map(str, pads))
            raise ValueError(
                f"steer: exclude='pad', and the call has tokens {names}, the model's padding, "
                "but no attention_mask, which says where it is"
            )

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if not self._sequences:
            return None
        try:
            x = output_of(output)
        except TypeError as error:
            raise TypeError(f"steer: {self.site} cannot be steered: {error}") from None
        return replaced(output, self._edit(x))

    def _on_inputs(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._sequences:
            return None
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            return (self._edit(args[0]), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": self._edit(kwargs["hidden_states"])}
        raise TypeError(
            f"steer: what goes into {self.site} cannot be steered: neither its first argument nor "
            "hidden_states is an activation"
        )

    def _edit(self, x: torch.Tensor) -> torch.Tensor:
        compiling, leading = torch.compiler.is_compiling(), x.shape[:-1]
        if not leading or x.shape[-1] != self._buffers.enc.shape[2]:
            raise ValueError(
                f"steer: {self.site} has activations {list(x.shape)}, and what was attached is for "
                f"[B, T, {self._buffers.enc.shape[2]}]"
            )
        self.receipt.add(None if compiling else leading.numel())
        if self._in_pass:
            if self._seen:
                raise RuntimeError(
                    f"steer: {self.site} runs more than once in a pass of the model, and would be "
                    "edited as often; attach to a module that runs once"
                )
            self._seen = True
        mask, tokens = self._mask, self._tokens
        if mask is None and not self._positions.everywhere:
            raise RuntimeError(
                f"steer: positions at {self.site} need a call of the model that was attached to; "
                "a module inside it was called by itself"
            )
        flat: torch.Tensor | None = None
        if tokens is None:
            if len(leading) != 2 and not (len(leading) == 1 and self._sequences == 1):
                raise ValueError(
                    f"steer: {self.site} puts out {list(x.shape)} in a call that does not say how "
                    "many sequences there are; [B, T, D] can be edited"
                )
        elif leading != tokens.shape and leading != tokens.shape[:2]:
            try:
                flat, x = x, by_token(x, tokens.shape[:2], self.site)
            except ValueError as error:
                raise ValueError(f"steer: {error}") from None
        out = None
        if not compiling and (not self._selects or self._counts()):
            out = self._fast(x, mask)
        if out is None:
            out = self._edit_by_operators(x, mask)
        return out if flat is None else out.view(flat.shape)

    def _edit_by_operators(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, D], or [T, D] for one program."""
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.device != self._buffers.enc.device or (
            x.dtype != self._buffers.enc.dtype and not autocast
        ):
            self._place_at(x)
        if mask is not None:
            mask = mask.to(x.device)
            if mask.shape != x.shape[:-1]:
                raise ValueError(
                    f"steer: {self.site} puts out {list(x.shape)} for tokens {list(mask.shape)}; "
                    "such a site takes positions=None only"
                )
        programs, shape = self._sequences, x.shape
        if shape[0] == programs and len(shape) == 3:
            return self._edit_grouped(x, mask)
        if (len(shape) == 3 and shape[0] % programs) or shape[0] == 0:
            raise ValueError(
                f"steer: {programs} programs for a call of shape {list(shape)} at {self.site}; "
                "give one for each sequence (or None)"
            )
        # neighbouring sequences share a program
        grouped = x.reshape(programs, -1, shape[-1])
        mask = None if mask is None else mask.reshape(programs, -1)
        return self._edit_grouped(grouped, mask).view(shape)

    def _place_at(self, x: torch.Tensor) -> None:
        """The buffers anew, where the activations are: parameters that were offloaded or converted
        since said something else."""
        table = self._buffers.enc
        if torch.compiler.is_compiling() or is_capturing(x.device) or not x.is_floating_point():
            raise TypeError(
                f"steer: {self.site} puts out {x.dtype} on {x.device}, and its buffers are "
                f"{table.dtype} on {table.device}; run the model once before a graph is made of it"
            )
        self._buffers = self._buffers.moved(x.dtype, x.device)
        self._only = None if self._only is None else self._only.to(x.device)
        self._put_in_force(self._programs)

    def _edit_grouped(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [P, ..., D], one program each."""
        compiling = torch.compiler.is_compiling()
        selects = self._exact if compiling else self._selects
        member = self._members(x) if selects else None
        tables = self._buffers.tables
        if not compiling and torch.is_grad_enabled() and x.requires_grad:
            # their own: the backward pass may run when others are in force
            used, entries = self._buffers.used
            enc, dec, param, code = (t[:used, :entries].clone() for t in tables[:4])
            tables = (enc, dec, param, code, self._buffers.current.clone())
            member = None if member is None else member[..., :entries]
        norm, eps = ("none", 1e-5) if self.sae is None else (self.sae.norm, self.sae.eps)
        return steer(x, *tables, mask, member, norm, eps)

    def _counts(self) -> bool:
        """Does `_fast` know the selection? Of W_enc as it is now: it may have been written to."""
        known = self._fast.selection
        if known is not None and known.stamp != stamp(known.W_enc):
            self._fast = self._fast_site()
        return known is not None

    def _members(self, x: torch.Tensor) -> torch.Tensor:
        """[P, ..., O] bool: is the entry's latent among the token's k selected?"""
        sae = self.sae
        assert sae is not None and sae.k is not None
        u = x.to(sae.W_enc.dtype)
        if sae.norm != "none":
            u = normalised(u.flatten(0, -2), sae.norm, sae.eps)[0].view(x.shape)
        if sae.input_scale != 1.0:
            u = u * sae.input_scale
        if sae.subtract_b_dec:
            u = u - sae.b_dec
        if not torch.compiler.is_compiling():
            return self._selection()(u, self._buffers.asked)
        # a graph would keep the screen of weights that are written to later
        asked, positive = spread(self._buffers.asked, u), not sae.identity
        return topk_member(u, sae.W_enc, sae.b_enc, asked, sae.k, sae.rank_scale, positive)

    def _selection(self) -> Selection:
        """Membership among the k, made again when W_enc was written to."""
        sae = self.sae
        assert sae is not None and sae.k is not None
        if self._member is None or self._member.stamp != stamp(sae.W_enc):
            self._member = Selection(
                sae.W_enc, sae.b_enc, sae.k, sae.rank_scale, positive=not sae.identity
            )
        return self._member
