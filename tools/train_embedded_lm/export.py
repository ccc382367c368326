"""Write a checkpoint as a transformers model directory in fp16, measure it, write its card.

python tools/train_embedded_lm/export.py --work WORK --out fastsae/assets/docs_lm
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from corpus import END_OF_TEXT
from evaluate import compare, held_out
from safetensors.torch import save_file
from sources import HELD_OUT, read_documents, sources
from tokenizers import Tokenizer

# Beginnings that the card shows continued, greedily: a test counts how often they repeat.
PROMPTS = [
    "The easiest way to plot a histogram is",
    "Dates and times are parsed by",
    "To read a file line by line,",
    "If the matrix is singular,",
    "A connection to the database is opened with",
    "The random number generator",
    "When an exception is raised inside",
    "The shortest path between two nodes",
    "Each column of the table holds",
    "To send a request to the server,",
]


def write_model(weights: dict[str, torch.Tensor], tokenizer_file: Path, out: Path) -> None:
    """`weights` under GPT-2's names; heads and layers follow from the shapes."""
    out.mkdir(parents=True, exist_ok=True)
    vocab, width = weights["wte.weight"].shape
    context = weights["wpe.weight"].shape[0]
    end = Tokenizer.from_file(str(tokenizer_file)).token_to_id(END_OF_TEXT)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_positions": context,
        "n_embd": width,
        "n_layer": 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("h.")),
        "n_head": width // 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        # stored in fp16, computed in fp32: fp16 is slow on a CPU
        "dtype": "float32",
    }
    generation = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 0.95,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in [
        ("config", config),
        ("generation_config", generation),
        ("tokenizer_config", tokenizer),
    ]:
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer_file.resolve() != (out / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer_file, out / "tokenizer.json")
    half = {f"transformer.{n}": w.half().contiguous() for n, w in sorted(weights.items())}
    save_file(half, out / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def samples(out: Path) -> list[tuple[str, str]]:
    """Prompt and greedy continuation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(END_OF_TEXT + prompt, return_tensors="pt")["input_ids"]
        new = model.generate(tokens, max_new_tokens=80, do_sample=False)[0, tokens.shape[1] :]
        texts.append((prompt, tokenizer.decode(new, skip_special_tokens=True)))
    return texts


def card(report: dict, examples: list[tuple[str, str]]) -> str:
    """README.md of the model directory, from its report."""
    template = (Path(__file__).parent / "card.md").read_text()
    shown = "\n\n".join(f"```\n{prompt}{text}\n```" for prompt, text in examples)
    run, loss = report["run"], report["held_out"]
    rows = [f"| {s.name} | {s.version} | {s.licence} |" for s in sources()]
    return template.format(
        samples=shown,
        projects=", ".join(sorted(HELD_OUT)),
        sources="\n".join(rows),
        count=len(rows),
        parameters=f"{report['parameters'] / 1e6:.2f}",
        vocabulary=report["vocabulary"],
        layers=report["layers"],
        width=report["width"],
        context=report["context"],
        size=f"{report['bytes'] / 1e6:.2f}",
        tokens_seen=f"{run['tokens_seen'] / 1e6:.1f}",
        train_tokens=f"{run['train_tokens'] / 1e6:.2f}",
        train_bytes=f"{run['train_bytes'] / 1e6:.1f}",
        steps=run["steps"],
        hours=f"{run['seconds'] / 3600:.1f}",
        epochs=run["epochs"],
        **{f"{part}_bits": f"{loss[part]['bits_per_byte']:.3f}" for part in loss},
        **{f"{part}_nats": f"{loss[part]['nats_per_token']:.3f}" for part in loss},
    )


def export(work: Path, out: Path) -> dict:
    """Write `out` from the averaged weights of `work/checkpoint.pt`; return the report."""
    weights = torch.load(work / "checkpoint.pt")["average"]
    write_model(weights, work / "tokenizer.json", out)
    documents = read_documents(work, "heldout")
    ours, theirs = compare(out, max(documents.values(), key=len))
    if abs(ours - theirs) > 0.003:
        raise RuntimeError(f"export: {ours} nats per token here, {theirs} in transformers")
    of_project = {name: name.partition("/")[0] in HELD_OUT for name in documents}
    loss = {
        part: held_out(out, [text for name, text in documents.items() if of_project[name] == flag])
        for part, flag in (("projects", True), ("documents", False))
    }
    counts = {key: sum(loss[part][key] for part in loss) for key in ("tokens", "bytes")}
    nats = sum(loss[part]["nats_per_token"] * loss[part]["tokens"] for part in loss)
    bits = sum(loss[part]["bits_per_byte"] * loss[part]["bytes"] for part in loss)
    loss["all"] = {
        "bits_per_byte": round(bits / counts["bytes"], 4),
        "nats_per_token": round(nats / counts["tokens"], 4),
        **counts,
    }
    report = {
        "held_out": loss,
        "nats_here_and_in_transformers_fp32": [round(ours, 5), round(theirs, 5)],
        "run": json.loads((work / "run.json").read_text()),
        "torch": torch.__version__,
        "parameters": sum(w.numel() for w in weights.values()),
        "vocabulary": weights["wte.weight"].shape[0],
        "layers": json.loads((out / "config.json").read_text())["n_layer"],
        "width": weights["wte.weight"].shape[1],
        "context": weights["wpe.weight"].shape[0],
        "bytes": sum(f.stat().st_size for f in out.iterdir()),
    }
    (out / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "README.md").write_text(card(report, samples(out)))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = export(arguments.work, arguments.out)
    print(json.dumps(result["held_out"], indent=2))
