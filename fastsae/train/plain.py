"""The TopK SAE's training step in plain PyTorch: what the fused step is compared with.

Dense pre-activations [N, F], `torch.topk`, a dense decode, autograd and `torch.optim.Adam`, the
decoder's rows kept at unit norm and the parallel part of their gradient removed. Written as one
would write it without fastsae; nothing in it is slowed down on purpose.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class PlainTopKStep:
    """One training step of a TopK SAE with given weights (copied), in plain PyTorch."""

    def __init__(
        self,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        k: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        """W_enc, W_dec [F, D], b_enc [F], b_dec [D]."""
        self.k = k
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            p.detach().clone().requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec)
        )
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
        self.steps_since_fired = torch.zeros(W_dec.shape[0], dtype=torch.int64, device=W_dec.device)

    def __call__(self, x: torch.Tensor) -> float:
        """Trains on x [N, D]; returns the mean squared error."""
        pre = functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        top = torch.topk(pre, self.k, dim=-1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        loss = functional.mse_loss(acts @ self.W_dec + self.b_dec, x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            grad = self.W_dec.grad
            assert grad is not None
            grad -= (grad * self.W_dec).sum(-1, keepdim=True) * self.W_dec
            self.optimizer.step()
            self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)
            fired = (acts > 0).any(0)
            self.steps_since_fired = torch.where(fired, 0, self.steps_since_fired + 1)
        return float(loss.detach())
