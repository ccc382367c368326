"""Trains a TopK SAE on the small language model that ships with fastsae: seconds on a CPU.

python examples/train_topk_sae.py [FOLDER]      the SAE is saved there (default: my-sae)
"""

import sys
from itertools import islice

import torch

from fastsae.lm.harvest import Store, collect, windows_of
from fastsae.lm.load import Subject, load_subject
from fastsae.lm.text import stdlib_documents
from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam
from fastsae.train.evaluate import reconstruction
from fastsae.train.trainer import shuffled


def harvest(subject: Subject, split: str, tokens: int) -> Store:
    """What the model's middle block puts out for text of Python's standard library."""
    documents = stdlib_documents(split, include_tests=False)
    windows = windows_of(documents, subject.tokenizer, 128, tokens // 127, per_document=4)
    return collect(subject.model, subject.module, windows)


def train(activations: torch.Tensor, steps: int = 150) -> TopKSAE:
    """The README's loop."""
    sae = TopKSAE(d_in=activations.shape[1], d_sae=1024, k=16, seed=0)
    sae.initialize_from_data(activations, seed=0)
    opt = FusedAdam(sae.parameters(), lr=1e-3)
    for step, x in enumerate(islice(shuffled(activations, 512), steps)):
        loss = sae.loss(x).total  # FVU and AuxK
        loss.backward()  # records the factors of the weight gradients
        opt.step()  # consumes them, in one pass over the weights
        opt.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    return sae.eval()


def main(folder: str = "my-sae") -> None:
    subject = load_subject()  # load_subject("gpt2"), say, for a model from the hub
    sae = train(harvest(subject, "train", 40_000).activations)
    held_out = harvest(subject, "heldout", 10_000).activations
    found = reconstruction(sae, held_out.split(4096))
    print(f"held out: FVU {found.fvu:.3f}, {found.l0:.0f} latents a token")
    sae.save_pretrained(folder)
    print(f"saved in {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
