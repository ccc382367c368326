"""topk_encode by the CUDA C++ product for sm_90; without one emulated (hopper_on_host.h)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_host
import pytest
import torch
from common import INTERPRETED, ON_HOST
from selection import expected, integers

from fastsae import _library, reference

fused = pytest.importorskip("fastsae.triton_kernels.topk_encode.fused")
keys_module = pytest.importorskip("fastsae.triton_kernels.topk_encode.keys")
chunked = pytest.importorskip("fastsae.triton_kernels.topk_encode.chunked")
encode_module = pytest.importorskip("fastsae.triton_kernels.topk_encode")
DEVICE = "cpu" if ON_HOST else "cuda"
SMALL = fused.FusedConfig(records=64)  # phases of 512, 4096, ... columns


@pytest.fixture(autouse=True)
def product():
    why = cuda_host.load() if ON_HOST else _library.CUDA_MISSING
    if why is None and not ON_HOST and torch.cuda.get_device_capability() != (9, 0):
        why = "the product is for sm_90"
    if why is not None:
        pytest.skip(why)


def record(x, W, b, scale, bars, begin, end, records):
    """Scores, columns, counts; bars [R]: NaN for a token that has none yet."""
    n = len(x)
    bits = torch.where(bars.isnan(), -(2**31), bars.view(torch.int32))
    scores = torch.full((n, records, 8), torch.nan, device=DEVICE)
    columns = torch.full((n, records), -7, dtype=torch.int32, device=DEVICE)
    recorded = torch.zeros(n, 8, dtype=torch.int32, device=DEVICE)
    torch.ops.fastsae.topk_encode_record_cuda(
        x, W, b, scale, bits.int().to(DEVICE), begin, end, scores, columns, recorded
    )
    return scores.cpu(), columns.cpu(), recorded[:, 0].cpu()


OFFSETS = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])


def groups(x, W, b, scale, begin, end):
    """First columns of the records that can be, and their scores [R, groups, 8]; 0 beyond F."""
    tiles = torch.arange(begin, end, 256)[:, None, None] + 32 * torch.arange(8)[:, None]
    first = (tiles + 2 * torch.arange(4)).flatten()
    scores = x.cpu().float() @ W.cpu().float().T
    scores = scores if b is None else scores + b.cpu().float()
    scores = scores if scale is None else scores * scale.cpu().float()
    padded = torch.nn.functional.pad(scores, (0, 256))
    return first, padded[:, first[:, None] + OFFSETS]


@pytest.mark.parametrize(
    "n,d,f,begin,end,extras,dtype",
    [
        (3, 8, 40, 0, 40, "", torch.bfloat16),
        (130, 64, 700, 0, 512, "bias scale", torch.float16),
        (130, 136, 700, 512, 700, "scale", torch.bfloat16),
        (300, 264, 1000, 256, 1000, "bias", torch.bfloat16),
        (257, 448, 900, 0, 900, "bias", torch.float16),
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.05], ids=["all", "few"])
def test_records_what_exceeds_the_threshold(n, d, f, begin, end, extras, dtype, share):
    x, W, b, scale = integers(n, d, f, dtype)
    b, scale = b if "bias" in extras else None, scale if "scale" in extras else None
    first, scores = groups(x, W, b, scale, begin, end)
    bars = scores.amax(2).quantile(1 - share, dim=1) if share < 1 else torch.full((n,), torch.nan)
    got, columns, recorded = record(x, W, b, scale, bars, begin, end, len(first))
    for row in range(n):
        count = int(recorded[row])
        wanted = ~(scores[row].amax(1) <= bars[row])
        columns_of, order = columns[row, :count].sort()
        assert torch.equal(columns_of.long(), first[wanted])
        assert torch.equal(got[row, :count][order], scores[row][wanted])
        assert (columns[row, count:] == -7).all() and got[row, count:].isnan().all()


def test_a_token_with_too_many_records_keeps_some_of_them():
    x, W, b, _ = integers(130, 72, 600)
    first, scores = groups(x, W, b, None, 0, 600)
    bars = torch.full((130,), torch.nan)
    bars[1::2] = torch.inf  # beside tokens that record nothing
    got, columns, recorded = record(x, W, b, None, bars, 0, 600, 16)
    assert recorded.tolist() == [len(first), 0] * 65
    for row in range(0, 130, 2):
        assert len(columns[row].unique()) == 16
        at = (columns[row][:, None] == first).int().argmax(1)
        assert torch.equal(got[row], scores[row][at])


def select(x, W, b, k, scale=None):
    if not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip("no GPU and no interpreter for the selection")
    chunks = chunked.Chunks(slab=len(x) * 128)
    keys = fused.select(x, W, b, k, scale, chunks, SMALL, hopper=True)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    keys_module.decode_keys(keys, None, indices, False)
    return indices.cpu()


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("n,d,f,k", [(19, 24, 5001, 5), (1, 8, 5, 5), (3, 200, 700, 32)])
def test_selects_as_the_reference(n, d, f, k, scaled):
    x, W, b, scale = integers(n, d, f)
    b, scale = (b, scale) if scaled else (None, None)
    assert torch.equal(select(x, W, b, k, scale), expected(x, W, b, k, scale)[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "W", "b"])
def test_not_finite(where, bad):
    x, W, b, _ = integers(3, 24, 1200)
    {"x": x[1], "W": W[1150], "b": b}[where][7] = bad
    assert torch.equal(select(x, W, b, 9), expected(x, W, b, 9)[1])


def test_tokens_that_overflow_are_redone():
    """Ascending columns pass every threshold; the tokens beside them must stay untouched."""
    f = 4096
    x, W = torch.zeros(18, 16), torch.zeros(f, 16)
    W[:, 0] = torch.arange(f) / 512
    W[:, 1] = torch.randint(-2, 3, (f,), generator=torch.Generator().manual_seed(0))
    x[::2, 0], x[1::2, 0] = 1, -1
    x[5, :2] = torch.tensor([0, 1])
    x, W = x.half().to(DEVICE), W.half().to(DEVICE)
    assert torch.equal(select(x, W, None, 8), expected(x, W, None, 8)[1])


def test_is_taken_by_its_name_only():
    """Until it has run on a GPU: a fault in it could hang."""
    x, W, b, scale = integers(2, 16, 600)
    if not INTERPRETED and DEVICE == "cpu":
        pytest.skip("no GPU and no interpreter for the selection")
    assert encode_module.named("hopper").refuses(x, W, 3) is None
    values, indices = encode_module.topk_encode(x, W, b, 3, True, scale, design="hopper")
    truth = reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 3, True, scale.cpu())
    assert torch.equal(indices.cpu(), truth[1]) and torch.equal(values.cpu(), truth[0])
    assert encode_module.design_of(x, W, 3).name == "fused"
    assert encode_module.design_of(x, W, 3, frozenset({"fused", "hopper"})).name == "fused"
    assert encode_module.design_of(x, W, 3, frozenset({"hopper"})) is None


def test_refuses_what_it_cannot_read():
    x, W, b, _ = integers(2, 16, 300)
    bars = torch.zeros(2)
    for wrong in (x.float(), x[:, :12].contiguous(), x.flatten()[4:20].view(1, 16)):
        same = W.to(wrong.dtype)[:, : wrong.shape[1]].contiguous()
        with pytest.raises(RuntimeError, match="topk_encode: "):
            record(wrong, same, b.to(wrong.dtype), None, bars[: len(wrong)], 0, 300, 64)
    with pytest.raises(RuntimeError, match="columns 0 to 301 of 300"):
        record(x, W, b, None, bars, 0, 301, 64)


# What the emulation is for: each of these runs right on some machines, some of the time.
FAULTS = {
    "a tile is read before it landed": ("s.loaded[ring.at].wait(ring.turn);", ""),
    "a tile is overwritten while it is read": ("s.used[ring.at].wait(ring.turn ^ 1);", ""),
    "sums are read before they are formed": ("wait_products<0>(acc);", ""),
    "a tile is given back too early": ("wait_products<1>(acc);", "wait_products<2>(acc);"),
    "a tile's other half comes from nowhere": ("latent, d, (1 << kBlocks) - 1)", "latent, d)"),
    "a block ends before the other arrives": ("cluster_sync();  // the other block", "//"),
}
RUN = """
import sys, torch
sys.path.insert(0, "tests/support")
import fastsae
torch.ops.load_library(sys.argv[1])
g = torch.Generator().manual_seed(0)
x = torch.randint(-3, 4, (300, 520), generator=g).bfloat16()
W = torch.randint(-2, 3, (1500, 520), generator=g).bfloat16()
bars = torch.full((300,), -2**31, dtype=torch.int32)
for turn in range(4):
    scores = torch.full((300, 192, 8), torch.nan)
    columns, recorded = torch.zeros(300, 192, dtype=torch.int32), torch.zeros(300, 8).int()
    torch.ops.fastsae.topk_encode_record_cuda(
        x, W, None, None, bars, 0, 1500, scores, columns, recorded)
    at = columns.long()[:, :, None] + torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    truth = torch.nn.functional.pad(x.float() @ W.float().T, (0, 256))
    truth = truth.gather(1, at.flatten(1)).view(scores.shape)
    if not torch.equal(scores, truth):
        sys.exit("wrong scores")
"""


@pytest.mark.skipif(not ON_HOST, reason="about the emulation")
@pytest.mark.parametrize(
    "fault",
    [
        None,
        *(f if i == 0 else pytest.param(f, marks=pytest.mark.slow) for i, f in enumerate(FAULTS)),
    ],
)
def test_the_emulation_finds_faults(fault, tmp_path):
    text = cuda_host.SOURCES["topk_encode"].read_text()
    if fault is not None:
        right, wrong = FAULTS[fault]
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    source = tmp_path / "topk_encode.cu"
    source.write_text(text)
    library = cuda_host.build(source, cuda_host.compiler())
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library)],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode == 0) == (fault is None), done.stderr
    if fault is not None:
        assert "wrong scores" in done.stderr or "on_host: " in done.stderr, done.stderr
