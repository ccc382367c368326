"""SAEs trained on real activations, cached: what the "real activations" rows encode with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fastsae

STEPS, BATCH = 400, 2048


def trained_sae(
    f: int, k: int, cache: Path
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Held-out activations, W_enc, b_enc and b_dec of an SAE trained on MiniLM's layer 3."""
    from minilm_activations import load
    from safetensors.torch import load_file, save_file

    train, held_out = load(cache)
    path = cache / f"bench_sae_f{f}_k{k}_{STEPS}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        sae = fastsae.nn.TopKSAE(train.shape[1], f, k)
        with torch.no_grad():
            sae.b_dec.copy_(train[:20_000].median(dim=0).values)
        optimizer = fastsae.optim.FusedAdam(sae.parameters(), lr=1e-3)
        scale = train.var(dim=0).sum()
        order = torch.randperm(len(train))
        for i in range(STEPS):
            batch = order[(i * BATCH) % (len(train) - BATCH) :][:BATCH]
            x = train[batch]
            loss = (sae(x) - x).pow(2).sum(-1).mean() / scale
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 100 == 99:
                print(f"training the SAE to encode with: step {i + 1}, FVU {loss.item():.3f}")
        data = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "b_dec")}
        save_file({n: t.contiguous().clone() for n, t in data.items()}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    data = load_file(path)
    return held_out, data["W_enc"], data["b_enc"], data["b_dec"]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    for latents in (6144, 12288):
        trained_sae(latents, 32, parser.parse_args().cache)
