"""Turns one latent of an SAE up while a language model writes: seconds on a CPU.

python examples/steer_a_model.py [WORD]      a latent that makes it likelier (default: import)
"""

import sys

import torch
from train_topk_sae import harvest, train

from fastsae.lm.load import load_subject
from fastsae.lm.readout import logit_effect
from fastsae.lm.tokens import encoded
from fastsae.steer import attach, clamp


def main(word: str = "import") -> None:
    subject = load_subject()
    model, tokenizer = subject.model, subject.tokenizer
    activations = harvest(subject, "train", 40_000).activations
    sae = train(activations)  # or TopKSAE.from_pretrained("quickstart/sae")

    token = tokenizer(word, add_special_tokens=False)["input_ids"][0]
    latent = int(logit_effect(model, sae.W_dec)[:, token].argmax())
    with torch.no_grad():
        code = sae.encode(activations)
    most = float(code.values[code.indices == latent].max())
    print(f"latent {latent} promotes {word!r} most; it reaches {most:.1f}")

    steerer = attach(model, sae, hook=subject.site)
    prompt = torch.tensor([encoded(tokenizer, "def main(")])
    programs = [None, [clamp(latent, 2 * most)]]  # one for each sequence of the batch
    torch.manual_seed(0)
    with steerer.steer(programs):
        out = model.generate(prompt.repeat(2, 1), max_new_tokens=60, do_sample=True, pad_token_id=0)
    for name, row in zip(("before", "after"), out):
        text = tokenizer.decode(row, skip_special_tokens=True)
        print(f"--- {name}: {text.count(word)} times {word!r}\n{text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
