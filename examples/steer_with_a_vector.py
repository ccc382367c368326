"""Steers without an SAE, by a direction from two sets of prompts: seconds on a CPU.

python examples/steer_with_a_vector.py
"""

import torch

from fastsae.lm.load import load_subject
from fastsae.lm.tokens import encoded
from fastsae.steer import add_vector, attach, difference_of_means, prompt_activations

ERRORS = ["    raise ValueError", "        raise TypeError", "    raise KeyError", "raise OSError"]
OTHERS = ["    return result", "        return None", "    yield value", "return other"]


def main() -> None:
    subject = load_subject()
    model, tokenizer = subject.model, subject.tokenizer
    errors, others = (
        prompt_activations(model, tokenizer, texts, hook=subject.site, position="mean")
        for texts in (ERRORS, OTHERS)
    )
    v = difference_of_means(errors, others)

    ids = encoded(tokenizer, "def check(value):\n    if not isinstance(value, str):")
    programs = {"unsteered": None, "added": [add_vector(v)], "taken off": [add_vector(v, -1.0)]}
    n = 16  # texts of each, all in one batch
    torch.manual_seed(0)
    with attach(model, hook=subject.site).steer([p for p in programs.values() for _ in range(n)]):
        prompts = torch.tensor([ids]).repeat(3 * n, 1)
        out = model.generate(prompts, max_new_tokens=30, do_sample=True, pad_token_id=0)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    for i, name in enumerate(programs):
        own = texts[i * n : (i + 1) * n]
        print(f"--- {name}: 'raise' in {sum('raise' in t for t in own)} of {n} texts\n{own[0]}")


if __name__ == "__main__":
    main()
