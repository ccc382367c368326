"""TopKSAE: definition, initialisation, dead latents, AuxK gradients, files."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastsae import _files
from fastsae.nn import TopKSAE
from fastsae.nn.initial import geometric_median
from fastsae.optim import FusedAdam, has_unit_norm

N, D, F, K = 40, 12, 64, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def make(dtype=torch.float64, seed=0, **options):
    sae = TopKSAE(D, F, K, dtype=dtype, seed=seed, **options)
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(seed + 1))
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(seed + 2)).mul_(0.1)
    return sae


def data(n=N, dtype=torch.float64, seed=3):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(sae, x, scale=1.0):
    """The definition, with [N, F] activations."""
    pre = (x - sae.b_dec if sae.config.apply_b_dec_to_input else x) @ sae.W_enc.T + sae.b_enc
    kept = torch.zeros_like(pre).scatter(1, (pre * scale).topk(sae.k, 1).indices, 1.0) * pre
    return (kept.relu() if sae.config.activation == "relu" else kept) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("centered", [True, False], ids=["centered", "raw"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_forward_and_gradients_follow_the_definition(centered, activation):
    sae = make(apply_b_dec_to_input=centered, activation=activation)
    x, grad = data(), data(seed=9)
    sae(x).backward(grad)
    got = {n: p.grad.clone() for n, p in sae.named_parameters()}
    sae.zero_grad()
    out = dense(sae, x)
    out.backward(grad)
    torch.testing.assert_close(sae(x), out)
    for name, param in sae.named_parameters():
        torch.testing.assert_close(got[name], param.grad)


def test_encode_decode_shapes_and_order():
    sae = make()
    x = data(2 * 3 * 5).view(2, 3, 5, D)
    code = sae.encode(x)
    values, indices, offsets = code
    assert offsets is None and values.shape == indices.shape == (2, 3, 5, K)
    assert indices.dtype == torch.int32
    assert (values.diff(dim=-1) <= 0).all()
    assert torch.equal(sae.decode(code), sae(x))
    assert sae(x[:0]).shape == (0, 3, 5, D)
    assert sae(x.float()).dtype == torch.float64  # cast to the parameters' dtype


def test_rank_by_decoder_norm():
    sae = make(rank_by_decoder_norm=True, normalize_decoder=False, activation="identity")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.1, 3, F)[:, None])
    x = data()
    torch.testing.assert_close(sae(x), dense(sae, x, sae.W_dec.norm(dim=1)))
    assert not torch.allclose(sae(x), dense(sae, x))


def test_initial_weights():
    sae = TopKSAE(D, F, K, seed=5)
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(F))
    ratio = sae.W_enc / sae.W_dec
    assert 0 < ratio.mean() < 1
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert torch.equal(sae.W_enc, TopKSAE(D, F, K, seed=5).W_enc)
    assert not torch.equal(sae.W_enc, TopKSAE(D, F, K, seed=6).W_enc)


@pytest.mark.parametrize("n", [500, 30], ids=["enough_points", "fewer_than_latents"])
def test_initialize_from_data(n):
    # points around a few directions, off the origin
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, D, generator=generator) * 3
    x = centres[torch.randint(7, (n,), generator=generator)] + 5
    x = x + 0.3 * torch.randn(n, D, generator=generator)

    @torch.no_grad()
    def error(sae):
        return float((sae.eval()(x) - x).square().sum() / (x - x.mean(0)).square().sum())

    plain, random, points = (TopKSAE(D, F, K, seed=1) for _ in range(3))
    random.initialize_from_data(x, directions="random", seed=2)
    points.initialize_from_data(x, seed=2)
    assert error(points) < error(random) < error(plain)
    torch.testing.assert_close(points.W_dec.norm(dim=1), torch.ones(F))
    torch.testing.assert_close(points.b_dec, geometric_median(x))
    assert int(points.tokens_seen) == 0
    again = TopKSAE(D, F, K, seed=3)
    again.initialize_from_data(x, seed=2)
    assert torch.equal(again.W_enc, points.W_enc)
    with pytest.raises(ValueError, match="directions"):
        points.initialize_from_data(x, directions="pca")
    with pytest.raises(ValueError, match="NaN"):
        points.initialize_from_data(x * float("nan"))


def test_geometric_median_is_the_minimum():
    x = data(101)
    x[:10] += 100  # outliers move the mean, hardly the median
    median = geometric_median(x, steps=500, tolerance=1e-12)
    best = (x - median).norm(dim=1).sum()
    for direction in data(8, seed=4):
        assert (x - median - 1e-3 * direction).norm(dim=1).sum() >= best


def test_dead_latents_are_tracked_in_training_only():
    sae = make(dead_after=2 * N)
    sae.eval()(data())
    assert int(sae.tokens_seen) == 0
    sae.train()
    expected = torch.full((F,), 0)
    for i in range(3):
        x = data(seed=i)
        values, indices, _ = sae(x) is not None and sae.eval().encode(x)
        sae.train()
        expected += N
        expected[indices[values != 0].long()] = 0
    assert torch.equal(sae.tokens_since_fired(), expected)
    assert torch.equal(sae.dead_latents(), (expected >= 2 * N).nonzero().squeeze(1))
    assert len(make().dead_latents()) == 0
    copied = TopKSAE(D, F, K, dtype=torch.float64)
    copied.load_state_dict(sae.state_dict())
    assert torch.equal(copied.tokens_since_fired(), expected)


@pytest.mark.parametrize("k_aux", [3, 1000], ids=["few", "all_dead"])
def test_aux_loss_and_its_gradients(k_aux):
    sae = make(k_aux=k_aux, dead_after=100)
    x = data()
    sae(x)
    sae.last_fired[::3] = -100  # a third of the latents is dead
    dead = sae.dead_latents()
    assert len(dead) == 22
    sae.zero_grad()
    out = sae(x)
    sae.last_fired[::3] = -100
    sae.aux_loss(x, out).backward()
    got = {n: p.grad.clone() for n, p in sae.named_parameters()}

    sae.zero_grad()
    residual = (x - out).detach()  # the target; b_dec is not added a second time
    pre = (x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(min(k_aux, 22), 1).indices, 1.0) * pre.relu()
    variance = (residual - residual.mean(0)).square().sum()
    loss = (kept @ sae.W_dec[dead] - residual).square().sum() / variance
    loss.backward()
    for name, param in sae.named_parameters():
        torch.testing.assert_close(got[name], param.grad, rtol=1e-5, atol=1e-6)
    for name in ("W_enc", "W_dec"):
        touched = got[name].abs().sum(1) > 0
        assert touched[dead].any()
        assert not touched[sae.tokens_since_fired() < 100].any()


def test_aux_loss_without_dead_latents_is_zero():
    sae = make()
    x = data()
    assert float(sae.aux_loss(x, sae(x))) == 0


def test_unit_norm_mark_survives(tmp_path):
    sae = make()
    state = make(seed=7).state_dict()
    sae.load_state_dict(state, assign=True)
    assert has_unit_norm(sae.W_dec)
    sae.save_pretrained(tmp_path)
    saes = [
        sae,
        copy.deepcopy(sae),
        pickle.loads(pickle.dumps(sae)),
        sae.to(torch.float32),
        TopKSAE.from_pretrained(tmp_path),
    ]
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        saes.append(make().to(torch.bfloat16))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)
    replaced = make()
    replaced.W_dec = nn.Parameter(torch.randn(F, D))
    for one in (*saes, replaced):
        assert has_unit_norm(one.W_dec)
        assert not has_unit_norm(one.W_enc)
    assert not has_unit_norm(make(normalize_decoder=False).W_dec)
    for a, b in pairwise(saes[:5]):
        torch.testing.assert_close(a.W_dec, b.W_dec, check_dtype=False)


def test_compile_fullgraph_and_autocast():
    sae = make(torch.float32)
    x = data(dtype=torch.float32)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), sae(x))
    assert int(sae.tokens_seen) == 2 * N
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x.bfloat16())
    assert out.dtype == torch.float32


def test_inductor_trains_with_ordinary_gradients():
    """Compiled: gradients in `p.grad`, also under FusedAdam; the eager step still records them."""
    compiled_sae, eager = make(torch.float32), make(torch.float32)
    compiled = torch.compile(compiled_sae, fullgraph=True)
    x, grad = data(dtype=torch.float32), data(dtype=torch.float32, seed=9)
    out = compiled(x)
    out.backward(grad)
    plain = eager(x)
    plain.backward(grad)
    torch.testing.assert_close(out, plain)
    assert int(compiled_sae.tokens_seen) == N
    assert torch.equal(compiled_sae.last_fired, eager.last_fired)
    for (name, p), q in zip(compiled_sae.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")

    for sae, run in ((compiled_sae, compiled), (eager, eager)):
        sae.zero_grad()
        opt = FusedAdam(sae.parameters(), lr=1e-2)
        run(x).backward(grad)
        assert (sae.W_enc.grad is None) == (run is eager)
        opt.step()
        opt.zero_grad()
        sae(x).backward(grad)  # the module itself, whichever way it was called before
        assert sae.W_enc.grad is None and sae.W_dec.grad is None
        opt.step()
    for p, q in zip(compiled_sae.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-4, rtol=0)  # Adam's first steps amplify rounding


def test_argument_errors():
    for args, message in (
        ((0, F, K), "positive"),
        ((D, F, 0), "k must lie"),
        ((D, F, F + 1), "k must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            TopKSAE(*args)
    with pytest.raises(ValueError, match="activation"):
        TopKSAE(D, F, K, activation="gelu")
    with pytest.raises(ValueError, match=r"\[\.\.\., 12\]"):
        make()(torch.zeros(3, D + 1))


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip(tmp_path, dtype):
    sae = make(dtype, apply_b_dec_to_input=False, activation="identity")
    sae.save_pretrained(tmp_path / "new" / "folder")
    loaded = TopKSAE.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == sae.config
    assert not loaded.training
    x = data(dtype=dtype)
    assert torch.equal(loaded(x), sae.eval()(x))
    loaded.train()(x)
    assert int(loaded.tokens_seen) == N
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "sae.safetensors",
    ]


def saved():
    return {"architecture": "topk", **asdict(make().config)}


def edit(path, **changes):
    header = json.loads(path.read_text())
    header.update(changes)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (lambda c, w: w.write_bytes(w.read_bytes()[:-100]), "sae.safetensors", "truncated"),
        (lambda c, w: w.write_bytes(w.read_bytes()[:5]), "sae.safetensors", "truncated"),
        (lambda c, w: w.write_bytes(b""), "sae.safetensors", "truncated"),
        (lambda c, w: w.write_bytes(b"\x80\x04pickle"), "sae.safetensors", "not a safetensors"),
        (lambda c, w: c.write_text(c.read_text()[:40]), "config.json", "truncated"),
        (lambda c, w: c.write_bytes(b"\xff\xfe\x00"), "config.json", "not JSON"),
        (lambda c, w: c.write_text("[1]"), "config.json", "not a fastsae.SparseCoder"),
        (lambda c, w: edit(c, format="sae_lens"), "config.json", "sae_lens"),
        (lambda c, w: edit(c, format_version=99), "config.json", "newer"),
        (lambda c, w: edit(c, format_version="1"), "config.json", "format_version"),
        (lambda c, w: edit(c, save_id="0"), "sae.safetensors", "interrupted"),
        (lambda c, w: edit(c, config={"d_in": 3}), "config.json", "architecture is None"),
        (lambda c, w: edit(c, config={"d_in": 3, "architecture": "topk"}), "config.json", "d_sae"),
        (lambda c, w: edit(c, config={**saved(), "architecture": "moe"}), "config.json", "'moe'"),
        (lambda c, w: edit(c, config={**saved(), "d_in": 3}), "sae.safetensors", "W_enc"),
        (lambda c, w: edit(c, config={**saved(), "gate": 1}), "config.json", "gate"),
        (lambda c, w: edit(c, config={**saved(), "k": 999}), "config.json", "k must"),
        (lambda c, w: w.unlink(), "sae.safetensors", "no such file"),
        (lambda c, w: c.unlink(), "config.json", "no such file"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, damage, file, reason):
    make().save_pretrained(tmp_path)
    damage(tmp_path / "config.json", tmp_path / "sae.safetensors")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TopKSAE.from_pretrained(tmp_path)
    assert file in str(caught.value)
    assert reason in str(caught.value)


def test_foreign_safetensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    sae = make()
    sae.save_pretrained(tmp_path)
    save_file({k: v.detach() for k, v in sae.named_parameters()}, tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"sae\.safetensors: not the weights"):
        TopKSAE.from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    old = make()
    old.save_pretrained(tmp_path)

    def fail(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _files.write_atomic(tmp_path / "sae.safetensors", fail)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(TopKSAE.from_pretrained(tmp_path).W_enc, old.W_enc)


def test_a_config_that_cannot_be_written_leaves_the_old_weights(tmp_path, monkeypatch):
    old = make()
    old.save_pretrained(tmp_path)

    def fail(path, text):
        raise OSError("no space left")

    monkeypatch.setattr(_files, "_write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        make(seed=9).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(TopKSAE.from_pretrained(tmp_path).W_enc, old.W_enc)


def test_weights_without_values_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="holds no values"):
        TopKSAE(D, F, K, device="meta").save_pretrained(tmp_path)


def test_can_be_built_from_fake_tensors():
    """Tools that plan memory build modules under FakeTensorMode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        sae = TopKSAE(4096, 8192, 4)
        values, indices, _ = sae.eval().encode(torch.empty(3, 4096))
    assert values.shape == indices.shape == (3, 4)
