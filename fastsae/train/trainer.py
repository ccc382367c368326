"""A plain training loop for sparse coders: schedule, metrics, resumable checkpoints."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from .._capture import is_capturing
from .._config import make_plain, plain_numbers
from .._errors import not_a_tensor
from .._files import write_atomic
from .._waits import Waits, told
from ..nn import SparseCoder, fvu
from ..optim import FusedAdam
from ..reference.moments import FORMATS
from .ahead import DeadBound, prefetched, rounded

_FORMAT, _VERSION = "fastsae.Trainer", 1


@dataclass(frozen=True)
class TrainConfig:
    """What a run is, apart from its data and the coder, whose own config holds its loss.

    benchmarks/notes/quality.md justifies the defaults.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 50  # steps from zero to lr
    decay: float = 0.5  # share of the steps, at the end, over which lr falls linearly to zero
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lazy: bool = False
    log_every: int = 50
    moments: str = "fp32"  # how FusedAdam stores them: fp32, bf16 or 8bit

    def __post_init__(self) -> None:
        make_plain(self)
        for name, ok in (
            ("steps", self.steps >= 1),
            ("lr", self.lr > 0),
            ("warmup", self.warmup >= 0),
            ("decay", 0 <= self.decay <= 1),
            ("log_every", self.log_every >= 1),
            ("moments", self.moments in FORMATS),
        ):
            if not ok:
                raise ValueError(f"TrainConfig: {name} is out of range, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        falling = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return self.lr * min(rise, fall)


@dataclass(frozen=True)
class Metrics:
    """Averages since the previous record."""

    step: int  # steps done
    tokens: int
    loss: float  # the total
    fvu: float  # of the training batches
    l0: float  # latents per token that fire
    dead_fraction: float  # of latents, by the coder's `dead_after`
    tokens_per_s: float
    lr: float
    waited: float = 0.0  # share of the time in which threads waited for a core: a busy machine


class Trainer:
    """Trains one coder (one in bf16 or fp16 by fp32 masters) to minimise its `loss`.

        trainer = Trainer(sae, TrainConfig(steps=1500))
        trainer.fit(shuffled(activations, 2048, seed=0), progress=True)

    Args:
        sae: any `SparseCoder`.
        config: the run.
        optimizer: `FusedAdam` with the config's settings when None. Its lr is set every step.
    """

    def __init__(
        self,
        sae: SparseCoder,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.sae, self.config = sae, config
        self.optimizer = optimizer or FusedAdam(
            sae.parameters(),
            config.lr,
            config.betas,
            config.eps,
            lazy=config.lazy,
            moments=config.moments,
            master_weights=True,  # for an SAE in 16 bits, whose small updates would round away
        )
        self._project = optimizer is not None and not isinstance(optimizer, FusedAdam)
        self.step_count = 0
        self.tokens = 0
        self._dead = DeadBound(sae.config.dead_after)

    def set_rate(self) -> None:
        """The learning rate of step `step_count`, for the optimizer; in place where it is a tensor,
        which a captured step reads."""
        rate = self.config.lr_at(self.step_count)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step on a batch [..., D]; returns loss, fvu and l0 as scalar tensors.

        A CUDA graph can hold it, of a capturable optimizer. What the host counts does not move in a
        replay: after each, add to `step_count` and `tokens`, and call `set_rate` before the next.
        """
        captured = is_capturing(x.device)
        if not captured:
            self.set_rate()  # captured, it would stay that of this step
        n = x.shape[:-1].numel()
        loss = self.sae.loss(x, most_dead=self._most_dead(x, n))
        loss.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._project and self.sae.config.normalize_decoder:
            self.sae.normalize_decoder_()
        if not captured:  # then nothing has run yet
            self.step_count += 1
            self.tokens += n
        l0 = (loss.code.values.detach() != 0).sum().float() / max(n, 1)
        error = loss.terms.get("fvu")
        if error is None:
            error = fvu(x, loss.reconstruction.detach())
        return loss.total.detach(), error.detach(), l0

    def _most_dead(self, x: torch.Tensor, n: int) -> int | None:
        """A bound, so that nothing waits for a GPU to count them. Lazy steps need the count."""
        if x.device.type != "cuda" or self.config.lazy:
            return None
        return self._bound(n)

    def _bound(self, n: int) -> int:
        d_sae = self.sae.d_sae
        if is_capturing(self.sae.W_dec.device):
            return d_sae  # a replay must hold for any number
        # the batch that comes counts as seen, and as having fired nothing: a bound all the same
        bound = self._dead.update(self.sae.tokens_since_fired() + n, self.tokens + n, n)
        return rounded(bound, d_sae)

    def fit(
        self,
        batches: Iterable[torch.Tensor],
        *,
        progress: bool = False,
        on_log: Callable[[Metrics], None] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1000,
        not_finite: str = "raise",
    ) -> list[Metrics]:
        """Runs until `config.steps` steps are done or the batches end.

        Args:
            batches: activations [..., D]. After `load`, start them at `step_count`. Those on the
                CPU reach a GPU through pinned memory, each while the one before it is trained on.
            progress: a tqdm bar.
            on_log: called with every record, each `config.log_every` steps and at the end.
            checkpoint: written every `checkpoint_every` steps and at the end, see `save`.
            not_finite: what happens to a batch with NaN or an infinity: "raise", "skip" (a step
                in which nothing is learned, with a warning) or "ignore" (nobody looks).

        Returns:
            The records.

        Raises:
            ValueError: such a batch, by its number counted from 0; the weights are then as the
                batch before it left them. Or the loss itself is not finite, which is seen at a
                record; the last checkpoint is of before.

        Warns:
            UserWarning: the batches ended before `config.steps` steps were done; one was skipped.
        """
        if not_finite not in ("raise", "skip", "ignore"):
            raise ValueError(
                f"Trainer.fit: not_finite must be raise, skip or ignore, got {not_finite!r}"
            )
        self.sae.train()
        config = self.config
        device = self.sae.W_dec.device
        records: list[Metrics] = []
        sums: list[torch.Tensor] = []
        start, tokens, waits = time.perf_counter(), self.tokens, Waits()
        bar = _bar(config.steps, self.step_count) if progress else None
        saved, first = -1, self.step_count
        wanted = islice(batches, max(0, config.steps - self.step_count))
        taken = 0

        def refuse() -> None:
            message = f"Trainer.fit: batch {first + taken} holds NaN or an infinity"
            if not_finite == "raise":
                raise ValueError(f"{message}; the weights are as the one before left them")
            warnings.warn(f"{message} and is skipped", stacklevel=4)

        look = None if not_finite == "ignore" else refuse
        for x in prefetched(wanted, device, refuse=look):
            taken += 1
            if x is None:
                self.step_count += 1
            else:
                sums.append(torch.stack(self.step(x)))
            last = self.step_count == config.steps
            if sums and (self.step_count % config.log_every == 0 or last):
                records.append(self._record(sums, tokens, start, waits.share()))
                start, tokens, waits = time.perf_counter(), self.tokens, Waits()
                sums.clear()
                if not_finite != "ignore" and not math.isfinite(records[-1].loss):
                    raise self._diverged()
                if on_log is not None:
                    on_log(records[-1])
                if bar is not None:
                    r = records[-1]
                    busy = f" ({told(r.waited)})" if told(r.waited) else ""
                    bar.set_postfix_str(
                        f"fvu {r.fvu:.4f}, dead {r.dead_fraction:.1%}, "
                        f"{r.tokens_per_s:,.0f} tok/s{busy}"
                    )
            if bar is not None:
                bar.update()
            if checkpoint is not None and (self.step_count % checkpoint_every == 0 or last):
                if sums and not_finite != "ignore" and not sums[-1].isfinite().all():
                    raise self._diverged()
                self.save(checkpoint)
                saved = self.step_count
        if self.step_count < config.steps:
            warnings.warn(
                f"Trainer.fit: the batches ended after {self.step_count} of {config.steps} steps",
                stacklevel=2,
            )
        if checkpoint is not None and saved != self.step_count:
            self.save(checkpoint)  # also where there was nothing to do
        if sums:
            records.append(self._record(sums, tokens, start, waits.share()))
            if on_log is not None:
                on_log(records[-1])
        if bar is not None:
            bar.close()
        return records

    def _diverged(self) -> ValueError:
        return ValueError(
            f"Trainer.fit: the loss is not finite any more at step {self.step_count}: the run has "
            "diverged (a lower lr?), and this state is not saved"
        )

    def _record(
        self, sums: list[torch.Tensor], tokens: int, start: float, waited: float
    ) -> Metrics:
        loss, error, l0 = torch.stack(sums).float().mean(0).tolist()
        dead = self.sae.dead_latents().numel() / self.sae.d_sae
        rate = (self.tokens - tokens) / max(time.perf_counter() - start, 1e-9)
        lr = self.config.lr_at(self.step_count - 1)
        return Metrics(self.step_count, self.tokens, loss, error, l0, dead, rate, lr, waited)

    # -- checkpoints --------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes parameters, dead-latent buffers, optimizer state and position, atomically."""
        state = {
            "format": _FORMAT,
            "format_version": _VERSION,
            "config": asdict(self.config),
            "sae_config": self._sae_config(),
            "optimizer_class": self._optimizer_name(),
            "step_count": self.step_count,
            "tokens": self.tokens,
            "sae": self.sae.state_dict(),
            "optimizer": plain_numbers(self.optimizer.state_dict()),
        }
        write_atomic(Path(path), lambda p: torch.save(state, p))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continues where `save` was called; the run is then the same as without interruption.

        A config with other `steps` makes the run longer or shorter: the learning rate goes on by
        the schedule of those.

        Raises:
            FileNotFoundError: no such file.
            ValueError: truncated, foreign, of a newer version, or of another config or shape.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such checkpoint")
        device = self.sae.W_dec.device
        try:
            # weights_only: a checkpoint is data, loading it runs no code
            state: Any = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            raise ValueError(f"{path}: truncated or not a checkpoint: {error}") from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a {_FORMAT} checkpoint")
        if state.get("format_version") != _VERSION:
            raise ValueError(
                f"{path}: format_version is {state.get('format_version')!r}, this fastsae reads "
                f"{_VERSION}"
            )
        lacks = {"config", "sae_config", "optimizer_class", "optimizer", "sae"} - set(state)
        if lacks:
            raise ValueError(f"{path}: it lacks {', '.join(sorted(lacks))}")
        # fields that are newer than the file had their default then
        here = {**asdict(self.config), **self._sae_config(), "optimizer": self._optimizer_name()}
        saved = here | asdict(TrainConfig(1)) | state["config"] | state["sae_config"]
        saved["optimizer"] = state["optimizer_class"]
        saved["betas"] = tuple(saved["betas"])
        free = ("log_every", "steps")
        differ = [k for k in here if saved.get(k) != here[k] and k not in free]
        if differ:
            pairs = ", ".join(f"{k} {saved.get(k)!r} (here {here[k]!r})" for k in differ)
            raise ValueError(f"{path}: saved by a run with {pairs}")
        sizes = [
            [len(group["params"]) for group in groups]
            for groups in (state["optimizer"]["param_groups"], self.optimizer.param_groups)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{path}: its optimizer has parameter groups of {sizes[0]} tensors, this one of "
                f"{sizes[1]} (are weights tied in one of them?)"
            )
        for theirs, ours in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups):
            # the learning rate is the schedule's
            asked = {k: v for k, v in plain_numbers(ours).items() if k not in ("params", "lr")}
            plain = [k for k, v in asked.items() if not isinstance(v, torch.Tensor)]
            other = [k for k in plain if k in theirs and theirs[k] != asked[k]]
            if other:
                pairs = ", ".join(f"{k}={theirs[k]!r} (here {asked[k]!r})" for k in other)
                raise ValueError(f"{path}: saved by a run with an optimizer of {pairs}")
        try:
            self.sae.load_state_dict(state["sae"])
        except RuntimeError as error:
            raise ValueError(f"{path}: {error}") from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_count, self.tokens = state["step_count"], state["tokens"]
        self._dead = DeadBound(self.sae.config.dead_after)

    def _optimizer_name(self) -> str:
        return type(self.optimizer).__name__

    def _sae_config(self) -> dict[str, Any]:
        return {"architecture": self.sae.config.architecture, **asdict(self.sae.config)}


def train_sae(
    sae: SparseCoder,
    data: torch.Tensor | Iterable[torch.Tensor],
    *,
    batch_size: int = 2048,
    seed: int = 0,
    initialize: bool = True,
    progress: bool = False,
    not_finite: str = "raise",
    **config: Any,
) -> list[Metrics]:
    """Initialises `sae` from the data and trains it; returns the records.

    Args:
        data: activations [N, D], drawn in shuffled epochs, or an iterable of batches (then without
            initialisation, batch_size and seed).
        initialize: call `sae.initialize_from_data` first.
        not_finite: see `Trainer.fit`.
        **config: fields of `TrainConfig`; `steps` is one pass over the data when not given.
    """
    if type(data).__module__ == "numpy":
        raise TypeError(f"train_sae: data: {not_a_tensor(data)}")
    if isinstance(data, torch.Tensor):
        config.setdefault("steps", max(1, data.shape[0] // batch_size))
        if initialize:
            sae.initialize_from_data(data, seed=seed)
        batches: Iterable[torch.Tensor] = shuffled(data, batch_size, seed=seed)
    else:
        batches = data
    return Trainer(sae, TrainConfig(**config)).fit(
        batches, progress=progress, not_finite=not_finite
    )


def shuffled(
    data: torch.Tensor, batch_size: int, *, seed: int = 0, start: int = 0
) -> Iterator[torch.Tensor]:
    """Endless batches [batch_size, D] of data [N, D], every epoch in a new order.

    The order depends on the seed only; `start` skips that many batches without reading them. An
    epoch's last, incomplete batch is dropped.
    """
    per_epoch = data.shape[0] // batch_size
    if per_epoch == 0:
        raise ValueError(f"shuffled: {data.shape[0]} rows do not fill a batch of {batch_size}")
    epoch, at = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(data.shape[0], generator=generator)
        for i in range(at, per_epoch):
            yield data[order[i * batch_size : (i + 1) * batch_size].to(data.device)]
        epoch, at = epoch + 1, 0


def _bar(total: int, done: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("fit(progress=True) needs tqdm: pip install tqdm") from error
    return tqdm(total=total, initial=done, unit="step")
