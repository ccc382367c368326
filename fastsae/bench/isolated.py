"""The cases measured in processes of their own: what crashes or hangs costs its own row.

On a GPU every (op, backend, design) is a process, verified and timed there beside the bare product:
an illegal access leaves no device to those after it. On a CPU one process measures everything in
interleaved rounds, which a shared machine needs for fair ratios; where it ends, the contender that
ended it is left out and reported, and the others go on in another process (about 3 s each).

    python -m fastsae.bench.isolated JOBS    the child: prints rows, and what it is about to do
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .. import _isolated
from . import run
from .cases import Inputs, Size

Row = dict[str, Any]
LIMIT_S = {"cpu": 900.0, "cuda": 150.0}  # of one step: a verification, or an op's timing


@dataclass(frozen=True)
class Job:
    """An op at a size, by these of its contenders; None: all of them. Alone: these together in a
    process of their own, on a GPU or a CPU."""

    size: Size
    op: str
    names: tuple[str, ...] | None = None
    alone: bool = False


def measured(
    jobs: Sequence[Job],
    plan: run.Plan,
    on_row: Callable[[Row], None],
    *,
    limit_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Measures the jobs; `on_row` gets the rows as they come, the products' once a size.

    Raises:
        RuntimeError: a process ended before it began with any contender.
        OSError: no process can be started here.
    """
    kind = torch.device(plan.device).type
    told: set[tuple[Size, str]] = set()

    def deliver(size: Size, rows: Sequence[Row]) -> None:
        for row in rows:
            key = (size, row["backend"])
            if row["op"] != "product" or key not in told:
                on_row(row)
            if row["op"] == "product":
                told.add(key)

    left = list(jobs)
    if kind == "cuda":
        left = [one for job in left for one in ([job] if job.alone else _apart(job, plan))]
    while left:
        now = left[:1] if kind == "cuda" or left[0].alone else _together(left)
        left = left[len(now) :]
        child = _Child(now, plan)
        why = child.run(limit_s or LIMIT_S[kind], deliver, env)
        if why is not None and not child.unfinished:  # after its rows: they cannot be trusted
            job = now[-1]
            deliver(job.size, [_failed(job, name, why) for name in _names(job, plan)])
        left = [*child.unfinished, *left]
        if why is None or not child.unfinished:
            continue
        if not child.doing:
            raise RuntimeError(f"fastsae bench: a process could not begin: {why}")
        job, *rest = child.unfinished
        names = _names(job, plan)
        again: list[Job] = []
        if child.doing in names:
            failed: tuple[str, ...] = (child.doing,)
            others = tuple(n for n in names if n != child.doing)
            again = [replace(job, names=others)] if others else []
        elif child.doing == "time" and len(names) > 1:  # which of them is not known
            failed, again = (), _apart(job, plan)
        else:  # the device or the product, without which there is nothing to tell
            failed = names
        deliver(job.size, [_failed(job, name, why) for name in failed])
        left = [*again, *rest, *left[len(child.unfinished) :]]


def _names(job: Job, plan: run.Plan) -> tuple[str, ...]:
    return job.names if job.names is not None else tuple(run.names(job.op, job.size, plan))


def _apart(job: Job, plan: run.Plan) -> list[Job]:
    return [replace(job, names=(name,), alone=True) for name in _names(job, plan)]


def _together(jobs: Sequence[Job]) -> list[Job]:
    alone = next((i for i, job in enumerate(jobs) if job.alone), len(jobs))
    return list(jobs[:alone])


def _failed(job: Job, name: str, why: str) -> Row:
    text = " ".join(why.split())
    note = text if len(text) <= 200 else f"{text[:60]} ... {text[-140:]}"
    row = run.row_of(job.op, name, job.size)
    return row | {"verified": False, "note": note, "error": note}


class _Child:
    """One process over some jobs."""

    def __init__(self, jobs: Sequence[Job], plan: run.Plan) -> None:
        self.unfinished = list(jobs)
        self.doing = ""  # the contender that is verified, or "time"
        self._plan = plan

    def run(
        self,
        limit_s: float,
        deliver: Callable[[Size, Sequence[Row]], None],
        env: Mapping[str, str] | None,
    ) -> str | None:
        work = {
            "jobs": [_written(job) for job in self.unfinished],
            "plan": asdict(self._plan),
            "threads": torch.get_num_threads(),
        }
        # on a GPU the rows of a process count when it has ended well
        late = torch.device(self._plan.device).type == "cuda"
        kept: list[tuple[Size, list[Row]]] = []

        def on_row(said: Row) -> None:
            if "doing" in said:
                self.doing = said["doing"]
                return
            job = self.unfinished.pop(0)
            kept.append((job.size, said["rows"]))
            if not late:
                deliver(*kept.pop())

        why = _isolated.rows(__name__, [json.dumps(work)], on_row, limit_s=limit_s, env=env)
        if why is None:
            for size, rows in kept:
                deliver(size, rows)
        return why


def _written(job: Job) -> dict[str, Any]:
    size = asdict(job.size) | {"dtype": str(job.size.dtype).removeprefix("torch.")}
    return {"size": size, "op": job.op, "names": job.names}


def _read(written: dict[str, Any]) -> Job:
    size = Size(**written["size"] | {"dtype": getattr(torch, written["size"]["dtype"])})
    return Job(size, written["op"], None if written["names"] is None else tuple(written["names"]))


def main(argument: str) -> None:
    """The child: does the jobs in order, one JSON object a line."""
    work = json.loads(argument)
    torch.set_num_threads(work["threads"])
    plan = run.Plan(**work["plan"])

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)

    clock = None
    given: Inputs | None = None
    for job in map(_read, work["jobs"]):
        if clock is None:
            say({"doing": "the device"})
            clock = plan.clock()
        if given is None or given.size != job.size:
            given = Inputs(job.size)
        rows = run.one(
            job.op, job.size, given, plan, clock, job.names, lambda what: say({"doing": what})
        )
        say({"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1])
