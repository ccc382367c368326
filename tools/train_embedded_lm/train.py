"""Train the embedded language model and write it as a transformers model directory.

The schedule runs on the clock: `--minutes` is a budget that always ends with a learning rate of
zero, however busy the machine is. `--steps` in its place makes a run that repeats exactly.
See README.md beside this file for the command that made the shipped weights.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import torch
from corpus import (
    PackedStream,
    batch,
    encode,
    held_out_windows,
    load_or_train_tokenizer,
    read_documents,
)
from export import export
from model import GPT2
from muon import Muon
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="the model directory to write")
    p.add_argument("--work", type=Path, required=True, help="checkpoints, tokenizer, log")
    p.add_argument("--minutes", type=float, help="length of the run on the clock")
    p.add_argument("--steps", type=int, help="length of the run in steps (repeatable)")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--width", type=int, default=256, help="a multiple of 64, one head each")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--library-share", type=float, default=0.5, help="windows not from tests")
    p.add_argument("--lr-muon", type=float, default=0.02)
    p.add_argument("--lr-adam", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=50)
    p.add_argument("--ema-steps", type=float, default=150, help="time constant of the average")
    p.add_argument("--eval-every", type=float, default=300, help="seconds")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--resume",
        type=float,
        metavar="FRACTION",
        help="go on from the checkpoint in --work, the schedule at this fraction of its length; "
        "with --minutes, they are for the rest",
    )
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = p.parse_args()
    if (args.minutes is None) == (args.steps is None):
        p.error("give one of --minutes and --steps")
    return args


class Average:
    """Exponential moving average of the weights, shorter while training is young."""

    def __init__(self, model: GPT2, steps: float):
        self.steps = steps
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: GPT2, step: int) -> None:
        weight = 1 / min(self.steps, 1 + step / 10)
        for name, value in model.state_dict().items():
            self.weights[name].lerp_(value, weight)


class Log:
    """The loss curve, one row an evaluation."""

    def __init__(self, path: Path, append: bool):
        self.file = path.open("a" if append else "w", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        if not append:
            self.row("step", "tokens", "seconds", "lr_scale", "train_nats", "probe_bits_per_byte")

    def row(self, *values: object) -> None:
        self.writer.writerow(values)
        self.file.flush()


@torch.no_grad()
def held_out_loss(
    model: GPT2, documents: list, n_bytes: int, context: int, autocast: torch.autocast
) -> dict[str, float]:
    """Nats a token and bits a byte, every token scored once in windows that do not overlap."""
    nats, count = 0.0, 0
    for document in documents:
        for window, first in held_out_windows(document, context, context):
            tokens = torch.from_numpy(window)[None]
            with autocast:
                losses = model(tokens[:, :-1], tokens[:, 1:])
            nats += losses[first:].double().sum().item()
            count += len(losses) - first
    return {"nats_per_token": nats / count, "bits_per_byte": nats / math.log(2) / n_bytes}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    train, held_out = read_documents("train"), read_documents("heldout")
    tokenizer = load_or_train_tokenizer(args.work / "tokenizer.json", train, args.vocab)
    ids = encode(tokenizer, train.texts)
    split = {
        flag: [d for d, test in zip(ids, train.tests, strict=True) if test == flag]
        for flag in (False, True)
    }
    n_library = round(args.batch * args.library_share)
    # While training, every eighth of the held-out documents; the report has all of them.
    probe_texts = held_out.texts[::8]
    probe = encode(tokenizer, probe_texts)
    probe_bytes = sum(len(t.encode()) for t in probe_texts)

    model = GPT2(args.vocab, args.context, args.layers, args.width, args.width // 64)
    named = dict(model.named_parameters())
    hidden = {n for n, p in named.items() if p.ndim == 2 and n.startswith("h.")}
    muon = Muon([(named[n], 3 if "c_attn" in n else 1) for n in sorted(hidden)])
    adam = torch.optim.AdamW(
        [p for n, p in named.items() if n not in hidden],
        lr=args.lr_adam,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    average = Average(model, args.ema_steps)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)

    step, tokens_seen, before, done_before = 0, 0, 0.0, 0.0
    if args.resume is not None:
        saved = torch.load(args.work / "checkpoint.pt")
        model.load_state_dict(saved["weights"])
        average.weights = saved["average"]
        muon.buffers = saved["muon"]
        adam.load_state_dict(saved["adam"])
        step, tokens_seen = saved["step"], saved["tokens_seen"]
        before, done_before = saved["seconds"], args.resume
    first_step = step
    # A run that goes on takes the documents in a new order.
    library = PackedStream(split[False], args.context, args.seed + 2 * step)
    tests = PackedStream(split[True], args.context, args.seed + 2 * step + 1)
    log = Log(args.work / "loss.csv", append=args.resume is not None)
    start = last_eval = time.monotonic()
    recent, done = [], done_before
    bar = tqdm(total=100, unit="%", mininterval=10, bar_format="{l_bar}{bar}{postfix}")
    while done < 1:
        seconds = time.monotonic() - start
        if args.steps:
            done = (step + 1) / args.steps
        else:
            done = done_before + (1 - done_before) * seconds / (60 * args.minutes)
        scale = min(1.0, (step - first_step + 1) / args.warmup) * max(0.0, 1 - done)
        tokens, targets = batch(library.take(n_library) + tests.take(args.batch - n_library))
        with autocast:
            loss = model(tokens, targets).mean()
        loss.backward()
        muon.step(args.lr_muon * scale)
        adam.param_groups[0]["lr"] = args.lr_adam * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        average.update(model, step)
        step += 1
        tokens_seen += args.batch * args.context
        recent.append(loss.item())
        if step % 20 == 0:
            bar.n = round(100 * min(done, 1.0), 1)
            bar.set_postfix_str(f"step {step} loss {sum(recent[-100:]) / len(recent[-100:]):.3f}")
            bar.refresh()
        if time.monotonic() - last_eval > args.eval_every or done >= 1:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.weights)
            bits = held_out_loss(model, probe, probe_bytes, args.context, autocast)["bits_per_byte"]
            model.load_state_dict(raw)
            seconds = before + time.monotonic() - start
            checkpoint = {
                "step": step,
                "tokens_seen": tokens_seen,
                "seconds": seconds,
                "weights": raw,
                "average": average.weights,
                "muon": muon.buffers,
                "adam": adam.state_dict(),
            }
            torch.save(checkpoint, args.work / "checkpoint.tmp")
            (args.work / "checkpoint.tmp").replace(args.work / "checkpoint.pt")
            run = {
                "tokens_seen": tokens_seen,
                "steps": step,
                "seconds": round(seconds),
                "epochs_library": round(tokens_seen * args.library_share / library.n_tokens, 2),
                "epochs_tests": round(tokens_seen * (1 - args.library_share) / tests.n_tokens, 2),
                "train_tokens": library.n_tokens + tests.n_tokens,
                "train_bytes": train.n_bytes,
            }
            (args.work / "run.json").write_text(json.dumps(run, indent=2) + "\n")
            nats = sum(recent) / len(recent)
            log.row(step, tokens_seen, round(seconds), f"{scale:.4f}", f"{nats:.4f}", f"{bits:.4f}")
            bar.write(f"step {step}: train {nats:.3f} nats, held-out probe {bits:.4f} bits/byte")
            recent, last_eval = [], time.monotonic()

    export(args.work, args.out)


if __name__ == "__main__":
    main()
