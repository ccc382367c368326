"""What is no tensor, no activation or no operation is refused, and the error says what to pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import randn

from fastsae import nn, ops
from fastsae.steer import add_vector, attach, clamp, positions
from fastsae.train import TrainConfig, Trainer, train_sae

D, F, K = 8, 32, 3
ARRAY = r"a torch tensor is needed, got numpy.ndarray \(torch.from_numpy\(...\) makes one\)"


def sae():
    return nn.TopKSAE(D, F, K, seed=0)


x, W = randn(5, D), randn(F, D, seed=1)
values, indices = ops.topk_encode(x, W, None, K)
array = np.ones((5, D), np.float32)


@pytest.mark.parametrize(
    "call,name",
    [
        (lambda: ops.topk(array, 2), "topk"),
        (lambda: ops.topk_encode(array, W, None, K), "topk_encode"),
        (lambda: ops.topk_encode(x, W.numpy(), None, K), "topk_encode"),
        (lambda: ops.topk_member(array, W, None, indices, K), "topk_member"),
        (lambda: ops.sparse_decode(values.numpy(), indices, W), "sparse_decode"),
        (lambda: ops.sparse_decode(values, indices.numpy(), W), "sparse_decode"),
        (lambda: ops.sparse_grad_values(array, indices, W), "sparse_grad_values"),
        (lambda: ops.sparse_grad_weight(values, indices, array, F), "sparse_grad_weight"),
        (lambda: sae()(array), "TopKSAE: x"),
        (lambda: sae().encode(array), "TopKSAE: x"),
        (lambda: sae().loss(array), "TopKSAE: x"),
        (lambda: sae().initialize_from_data(array), "TopKSAE: x"),
        (lambda: train_sae(sae(), array), "train_sae: data"),
        (lambda: Trainer(sae(), TrainConfig(2)).fit([array]), "batches"),
        (lambda: add_vector(np.ones(D, np.float32), 1.0), "the vector"),
    ],
)
def test_an_array(call, name):
    with pytest.raises(TypeError, match=f"{name}: {ARRAY}"):
        call()


@pytest.mark.parametrize(
    "call", [lambda ids: sae()(ids), lambda ids: sae().initialize_from_data(ids)]
)
def test_integers_are_no_activations(call):
    with pytest.raises(
        TypeError, match="must be activations, of a floating dtype, got torch.int64"
    ):
        call(torch.zeros(5, D, dtype=torch.int64))


@pytest.fixture
def steerer():
    site = torch.nn.Sequential(torch.nn.Linear(D, D))
    made = attach(site, sae(), hook="0")
    yield made
    made.detach()


@pytest.mark.parametrize("programs", [clamp(3, 1.0), [clamp(3, 1.0)], "clamp", ["clamp"], [3], 3])
def test_a_program_is_a_list_for_each_sequence(steerer, programs):
    with pytest.raises(TypeError, match=r"one list of operations per sequence, as in steer\(\[\["):
        steerer.set(programs)


def test_what_stands_in_programs_and_positions(steerer):
    with pytest.raises(TypeError, match="a program holds operations, such as .*, got 'clamp'"):
        steerer.set([["clamp"]])
    with pytest.raises(TypeError, match=r"such as positions.generated_only\(\), got 'generated'"):
        steerer.set([[clamp(3, 1.0)]], "generated")
    steerer.set([None, [], (clamp(np.int64(3), np.float32(1.0)),)], positions.generated_only())
    steerer.clear()
    with pytest.raises(TypeError, match="clamp: latent must be an int, got str"):
        clamp("3", 1.0)
    with pytest.raises(TypeError, match="clamp: the value must be a number, got 'much'"):
        clamp(3, "much")


def test_an_index_out_of_range_is_told_by_its_place():
    outside = indices.clone().view(-1)
    outside[4], outside[11] = F, -1
    told = rf"lie in \[0, {F}\), and 2 of 15 do not, the first at place 4"
    with pytest.raises(RuntimeError, match=told):
        ops.sparse_decode(values, outside.view_as(indices), W)
