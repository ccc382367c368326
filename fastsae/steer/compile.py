"""From a program to the rows of the tables that the operator reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _steer_codes as codes
from ..nn import Description
from .operations import MAX_UNIT, Gate, Operation, Program

_TAU = 5  # of an entry's param: bias, theta, gain, offset, value, tau


class Entry:
    """One row of the tables."""

    def __init__(
        self,
        enc: torch.Tensor,
        dec: torch.Tensor,
        param: list[float],
        opcode: int,
        flags: int,
        latent: int,
    ) -> None:
        self.enc, self.dec, self.param = enc, dec, param
        self.opcode, self.flags, self.latent = opcode, flags, latent
        if flags & codes.RAW:
            self.latent = -1
        self.gate = -1


@dataclass(frozen=True)
class Compiler:
    """Programs for a site whose activations are `width` wide, with its SAE if it has one."""

    sae: Description | None
    site: str
    width: int

    def entries(self, program: Program) -> list[Entry]:
        """The rows of one program, probes for its gates included."""
        entries = [self._entry(op) for op in program]
        for op, entry in zip(program, list(entries)):
            if op.when is not None:
                entry.gate = self._gate(op.when, entries)
                entry.param[_TAU] = self._amount(op.when.latent, op.when.above, op.when.unit)
        return entries

    def _gate(self, gate: Gate, entries: list[Entry]) -> int:
        """The entry that reads the gate's latent; a probe is added when there is none."""
        for at, entry in enumerate(entries):
            if entry.latent == gate.latent and entry.opcode != codes.ADD:
                return at
        entries.append(self._latent_entry(gate.latent, codes.PROBE, 0.0))
        return len(entries) - 1

    def _entry(self, op: Operation) -> Entry:
        if op.latent is not None:
            value = self._amount(op.latent, op.value, op.unit)
            return self._latent_entry(op.latent, op.opcode, value)
        assert op.vector is not None
        if len(op.vector) != self.width:
            raise ValueError(
                f"steer: a vector of width {len(op.vector)} at {self.site}, whose activations have "
                f"width {self.width}"
            )
        vector = op.vector.double().cpu()
        param = [0.0, -float("inf"), 1.0, 0.0, op.value, 0.0]
        return Entry(vector, vector, param, op.opcode, codes.RAW | codes.SIGNED, -1)

    def _amount(self, latent: int, value: float, unit: str) -> float:
        sae = self._described(latent)
        if unit != MAX_UNIT:
            return value
        if sae.max_activation is None:
            raise ValueError(
                f"steer: unit='max' for latent {latent} needs the SAE's maximum activations: "
                "describe(sae, max_activation=MaxActivations(values, tokens, data))"
            )
        return value * float(sae.max_activation.values[latent])

    def _described(self, latent: int) -> Description:
        if self.sae is None:
            raise ValueError(f"steer: latent {latent} at {self.site}, which has no SAE attached")
        if latent >= len(self.sae.W_dec):
            raise ValueError(
                f"steer: latent {latent} at {self.site}, whose SAE has {len(self.sae.W_dec)}"
            )
        return self.sae

    def _latent_entry(self, latent: int, opcode: int, value: float) -> Entry:
        sae = self._described(latent)

        def at(tensor: torch.Tensor | float | None, default: float) -> float:
            if tensor is None or isinstance(tensor, (int, float)):
                return default if tensor is None else float(tensor)
            return float(tensor.reshape(-1)[latent if tensor.numel() > 1 else 0])

        enc = sae.W_enc[latent].double().cpu()
        shift = -float(enc @ sae.b_dec.double().cpu()) if sae.subtract_b_dec else 0.0
        gain = at(sae.gain, 1.0)
        bias = at(sae.b_enc, 0.0) + shift
        offset = bias if sae.offset is None else at(sae.offset, 0.0) + gain * shift
        flags, theta = 0, at(sae.threshold, 0.0)
        if sae.exact_membership:
            flags, theta = codes.MEMBER, -float("inf")
        if sae.identity:
            flags |= codes.SIGNED
        param = [bias, theta, gain, offset, value, 0.0]
        dec = sae.W_dec[latent].double().cpu() / sae.input_scale
        return Entry(enc * sae.input_scale, dec, param, opcode, flags, latent)
