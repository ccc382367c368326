"""The SAE libraries that the benchmarks run beside fastsae, each by its own public interface.

Every builder imports its library when called: a library that is not installed is a note in the
table, not a failure. The training steps follow each library's own trainer, line by line, less its
logging; the activations come as one tensor [N, D].
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# one training step on x [N, D]; returns (loss, active latents per token) for the check
Step = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def _quiet() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())


# ---- encoders: weights w [F, D], b [F] --------------------------------------------------------


def sparsify_encoder(w: torch.Tensor, b: torch.Tensor, k: int) -> Encode:
    with _quiet():
        from sparsify import SparseCoder, SparseCoderConfig
    f, d = w.shape
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k))
    sae.encoder.weight.data, sae.encoder.bias.data = w, b

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = sae.encode(x)
        return out.top_acts, out.top_indices

    return encode


def _sparse_of(acts: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = acts.topk(k, dim=-1)
    return values, indices


class _Dense(tuple):  # type: ignore[type-arg]
    """(values, indices) of dense activations, found only when the check looks at them."""

    def __new__(cls, acts: torch.Tensor, k: int) -> _Dense:
        self = super().__new__(cls)
        self.acts, self.k = acts, k  # type: ignore[attr-defined]
        return self

    def __getitem__(self, i: Any) -> Any:
        return _sparse_of(self.acts, self.k)[i]  # type: ignore[attr-defined]


def saelens_encoder(w: torch.Tensor, b: torch.Tensor, k: int) -> Encode:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    f, d = w.shape
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=f, k=k))
    sae.W_enc.data, sae.b_enc.data = w.T.contiguous(), b
    return lambda x: _Dense(sae.encode(x), k)


def dictionary_learning_encoder(w: torch.Tensor, b: torch.Tensor, k: int) -> Encode:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    f, d = w.shape
    sae = AutoEncoderTopK(d, f, k)
    sae.encoder.weight.data, sae.encoder.bias.data = w, b
    return lambda x: _Dense(sae.encode(x), k)


ENCODERS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Encode]] = {
    "sparsify": sparsify_encoder,
    "SAELens": saelens_encoder,
    "dictionary_learning": dictionary_learning_encoder,
}


# ---- training steps ---------------------------------------------------------------------------


class DenseTopK(torch.nn.Module):
    """A TopK SAE as one writes it in plain PyTorch: the dense baseline."""

    def __init__(self, d: int, f: int, k: int) -> None:
        super().__init__()
        self.k = k
        w = torch.randn(f, d)
        w /= w.norm(dim=1, keepdim=True)
        self.W_enc = torch.nn.Parameter(w.clone())
        self.W_dec = torch.nn.Parameter(w)
        self.b_enc = torch.nn.Parameter(torch.zeros(f))
        self.b_dec = torch.nn.Parameter(torch.zeros(d))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pre = torch.nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = pre.topk(self.k, dim=-1)
        acts = torch.zeros_like(pre).scatter_(-1, indices, values.relu())
        return acts @ self.W_dec + self.b_dec, indices


def eager_step(
    d: int,
    f: int,
    k: int,
    *,
    fused_adam: bool = True,
    compiled: bool = False,
    lr: float = 1e-3,
    model: DenseTopK | None = None,
) -> Step:
    """Dense PyTorch with everything that fastsae's step has: b_dec, unit norm, dead tracking."""
    model = model or DenseTopK(d, f, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=fused_adam or None)
    since_fired = torch.zeros(f, dtype=torch.long)
    forward = torch.compile(model) if compiled else model

    def step(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        recon, indices = forward(x)
        loss = (recon - x).pow(2).sum(-1).mean()
        loss.backward()
        with torch.no_grad():
            w, g = model.W_dec, model.W_dec.grad
            g -= (g * w).sum(1, keepdim=True) * w
            optimizer.step()
            optimizer.zero_grad()
            w /= w.norm(dim=1, keepdim=True)
            since_fired.add_(len(x))
            since_fired[indices.flatten()] = 0
        return loss.item(), indices

    return step


def sparsify_step(
    d: int, f: int, k: int, *, optimizer: str = "signum", device: str = "cpu"
) -> Step:
    """`sparsify.trainer.Trainer.fit`: signum is its default, adam its option."""
    with _quiet():
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
    sae = SparseCoder(d, SparseCoderConfig(num_latents=f, k=k), device=device)
    if optimizer == "signum":
        from schedulefree import ScheduleFreeWrapper

        opt = ScheduleFreeWrapper(
            SignSGD([{"params": sae.parameters(), "lr": 5e-3 / (f / 2**14) ** 0.5}]), momentum=0.95
        )
        opt.train()
    else:
        opt = torch.optim.Adam(sae.parameters(), lr=2e-4 / (f / 2**14) ** 0.5)
    since_fired = torch.zeros(f, dtype=torch.long)
    did_fire = torch.zeros(f, dtype=torch.bool)

    def step(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = sae(x=x, y=x, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            since_fired.add_(len(x))
            since_fired[did_fire] = 0
            did_fire.zero_()
        return out.fvu.item(), out.latent_indices

    return step


def saelens_step(d: int, f: int, k: int, *, sparse: bool = False) -> Step:
    """`sae_lens.training.sae_trainer.SAETrainer._train_step` at its default settings."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    options = {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=d, d_sae=f, k=k, **(options if sparse else {}))
    )
    opt = torch.optim.Adam(sae.parameters(), lr=3e-4, betas=(0.9, 0.999))
    since_fired = torch.zeros(f)
    act_freq = torch.zeros(f)

    def step(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        sae.train()
        out = sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            did_fire = firing.sum(-2).bool()
            if did_fire.is_sparse:
                did_fire = did_fire.to_dense()
            since_fired.add_(1)
            since_fired[did_fire] = 0
            act_freq.add_(firing.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return out.loss.item(), out.feature_acts.detach()

    return step


def dictionary_learning_step(d: int, f: int, k: int) -> Step:
    """`TopKTrainer.update`; step 0 would compute a geometric median, so steps count from 1."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000,
        activation_dim=d,
        dict_size=f,
        k=k,
        layer=0,
        lm_name="none",
        device="cpu",
        seed=0,
    )
    count = [0]

    def step(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        count[0] += 1
        loss = trainer.update(count[0], x)
        return loss, torch.full((len(x), trainer.effective_l0), 1)

    return step


STEPS: dict[str, Callable[[int, int, int], Step]] = {
    "sparsify": sparsify_step,
    "sparsify, Adam": lambda d, f, k: sparsify_step(d, f, k, optimizer="adam"),
    "SAELens": saelens_step,
    "SAELens, sparse activations": lambda d, f, k: saelens_step(d, f, k, sparse=True),
    "dictionary_learning": dictionary_learning_step,
}
