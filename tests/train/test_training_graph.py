"""A whole training step waits for nothing and allocates by shapes alone, so a CUDA graph holds it.

Without a GPU: forward, loss, backward and FusedAdam by the Triton kernels in their interpreter,
under a mode that refuses what would wait for a device and notes every allocation.
"""

from __future__ import annotations

import pytest
import torch
from common import INTERPRETED, randn
from watched import Watched

import fastsae
from fastsae.nn import TopKSAE
from fastsae.optim import FusedAdam
from fastsae.train.trainer import TrainConfig, Trainer

N, D, F, K = 8, 24, 40, 3


def training(dtype, device, fmt, *, capturable=True):
    sae = TopKSAE(D, F, K, seed=0, dtype=dtype, device=device)
    if device == "cpu":  # torch's own Adam for the biases reads its step there
        sae.b_enc.requires_grad_(False)
        sae.b_dec.requires_grad_(False)
    lr = torch.tensor(1e-2, device=device) if capturable else 1e-2
    opt = FusedAdam(
        [p for p in sae.parameters() if p.requires_grad], lr=lr, moments=fmt,
        master_weights=True, capturable=capturable,
    )  # fmt: skip

    def step(x):
        loss = (sae(x) - x).float().square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss.detach()

    return sae, step


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: the graph itself is tested")
@pytest.mark.parametrize(
    "dtype,fmt", [(torch.float32, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "8bit")],
    ids=["fp32", "bf16-moments", "bf16-8bit"],
)  # fmt: skip
def test_a_training_step_neither_waits_nor_allocates_by_data_on_triton(dtype, fmt):
    pytest.importorskip("triton")
    noted = []
    # random; every token with the same latents; nothing but ties
    for x in (randn(N, D, seed=1), randn(1, D, seed=2).expand(N, D), torch.zeros(N, D)):
        x = x.to(dtype).contiguous()
        _, step = training(dtype, "cpu", fmt)
        with fastsae.use_backend("triton"):
            step(x)  # makes the state
            with Watched() as watched:
                step(x)
        noted.append(watched.shapes)
    assert noted[0] == noted[1] == noted[2]
    inside = {name for name, _ in noted[0]}
    assert {"topk_encode", "sort", "searchsorted", "sparse_adam_step"} <= inside  # of the ops too
    with pytest.raises(AssertionError, match="nonzero"), Watched():
        torch.ones(3).nonzero()


def with_aux(device, capacity, *, capturable=True):
    """A Trainer's step with AuxK over a third of the latents, and its optimizer's rate in a
    tensor; half of the dead ones died only now."""
    sae = TopKSAE(D, F, K, seed=0, dtype=torch.float32, device=device, dead_after=90, k_aux=16)
    if device == "cpu":
        sae.b_enc.requires_grad_(False)
        sae.b_dec.requires_grad_(False)
    sae.last_fired[::3] = -100
    lr = torch.tensor(1e-2, device=device) if capturable else 1e-2
    opt = FusedAdam([p for p in sae.parameters() if p.requires_grad], lr=lr, capturable=capturable)
    trainer = Trainer(sae, TrainConfig(20, warmup=3), opt)

    trainer._most_dead = lambda x, n: capacity
    return sae, trainer


@pytest.mark.skipif(not INTERPRETED, reason="a GPU is there: the graph itself is tested")
@pytest.mark.parametrize("capacity", [F, 30], ids=["all", "some"])
def test_a_step_with_auxk_neither_waits_nor_allocates_by_data_on_triton(capacity):
    pytest.importorskip("triton")
    noted = []
    for dead in (range(0), range(0, F, 3), range(F - 12, F)):
        sae, trainer = with_aux("cpu", capacity)
        with fastsae.use_backend("triton"):
            trainer.step(randn(N, D, seed=1))
            sae.last_fired.fill_(int(sae.tokens_seen))
            sae.last_fired[list(dead)] = -100
            with Watched() as watched:
                trainer.step(randn(N, D, seed=2))
        noted.append(watched.shapes)
    assert noted[0] == noted[1] == noted[2]
    trainer = with_aux("cpu", None)[1]
    with fastsae.use_backend("triton"), pytest.raises(AssertionError, match="nonzero"), Watched():
        trainer.step(randn(N, D, seed=1))  # counts the dead


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_trainer_step_with_auxk_is_the_eager_one():
    results = []
    xs = [randn(64, D, seed=s).cuda() for s in range(6)]
    for captured in (False, True):
        sae, trainer = with_aux("cuda", F)
        del trainer._most_dead  # the Trainer's own: by a late count, and by F in a graph
        buffer = xs[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for x in xs[:3]:
                buffer.copy_(x)
                trainer.step(buffer)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                trainer.step(buffer)
        for x in xs[3:]:
            buffer.copy_(x)
            if captured:
                trainer.set_rate()
                graph.replay()
                trainer.step_count += 1
            else:
                trainer.step(buffer)
        results.append([t.detach().clone() for t in sae.state_dict().values()])
    for eager, replayed in zip(*results, strict=True):
        torch.testing.assert_close(eager, replayed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fmt", ["fp32", "8bit"])
@pytest.mark.parametrize("name", ["triton", None])  # in CUDA C++ there is no encoder
def test_a_replayed_gpu_graph_trains_as_eager_steps_do(fmt, name):
    results = []
    xs = [randn(64, D, dtype=torch.bfloat16, seed=s).cuda() for s in range(6)]
    for captured in (False, True):
        sae, step = training(torch.bfloat16, "cuda", fmt)
        buffer = xs[0].clone()
        with fastsae.use_backend(name):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for x in xs[:3]:
                    buffer.copy_(x)
                    step(buffer)
            torch.cuda.current_stream().wait_stream(stream)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(buffer)
            for x in xs[3:]:
                buffer.copy_(x)
                graph.replay() if captured else step(buffer)
        results.append([p.detach().clone() for p in sae.parameters()])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
