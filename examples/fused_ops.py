"""The kernels in a module of your own: a transcoder whose gradients are those of dense PyTorch.

python examples/fused_ops.py
"""

import torch
from torch import nn

from fastsae import ops


class Transcoder(nn.Module):
    """Reads one site of a model and writes another, by the k best of F latents."""

    def __init__(self, d_in: int, d_out: int, n_latents: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(torch.randn(n_latents, d_in) / d_in**0.5)  # [F, D]
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(torch.randn(n_latents, d_out) / d_out**0.5)  # [F, D]
        self.b_dec = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, indices = ops.topk_encode(x, self.W_enc, self.b_enc, k=self.k)
        return ops.sparse_decode(values, indices, self.W_dec, self.b_dec)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch, through a [tokens, F] matrix."""
        scores = torch.relu(x @ self.W_enc.T + self.b_enc)
        values, indices = scores.topk(self.k)
        return torch.zeros_like(scores).scatter(-1, indices, values) @ self.W_dec + self.b_dec


def main() -> None:
    torch.manual_seed(0)
    model = Transcoder(d_in=64, d_out=48, n_latents=1024, k=8)
    x, target = torch.randn(256, 64), torch.randn(256, 48)
    grads = []
    for forward in (model, model.dense):
        loss = (forward(x) - target).pow(2).mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    error = max(float((a - b).abs().max()) for a, b in zip(*grads))
    print(f"largest difference of a gradient: {error:.1e}")

    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(201):
        loss = (model(x) - target).pow(2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
