"""topk_encode in the epilogue of the product, with tiles small enough for the interpreter."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from common import INTERPRETED, device_of
from selection import expected, integers

from fastsae import reference

fused = pytest.importorskip("fastsae.triton_kernels.topk_encode.fused")
keys_module = pytest.importorskip("fastsae.triton_kernels.topk_encode.keys")
chunked = pytest.importorskip("fastsae.triton_kernels.topk_encode.chunked")
encode_module = pytest.importorskip("fastsae.triton_kernels.topk_encode")

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU and no interpreter", allow_module_level=True)
if not INTERPRETED and fused.fused_config(torch.cuda.get_device_capability()) is None:
    pytest.skip("the design is not for this GPU", allow_module_level=True)
DEVICE = device_of("triton")
SMALL = fused.FusedConfig(16, 64, 16, 32, 4, 2, records=16)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch, request):
    """A row's keys are cut more than once in a phase."""
    if (
        getattr(request.node, "callspec", None)
        and request.node.callspec.params.get("tile") == "production"
    ):
        return  # as a device takes it: small tiles compile to other tensor-core instructions
    small = keys_module.FilterConfig(128, 64, 1)
    monkeypatch.setattr(keys_module, "filter_config", lambda k, rows: small)


TILES = pytest.mark.parametrize("tile", ["small", "production"])


def select(x, W, b, k, scale=None, config=SMALL, tile="small"):
    config = None if tile == "production" else config
    chunks = chunked.Chunks(slab=len(x) * 128)
    keys = fused.select(x, W, b, k, scale, chunks, config)
    indices = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    keys_module.decode_keys(keys, None, indices, False)
    return indices.cpu()


@pytest.fixture
def redone(monkeypatch):
    """How many rows each call took through the chunks."""
    counts = []
    add = fused.add_columns

    def counted(*args):
        counts.append(int(args[-1].sum()))
        add(*args)

    monkeypatch.setattr(fused, "add_columns", counted)
    return counts


@TILES
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_the_reference(dtype, scaled, tile):
    x, W, b, scale = integers(19, 24, 601, dtype)
    b, scale = (b, scale) if scaled else (None, None)
    assert torch.equal(select(x, W, b, 5, scale, tile=tile), expected(x, W, b, 5, scale)[1])


@TILES
@pytest.mark.parametrize("n,d,f,k", [(1, 8, 5, 5), (1, 8, 1, 1), (3, 40, 200, 32), (17, 16, 65, 1)])
def test_odd_sizes(n, d, f, k, tile):
    x, W, b, _ = integers(n, d, f)
    assert torch.equal(select(x, W, b, k, tile=tile), expected(x, W, b, k)[1])


def test_rows_that_overflow_are_redone(redone):
    """Ascending columns pass every threshold; the rows beside them must stay untouched."""
    f = 600
    x, W = torch.zeros(18, 16), torch.zeros(f, 16)
    W[:, 0] = torch.arange(f) / 512
    W[:, 1] = torch.randint(-2, 3, (f,), generator=torch.Generator().manual_seed(0))
    x[::2, 0], x[1::2, 0] = 1, -1
    x[5, :2] = torch.tensor([0, 1])
    x, W = x.half().to(DEVICE), W.half().to(DEVICE)
    assert torch.equal(select(x, W, None, 8), expected(x, W, None, 8)[1])
    assert redone == [9]


def test_a_row_that_overflowed_takes_no_part_in_later_phases(redone):
    """Else it would hold keys of these phases when all of its columns are taken again."""
    config = dataclasses.replace(SMALL, growth=2)
    assert [end for _, end in config.phases(8, 600)] == [128, 256, 512, 600]
    x, W = torch.ones(2, 16), torch.zeros(600, 16)
    W[:512, 0] = torch.arange(512)  # overflows in the third phase
    W[512:, 0] = 512 + torch.arange(88)  # the best are in the last one
    x[1] = 0
    x, W = x.half().to(DEVICE), W.half().to(DEVICE)
    assert torch.equal(select(x, W, None, 8, config=config), expected(x, W, None, 8)[1])
    assert redone == [1]


def test_ties_keep_the_lowest_index_and_never_overflow(redone):
    x, W, b, _ = integers(3, 16, 700)  # more ties in the second phase than a buffer has room for
    got = select(x * 0, W, b * 0, 20)
    assert got.tolist() == [list(range(20))] * 3
    assert redone == [0]


@TILES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "W", "b"])
def test_not_finite(where, bad, tile):
    x, W, b, _ = integers(3, 24, 200)
    {"x": x[1], "W": W[150], "b": b}[where][7] = bad
    assert torch.equal(select(x, W, b, 9, tile=tile), expected(x, W, b, 9)[1])


@pytest.mark.parametrize("design", ["chunked", "fused"])
def test_a_design_can_be_forced(monkeypatch, design):
    taken = []
    table = tuple(
        dataclasses.replace(d, select=lambda *a, d=d: taken.append(d.name) or d.select(*a))
        for d in encode_module.DESIGNS
    )
    monkeypatch.setattr(encode_module, "DESIGNS", table)
    x, W, b, scale = integers(2, 16, 70)
    values, indices = encode_module.topk_encode(x, W, b, 3, True, scale, design=design)
    truth = reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 3, True, scale.cpu())
    assert taken == [design]
    assert torch.equal(indices.cpu(), truth[1]) and torch.equal(values.cpu(), truth[0])


def choice(n, d, f, k=64, dtype=torch.bfloat16, trusted=None):
    x, W = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (n, f))
    design = encode_module.design_of(x, W, k, trusted)
    return None if design is None else design.name


