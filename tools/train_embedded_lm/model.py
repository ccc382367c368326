"""GPT-2 in plain PyTorch under transformers' parameter names, with the loss.

Written for a CPU with bf16 products, where fused attention's backward and fp32 logits cost more
than the matrix products around them. With attention spelled out (the context is short) and one
softmax in bf16 that serves the loss and its gradient, 4096 tokens take 0.93 CPU seconds forward
and backward instead of 1.22 (Zen 4; torch.compile of the fused form took 1.4). transformers'
own class reads the result: the exported file is evaluated with it.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Conv1D(nn.Module):
    """A linear layer with GPT-2's transposed weight [in, out]."""

    def __init__(self, d_in: int, d_out: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * std)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, std_out: float):
        super().__init__()
        self.heads = heads
        self.c_attn = Conv1D(width, 3 * width, 0.02)
        self.c_proj = Conv1D(width, width, std_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.c_attn(x).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        q = q.transpose(1, 2) * (d // self.heads) ** -0.5
        scores = q @ k.permute(0, 2, 3, 1)  # [n, heads, t, t]
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        weights = _softmax(scores.masked_fill(future, float("-inf")))
        return self.c_proj((weights @ v.transpose(1, 2)).transpose(1, 2).reshape(n, t, d))


def _softmax(x: torch.Tensor) -> torch.Tensor:
    """In x's dtype, unlike autocast's, which writes fp32; the kernel accumulates in fp32."""
    with torch.autocast("cpu", enabled=False):
        return x.softmax(-1)


class CrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] a token; the probabilities become the gradient in place."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        p = _softmax(logits)
        chosen = p.gather(1, targets[:, None])
        ctx.save_for_backward(p, targets)
        return -chosen[:, 0].float().clamp_min(1e-30).log()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        p, targets = ctx.saved_tensors
        rows = torch.arange(len(targets))
        p[rows, targets] -= 1
        return p.mul_(grad[:, None].to(p.dtype)), None


class MLP(nn.Module):
    def __init__(self, width: int, std_out: float):
        super().__init__()
        self.c_fc = Conv1D(width, 4 * width, 0.02)
        self.c_proj = Conv1D(4 * width, width, std_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, std_out: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, std_out)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, std_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, vocab: int, context: int, layers: int, width: int, heads: int):
        super().__init__()
        std_out = 0.02 / math.sqrt(2 * layers)
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads, std_out) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats [n * t] of `targets` [n, t] given `tokens` [n, t]."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
