"""Small random-weight models of the families that steering is tested on, a tokenizer, an SAE."""

from __future__ import annotations

import torch
from common import generator, randn

from fastsae.lm.sites import edited, find_site
from fastsae.nn import TopKSAE
from fastsae.steer import ablate, add, clamp, min_clamp, scale

V, D = 60, 16
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": D, "n_layer": 3, "n_head": 2}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 8}),
    "qwen": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
}
# tested where a batch changes: a window shorter than the text
SLIDING = {
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    ),
}
COMMON = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


def tiny(family: str) -> torch.nn.Module:
    name, config, own = {**FAMILIES, **SLIDING}[family]
    sizes = own if family == "gpt2" else {**COMMON, **own}
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(
        vocab_size=V, bos_token_id=0, eos_token_id=None, pad_token_id=1, **sizes
    )
    model = getattr(transformers, name)(made).eval()
    with torch.no_grad():
        for p in model.parameters():  # larger than usual, so that greedy text is not constant
            if p.dim() > 1:
                p.mul_(6)
    return model


F, LAYER = 40, 1  # of the SAE below
PROGRAMS = [
    [clamp(3, 6.0)],
    None,
    [min_clamp(7, 4.0), scale(9, 0.5), ablate(11), add(12, 2.0)],
]


def topk_sae(k: int = 5) -> TopKSAE:
    sae = TopKSAE(D, F, k, seed=3)
    with torch.no_grad():
        sae.W_enc.copy_(randn(F, D, seed=4) / D**0.5)
        sae.b_dec.copy_(randn(D, seed=5) / 4)
        sae.b_enc.copy_(randn(F, seed=6) / 8)
    return sae.eval()


def prompt(B: int = 3, T: int = 6, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(2, V, (B, T), generator=generator(seed))
    ids[:, 0] = 0
    return ids


class Letters:
    """A tokenizer: a letter is a token, id 0 the BOS."""

    bos_token_id: int | None = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(c) % (V - 2) for c in text]}


def by_definition(model, sae, programs):
    """A hook that edits inside the SAE and keeps the clean error term, position by position."""

    def edit(x):
        f = torch.zeros(*x.shape[:-1], F, dtype=x.dtype)
        values, indices, _ = sae.encode(x)
        f.scatter_(-1, indices.long(), values)
        changed = f.clone()
        for b, program in enumerate(programs):
            for j, rule in program or ():
                changed[b, :, j] = rule(f[b, :, j])
        decode = lambda f: f @ sae.W_dec + sae.b_dec  # noqa: E731
        return x + decode(changed) - decode(f)

    return edited(find_site(model, layer=LAYER)[1], edit)