def test_choice_by_shape():
    assert choice(8192, 768, 131072) == choice(8192, 4096, 131072) == "fused"
    assert choice(8192, 768, 131072, 1000) == choice(8192, 767, 131072) == "chunked"
    assert choice(8192, 768, 131072, dtype=torch.float32) == "bounded"
    assert choice(8192, 768, 1000, dtype=torch.float32) == "chunked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_choice_does_not_depend_on_the_number_of_tokens(dtype):
    for d, f, k in ((768, 131072, 64), (4096, 131072, 64), (767, 4096, 8), (64, 600, 300)):
        assert len({choice(n, d, f, k, dtype) for n in (1, 2, 255, 256, 2048, 10**6)}) == 1


def test_the_tile_follows_the_device_and_the_version_of_triton():
    """triton_versions.py compiles `configurations()` under the oldest and the newest."""
    for capability, version, width in (
        ((9, 0), (3, 6), 64), ((9, 0), (3, 7), 256), ((9, 0), (4, 0), 256),
        ((10, 0), (3, 6), 64), ((12, 0), (3, 9), 64),
    ):  # fmt: skip
        assert fused.fused_config(capability, version).width == width
    assert fused.fused_config((8, 9), (3, 8)) is None


def test_a_design_that_is_not_trusted_is_not_chosen():
    shape = 8192, 768, 131072
    assert choice(*shape, trusted=frozenset({"chunked", "bounded"})) == "chunked"
    assert choice(*shape, trusted=frozenset({"bounded"})) is None
    assert choice(*shape, trusted=frozenset()) is None
    assert choice(*shape, trusted=frozenset({"fused", "bounded", "chunked"})) == "fused"
    x, W, *_ = integers(2, 16, 70)
    with pytest.raises(RuntimeError, match="none of the trusted designs .bounded."):
        encode_module.topk_encode(x, W, None, 3, False, None, trusted=frozenset({"bounded"}))
    indices = encode_module.topk_encode(
        x, W, None, 3, False, None, trusted=frozenset({"chunked", "bounded"})
    )[1]
    assert torch.equal(indices.cpu(), expected(x, W, None, 3)[1])


def shifted(t):
    """The same numbers, beginning between two 16-byte addresses."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def test_views_that_begin_between_16_bytes():
    """TMA cannot read them: x is copied, which leaves the design; rows of W take the chunks."""
    x, W, *_ = integers(2, 16, 70)
    taken = [
        encode_module.design_of(*args, 3).name
        for args in ((x, W), (shifted(x), W), (x, shifted(W)))
    ]
    assert taken == ["fused", "fused", "chunked"]
    for args in ((shifted(x), W), (x, shifted(W))):
        indices = encode_module.topk_encode(*args, None, 3, False, None)[1]
        assert torch.equal(indices.cpu(), expected(x, W, None, 3)[1])


@pytest.mark.parametrize("n,f,k", [(8192, 131072, 64), (10**6, 2**24, 256)])
def test_extra_memory_is_bounded(monkeypatch, n, f, k):
    monkeypatch.undo()
    design, config = encode_module.named("fused"), fused.FusedConfig()
    rows = design.rows_at_once(n, k, 4096)
    held = rows * (4 * design.chunks.columns(rows, f) + config.bytes_per_row(k))
    assert rows == 4096 and held <= 256 << 20


def test_first_phase_fits_and_phases_cover_the_columns():
    config = fused.FusedConfig()
    for k in (1, 64, fused.MAX_K):
        for f in (1, 1000, 131072, 2**24):
            phases = config.phases(k, f)
            assert phases[0][0] == 0 and phases[-1][1] == f
            assert min(f, k) <= phases[0][1] <= 8 * config.records
            assert all(a[1] == b[0] for a, b in itertools.pairwise(phases))
            assert all(k * (end / begin - 1) <= config.records / 2 for begin, end in phases[1:])


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=lambda n: f"{n} levels")
def test_reselection_does_not_depend_on_the_order_of_records(levels):
    """Programs race for slots: keys are cut while equal scores of lower columns are to come."""
    rows, records, k, f = 4, 32, 5, 200
    g = torch.Generator().manual_seed(levels)
    first = (32 * torch.arange(8)[:, None] + 2 * torch.arange(4)).flatten().int()
    offsets = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    scores = torch.randint(levels, (rows, 256), generator=g).float()
    config = keys_module.FilterConfig(32, 16, 1)
    best = keys_module.BestKeys(rows, k, torch.device(DEVICE), config)
    order = torch.stack([torch.randperm(32, generator=g) for _ in range(rows)])
    columns = first[order]
    held = scores.gather(1, (columns[:, :, None] + offsets).flatten(1))
    recorded = torch.full((rows, 8), records, dtype=torch.int32)
    recorded[3] = records + 1
    overflow = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    fused._reselect_kernel[(rows,)](
        held.to(DEVICE), columns.to(DEVICE), recorded.to(DEVICE), best.keys, best.held,
        best.threshold, overflow, k, f, RECORDS=records, LAST=False, **config.sizes(), num_warps=1,
    )  # fmt: skip
    assert overflow.tolist() == [0, 0, 0, 1] and best.held.tolist() == [k, k, k, 0]
    truth = scores[:, :f].sort(dim=1, descending=True, stable=True)
    indices = torch.empty(rows, k, dtype=torch.int32, device=DEVICE)
    keys_module.decode_keys(best.finish(), None, indices, False)
    assert torch.equal(indices[:3].cpu().long(), truth.indices[:3, :k])
    thresholds = best.threshold.cpu()
    assert torch.equal(thresholds[:3].view(torch.float32), truth.values[:3, k - 1])
    assert thresholds[3] == 2**31 - 1
