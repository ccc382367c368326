"""Train the embedded language model and write it as a transformers model directory.

The learning rate is constant after the warm-up and falls to zero over the last `--cooldown` of
`--steps`. A run that was stopped goes on from the last checkpoint in --work when it is started
again, and sees what it would have seen; until it cools down it can be given more steps.
See README.md beside this file for the commands that made the shipped weights.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import torch
from corpus import PackedStream, batch, encode, held_out_windows, load_or_train_tokenizer
from export import export
from model import GPT2
from muon import Muon
from sources import read_documents
from tqdm import tqdm


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--work", type=Path, required=True, help="documents, tokenizer, checkpoints")
    p.add_argument("--out", type=Path, help="the model directory to write at the end")
    p.add_argument("--steps", type=int, required=True, help="length of the whole run")
    p.add_argument("--cooldown", type=float, default=0.25, help="last part, lr falling to zero")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--width", type=int, default=320, help="a multiple of 64, one head each")
    p.add_argument("--batch", type=int, default=16, help="windows a step")
    p.add_argument("--lr-muon", type=float, default=0.02)
    p.add_argument("--lr-adam", type=float, default=3e-3)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--ema-steps", type=float, default=100, help="time constant of the average")
    p.add_argument("--save-every", type=float, default=300, help="seconds")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return p.parse_args()


def rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Of the full learning rate, at a step counted from 0."""
    left = (steps - step) / max(1.0, cooldown * steps)
    return min(1.0, (step + 1) / warmup, left)


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

    train = list(read_documents(args.work, "train").values())
    tokenizer = load_or_train_tokenizer(args.work / "tokenizer.json", train, args.vocab)
    ids_file = args.work / "ids.pt"  # a minute's work
    ids = torch.load(ids_file, weights_only=False) if ids_file.exists() else None
    if ids is None:
        ids = encode(tokenizer, train)
        torch.save(ids, ids_file)
    # While training, every twelfth of the held-out documents; the report has all of them.
    probe_texts = list(read_documents(args.work, "heldout").values())[::12]
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

    step, before = 0, 0.0
    saved_at = args.work / "checkpoint.pt"
    if saved_at.exists():
        saved = torch.load(saved_at)
        model.load_state_dict(saved["weights"])
        average.weights = saved["average"]
        muon.buffers = saved["muon"]
        adam.load_state_dict(saved["adam"])
        step, before = saved["step"], saved["seconds"]
    stream = PackedStream(ids, args.context, args.seed, taken=step * args.batch)
    log = Log(args.work / "loss.csv", append=saved_at.exists())
    start = last_save = time.monotonic()
    recent: list[float] = []
    bar = tqdm(total=args.steps, initial=step, unit="step", mininterval=30, dynamic_ncols=True)
    while step < args.steps:
        scale = rate(step, args.steps, args.warmup, args.cooldown)
        tokens, targets = batch(stream.take(args.batch))
        with autocast:
            loss = model(tokens, targets).mean()
        loss.backward()
        muon.step(args.lr_muon * scale)
        adam.param_groups[0]["lr"] = args.lr_adam * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        average.update(model, step)
        step += 1
        recent.append(loss.item())
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {sum(recent[-100:]) / len(recent[-100:]):.3f}", False)
        if time.monotonic() - last_save > args.save_every or step == args.steps:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.weights)
            bits = held_out_loss(model, probe, probe_bytes, args.context, autocast)["bits_per_byte"]
            model.load_state_dict(raw)
            seconds = before + time.monotonic() - start
            checkpoint = {
                "step": step, "seconds": seconds, "weights": raw, "average": average.weights,
                "muon": muon.buffers, "adam": adam.state_dict(),
            }  # fmt: skip
            torch.save(checkpoint, args.work / "checkpoint.tmp")
            (args.work / "checkpoint.tmp").replace(saved_at)
            tokens_seen = step * args.batch * args.context
            run = {
                "tokens_seen": tokens_seen,
                "steps": step,
                "seconds": round(seconds),
                "epochs": round(tokens_seen / stream.n_tokens, 2),
                "train_tokens": stream.n_tokens,
                "train_bytes": sum(len(t.encode()) for t in train),
            }
            (args.work / "run.json").write_text(json.dumps(run, indent=2) + "\n")
            nats = sum(recent) / len(recent)
            log.row(step, tokens_seen, round(seconds), f"{scale:.4f}", f"{nats:.4f}", f"{bits:.4f}")
            bar.write(f"step {step}: train {nats:.3f} nats, held-out probe {bits:.4f} bits/byte")
            recent, last_save = [], time.monotonic()
    if args.out is not None:
        export(args.work, args.out)


if __name__ == "__main__":
    main()
