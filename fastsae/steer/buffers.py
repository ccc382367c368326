"""Programs as the tables that the operator reads, at addresses that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .. import _steer_codes as codes
from .compile import Entry
from .operations import Operation, Program

Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Buffers:
    """Room for `slots` programs of `ops` entries each, and for `batch` sequences.

    Attributes:
        enc, dec: [S, O, D], rows of W_enc and W_dec or directions. Slot 0 does nothing.
        param, code: [S, O, 6] and [S, O, 3], as `ops.steer` takes them.
        current: [P] int32, the slots of the sequences in force.
        asked: [P, O] int32, the latents that those read, -1 where there is none.
        used: how many slots and entries are in use.
    """

    @torch.inference_mode(False)  # tables made inside could not be written outside
    def __init__(
        self, slots: int, ops: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sizes = slots, ops, width, batch
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.enc = torch.zeros(slots + 1, ops, width, dtype=dtype, device=device)
        self.dec = torch.zeros_like(self.enc)
        self.param = torch.zeros(slots + 1, ops, 6, dtype=wide, device=device)
        self.code = torch.zeros(slots + 1, ops, 3, dtype=torch.int32, device=device)
        self._latents = torch.full((slots + 1, ops), -1, dtype=torch.int32, device=device)
        self._wanted = torch.full((batch, ops), -1, dtype=torch.int32, device=device)
        self._slots = torch.zeros(batch, dtype=torch.int32, device=device)
        self.used = (1, 1)
        self.current, self.asked = self._slots[:0], self._wanted[:0]

    def moved(self, dtype: torch.dtype, device: torch.device) -> Buffers:
        """Empty ones elsewhere."""
        return Buffers(*self.sizes, dtype, device)

    @property
    def tables(self) -> Tables:
        """Whole, whatever is in force: a captured graph sees one address."""
        return self.enc, self.dec, self.param, self.code, self.current

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ValueError when a program has too many entries."""
        if len(entries) > self.sizes[1]:
            raise ValueError(
                f"steer: a program of {len(entries)} entries, max_ops is {self.sizes[1]}"
            )

    def write(
        self,
        programs: Sequence[Program | None],
        entries_of: Callable[[Program], list[Entry]],
    ) -> bool:
        """Puts programs in force, one per sequence; equal ones share a slot.

        Returns:
            Whether an entry asks for membership among the k.

        Raises:
            ValueError: too many programs or entries, or what `entries_of` refuses; nothing is
                changed then.
        """
        most, _, width, batch = self.sizes
        if len(programs) == 0 or len(programs) > batch:
            raise ValueError(
                f"steer: between 1 and {batch} programs (max_batch), got {len(programs)}"
            )
        lists: list[list[Entry]] = []
        slots: list[int] = []
        known: dict[tuple[Operation, ...], int] = {}
        for program in programs:
            if not program:
                slots.append(0)
                continue
            key = tuple(program)
            if key not in known:
                lists.append(entries_of(program))
                known[key] = len(lists)
            slots.append(known[key])
        if len(lists) > most:
            raise ValueError(f"steer: {len(lists)} different programs, max_slots is {most}")
        for entries in lists:
            self.check(entries)
        shape = (1 + len(lists), max([1, *map(len, lists)]))
        enc = torch.zeros(*shape, width, dtype=torch.float64)
        dec, param = torch.zeros_like(enc), torch.zeros(*shape, 6, dtype=torch.float64)
        code, latents = torch.zeros(*shape, 3, dtype=torch.int32), torch.full(shape, -1)
        for s, entries in enumerate(lists, 1):
            for o, entry in enumerate(entries):
                enc[s, o], dec[s, o] = entry.enc, entry.dec
                param[s, o] = torch.tensor(entry.param, dtype=torch.float64)
                code[s, o] = torch.tensor([entry.opcode, entry.flags, entry.gate])
                latents[s, o] = entry.latent
        self.code[:, :, 0] = codes.END
        for buffer, table in (
            (self.enc, enc),
            (self.dec, dec),
            (self.param, param),
            (self.code, code),
            (self._latents, latents),
        ):
            buffer[: shape[0], : shape[1]].copy_(table)
        self.used = shape
        count = len(slots)
        self._slots.zero_()
        self._slots[:count].copy_(torch.tensor(slots, dtype=torch.int32))
        self._wanted[:count].copy_(self._latents.index_select(0, self._slots[:count]))
        self.current, self.asked = self._slots[:count], self._wanted[:count]
        return bool((code[..., 1] & codes.MEMBER).any())

    def clear(self) -> None:
        """Every sequence takes the slot that does nothing; replayed graphs too."""
        self._slots.zero_()
