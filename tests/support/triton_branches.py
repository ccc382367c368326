"""Branches of a kernel on memory that another program of the launch may write meanwhile.

Every warp of a block loads a value that the block branches on. Where another program changes it in
between, some warps take the branch and some do not, and a barrier inside waits for ever. `changing`
follows each condition in a kernel's TTIR, which is one function, back to the arguments that it was
loaded from. Those that the kernel also writes must be the program's own: every address formed from
such an argument depends on each program id that the kernel asks for, and nothing writes by atomics.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

_NAME = re.compile(r"%[\w.-]+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
_YIELDS = ("scf.yield", "tt.reduce.return", "tt.scan.return")


@dataclass
class _Region:
    """An operation whose region is open."""

    op: str
    results: list[str]
    arguments: list[str] = field(default_factory=list)  # of its block
    passed: list[str] = field(default_factory=list)  # by scf.condition to the block after it


class _Flow:
    """What every value of a TTIR function is made from."""

    def __init__(self, ttir: str) -> None:
        self.made_from: dict[str, set[str]] = defaultdict(set)
        self.conditions: set[str] = set()
        self.loads: dict[str, str] = {}  # result: address
        self.writes: list[tuple[str, str]] = []  # operation, address
        self.axes: dict[str, str] = {}  # value: axis of the program id
        self.pointers: set[str] = set()  # arguments
        self._open: list[_Region] = []
        for line in ttir.splitlines():
            if line.strip().startswith("tt.func"):
                self.pointers = set(re.findall(r"(%[\w.-]+): !tt.ptr", line))
                self._open = [_Region("tt.func", [])]
            elif self._open:
                self._line(_LOCATION.sub("", line).partition("//")[0].strip())

    def _line(self, line: str) -> None:
        if line.startswith("}"):
            region = self._open.pop()
            if line.endswith("{"):  # "} else {", "} do {"
                self._open.append(region)
            return
        if line.startswith("^"):
            self._block(_NAME.findall(line))
            return
        left, _, right = line.partition(" = ") if line.startswith("%") else ("", "", line)
        results = _results(left)
        op = re.match(r'"?([\w.]+)', right)
        if op is None:
            return
        operands = _NAME.findall(right)
        self._operation(op[1], results, operands, right)
        if line.endswith("{"):
            region = _Region(op[1], results)
            if op[1] in ("scf.for", "scf.while"):
                region.arguments = [a for a, _ in _carried(right)]
            elif op[1] != "scf.if":
                region.passed = operands
            self._open.append(region)

    def _operation(self, op: str, results: list[str], operands: list[str], text: str) -> None:
        region = self._open[-1]
        if op == "scf.for":
            loop = re.search(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)", text)
            assert loop is not None, text
            self.conditions |= set(loop.groups()[1:])
            self.made_from[loop[1]] |= set(loop.groups()[1:])
        if op in ("scf.for", "scf.while"):
            for i, (argument, start) in enumerate(_carried(text)):
                self.made_from[argument].add(start)
                if op == "scf.for":
                    self.made_from[results[i]].add(start)
            return
        if op in ("scf.if", "cf.cond_br", "scf.condition"):
            self.conditions.add(operands[0])
        if op == "scf.condition":
            region.passed = operands[1:]
            for result, value in zip(region.results, region.passed):
                self.made_from[result].add(value)
        elif op in _YIELDS:
            for names in ([] if region.op == "scf.while" else region.results, region.arguments):
                for name, value in zip(names, operands):
                    self.made_from[name].add(value)
        for result in results:
            self.made_from[result] |= set(operands)
        if op == "tt.load":
            self.loads[results[0]] = operands[0]
        elif op in ("tt.store", "tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_store"):
            # "tt.atomic_rmw fadd, acq_rel, gpu, %address, ..."
            self.writes.append((op, operands[0]))
        elif op == "tt.get_program_id":
            self.axes[results[0]] = text.split()[1]

    def _block(self, names: list[str]) -> None:
        """A block's arguments: what scf.condition passes, or anything of what a reduction takes."""
        region = self._open[-1]
        for i, name in enumerate(names):
            passed = region.passed[i : i + 1] if region.op == "scf.while" else region.passed
            self.made_from[name] |= set(passed)

    def sources(self, name: str) -> set[str]:
        """All values that a value is made from, itself too."""
        found, left = {name}, [name]
        while left:
            for other in self.made_from.get(left.pop(), ()):
                if other not in found:
                    found.add(other)
                    left.append(other)
        return found

    def base(self, address: str) -> set[str]:
        """The pointers that an address is formed from, loads of an index left out."""
        found, left, seen = set(), [address], set()
        while left:
            name = left.pop()
            if name in self.pointers:
                found.add(name)
            if name in seen or name in self.loads:
                continue
            seen.add(name)
            left += self.made_from.get(name, ())
        return found


def _results(left: str) -> list[str]:
    name, _, count = left.partition(":")
    if not name:
        return []
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]


def _carried(text: str) -> list[tuple[str, str]]:
    """Pairs of a loop's block argument and what it starts as."""
    inside = re.search(r"(?:iter_args|scf\.while )\((.*?)\) ?(?:->|:)", text)
    return re.findall(r"(%[\w.-]+) = (%[\w.-]+(?:#\d+)?)", inside[1]) if inside else []


def changing(ttir: str) -> list[str]:
    """Pointers that a condition is loaded from and that other programs may write meanwhile."""
    flow = _Flow(ttir)
    decided_by = set().union(*(flow.sources(c) for c in flow.conditions)) & set(flow.loads)
    read = set().union(*(flow.base(flow.loads[name]) for name in decided_by))
    written = {p: op for op, address in flow.writes for p in flow.base(address)}
    addresses = [*flow.loads.values(), *(address for _, address in flow.writes)]
    asked = set(flow.axes.values())
    found = []
    for pointer in sorted(read & set(written)):
        if any(op != "tt.store" and pointer in flow.base(a) for op, a in flow.writes):
            found.append(f"{pointer}: written by atomics")
            continue
        for address in addresses:
            axes = {flow.axes[s] for s in flow.sources(address) if s in flow.axes}
            if pointer in flow.base(address) and not asked <= axes:
                found.append(f"{pointer}: programs {sorted(asked - axes)} share it")
                break
    return found
