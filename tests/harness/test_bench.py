"""`fastsae bench`: verified rows, wrong results reported and not timed, JSON and plots."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from fastsae import _dispatch, reference
from fastsae.bench import checks, run
from fastsae.bench.cases import CASES, Inputs, Size, product
from fastsae.bench.inputs import normal, random_pairs, unit_rows
from fastsae.bench.machine import has_onednn_in_fp32
from fastsae.bench.timing import Contender, WallClock, WrongError, measure

typer_testing = pytest.importorskip("typer.testing")
SMALL = ["--shapes", "24x16x256", "--k", "4", "--quick"]
SIZE = Size(24, 16, 256, 4)
LIBRARIES = 2 if has_onednn_in_fp32() else 1


def bench(*arguments: str):
    from fastsae.cli.app import app

    return typer_testing.CliRunner().invoke(app, ["bench", "--in-process", *arguments])


def test_every_registered_op_has_a_case():
    assert set(CASES) == set(_dispatch.OPS), "add the new op to fastsae/bench/cases.py"


def test_every_timed_call_takes_the_next_set_of_inputs():
    taken: list[tuple[str, int]] = []
    contenders = [Contender(name, lambda i, n=name: taken.append((n, i))) for name in "ab"]
    measure(contenders, rounds=3, seconds=10.0, warmup=0)
    timed = taken[2:]  # after one verifying call each
    assert len(timed) >= 6 and [n for n, _ in timed] == ["a", "b"] * (len(timed) // 2)
    assert [i for _, i in timed] == list(range(1, len(timed) + 1))


@pytest.mark.parametrize(
    "backends",
    # interpreted GPU kernels take a minute to time; no user's machine does
    ["reference,cpu", pytest.param("reference,cpu,triton,cuda", marks=pytest.mark.slow)],
)
def test_json_holds_every_op_on_every_usable_backend(tmp_path, backends):
    target = str(tmp_path / "deep" / "found.json")
    result = bench(*SMALL, "--backends", backends, "--json", target)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert set(found) == {"schema", "device", "machine", "ceilings", "rows"}
    assert found["schema"] == run.SCHEMA and found["device"] == "cpu"
    assert set(found["ceilings"]) == {"tflops", "copy_gbps", "gather_gbps"}
    assert all(v > 0 for v in found["ceilings"].values())
    seen = {(r["op"], r["backend"]) for r in found["rows"]}
    for op in _dispatch.OPS:
        for backend in run.usable(op, "cpu", torch.float32):
            assert ((op, backend) in seen) == (backend in backends.split(","))
    assert ("topk_encode", "eager") in seen and ("topk", "eager") in seen
    assert sum(r["op"] == "product" for r in found["rows"]) == LIBRARIES  # once a size
    for row in found["rows"]:
        assert (row["N"], row["D"], row["F"], row["K"]) == (24, 16, 256, 4)
        assert row["verified"] and 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert row["of_product"] > 0 and row["peak_mb"] >= 0 and row["note"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_eager_low_precision_is_verified_too(dtype, monkeypatch):
    """Its own rounding is allowed, a wrong selection is not."""
    options = [*SMALL, "--ops", "topk_encode", "--backends", "cpu", "--dtype", dtype]
    right = bench(*options)
    assert right.exit_code == 0 and "not compared" not in right.stdout
    monkeypatch.setattr(
        run, "eager", lambda op, size, given: lambda i: torch.topk(given.scores[0], size.k)
    )
    wrong = bench(*options)
    assert wrong.exit_code == 1 and "wrong, not timed" in wrong.stdout


def test_output_is_one_header_one_table_and_the_ceilings():
    result = bench(*SMALL, "--ops", "sparse_decode,topk", "--backends", "reference")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("# ") and f"torch {torch.__version__}" in lines[0]
    assert lines[1].split()[:4] == ["op", "backend", "shape", "dtype"]
    assert [line.split()[0] for line in lines[2:]] == [
        *["product"] * LIBRARIES, "sparse_decode", "topk", "topk", "ceilings",
    ]  # fmt: skip
    assert "24 of 24" not in result.stdout and "24x16x256 k=4" in lines[2]


@pytest.mark.parametrize("op", ["sparse_decode", "topk_encode"])
def test_a_wrong_backend_is_reported_not_timed_and_the_exit_code_says_so(op, monkeypatch, tmp_path):
    right = getattr(reference, op)

    def wrong(*args):
        result = right(*args)
        if op == "sparse_decode":
            return result * 1.001
        return result[0], (result[1] + 1) % args[1].shape[0]

    monkeypatch.setattr(reference, op, wrong)
    _dispatch.forget()
    try:
        options = ("--ops", op, "--backends", "reference,cpu")
        result = bench(*SMALL, *options, "--json", str(tmp_path / "found.json"))
    finally:
        _dispatch.forget()
    assert result.exit_code == 1
    assert "wrong, not timed" in result.stdout and "1 of " in result.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    (row,) = [r for r in rows if r["backend"] == "reference"]
    assert not row["verified"] and row["wrong"] and "ms" not in row and "gbps" not in row
    assert all(r["verified"] and "ms" in r for r in rows if r is not row)


def test_a_backend_that_raises_is_an_error(monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(reference, "sparse_decode", broken)
    _dispatch.forget()
    try:
        result = bench(*SMALL, "--ops", "sparse_decode", "--backends", "reference")
    finally:
        _dispatch.forget()
    assert result.exit_code == 1 and "RuntimeError: no such kernel" in result.stdout


def test_what_does_not_fit_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(run, "free_bytes", lambda device: 60_000)  # the product fits, eager not
    rows = run.one("topk_encode", SIZE, Inputs(SIZE), run.Plan(rounds=1, seconds=0.1), WallClock())
    (skipped,) = [r for r in rows if r["backend"] == "eager"]
    assert skipped["note"].startswith("skipped: needs") and "ms" not in skipped
    assert not run.bad(rows) and len(rows) > 2
    assert run.cells(skipped)[-1] == skipped["note"]


def test_plots_are_images(tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    result = bench(*SMALL, "--ops", "topk_encode,sparse_decode", "--backends", "reference,cpu",
                   "--plot", str(tmp_path))  # fmt: skip
    assert result.exit_code == 0, result.output
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"roofline.png", "scaling_F.png", "scaling_N.png"}
    for name in names:
        pixels = matplotlib_image.imread(tmp_path / name)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 800
        assert 0.01 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.5  # ink, and not all ink


def test_plots_without_matplotlib_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench(*SMALL, "--plot", str(tmp_path / "plots"))
    assert result.exit_code == 2 and "matplotlib" in result.stderr
    assert "pip install" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--ops", "topk,encode"], "--ops encode: unknown, one of topk_encode, topk"),
        (["--backends", "gpu"], "--backends gpu: unknown"),
        (["--shapes", "24x16"], "--shapes 24x16: a shape is NxDxF"),
        (["--k", "0"], "--k 0: a whole number from 1"),
        (["--shapes", "8x8x8", "--k", "9"], "--k 9 is more than the 8 latents"),
        (["--dtype", "int8"], "--dtype int8: unknown"),
        (["--device", "potato"], "--device potato is no torch device"),
        (["--device", "meta"], "only cpu and cuda"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    result = bench("--device", "cuda")
    assert result.exit_code == 2 and "finds no such GPU" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tmp_path):
    result = bench(*SMALL, "--device", "cuda", "--json", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine"]["gpu"] and all(r["verified"] for r in found["rows"])


# ---- the checks themselves: each must see what it is for ----------------------------------------

X, W = normal(9, 16, seed=0), unit_rows(64, 16, seed=1)
VALUES, INDICES = random_pairs(9, 4, 64, seed=2)


def nan(t: torch.Tensor) -> torch.Tensor:
    return torch.full_like(t, float("nan"))


def encoded():
    return reference.topk_encode(X, W, None, 4, True, None)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v, i: (v, i.roll(1, 0)),
        lambda v, i: (nan(v), i),
        lambda v, i: (v * 1.01, i),
        lambda v, i: (v, torch.full_like(i, 64)),
        lambda v, i: (v, i[:, :1].expand_as(i)),
        lambda v, i: (v[:, :3], i[:, :3]),
    ],
    ids=["other rows", "nan", "values", "out of range", "repeated", "shape"],
)
def test_selection_sees(spoil):
    check = checks.selection(X, W, None, 4)
    assert check(encoded()) == "9/9 rows exact"
    with pytest.raises(WrongError):
        check(spoil(*encoded()))


def test_selection_in_slabs_is_the_whole(monkeypatch):
    whole = checks.fp64_top(X, W, None, 4)
    monkeypatch.setattr(checks, "SLAB", 16 * 7)  # seven latents at a time
    indices, kth = checks.fp64_top(X, W, None, 4)
    assert torch.equal(indices, whole[0])
    torch.testing.assert_close(kth, whole[1], rtol=1e-13, atol=0)  # BLAS sums in another order


def test_other_checks_see_a_small_error_and_nan():
    grad = normal(9, 16, seed=3)
    dense = reference.sparse_grad_weight(VALUES, INDICES, grad, 64)
    pairs = [
        (checks.largest(X, 3), reference.topk(X, 3)),
        (checks.decoded(VALUES, INDICES, W), reference.sparse_decode(VALUES, INDICES, W, None)),
        (checks.grad_values(grad, INDICES, W), reference.sparse_grad_values(grad, INDICES, W)),
        (checks.grad_weight(VALUES, INDICES, grad, 64), dense),
    ]
    for check, right in pairs:
        check(right)
        pick = right[0] if isinstance(right, tuple) else right
        for bad in (pick * 1.001, nan(pick)):
            with pytest.raises(WrongError):
                check((bad, right[1]) if isinstance(right, tuple) else bad)
    rows = checks.grad_weight(VALUES, INDICES, grad, 64)
    latents, grads = reference.sparse_grad_weight_rows(VALUES, INDICES, grad, 64)
    rows((latents, grads))
    for bad in ((latents.flip(0), grads), (latents, grads * 1.001)):
        with pytest.raises(WrongError):
            rows(bad)


@pytest.mark.parametrize("wrong", ["moments", "update", "nothing"])
def test_adam_check_sees(wrong):
    from fastsae.ops import sparse_adam_step

    grad = normal(9, 16, seed=3)
    checks.adam(sparse_adam_step, W, VALUES, INDICES, grad, 1e-3)(None)

    def step(param, mean, square, *args, **options):
        if wrong == "nothing":
            return
        sparse_adam_step(param, mean, square, *args, **options)
        if wrong == "moments":
            mean *= 1.01
        else:
            param += 1e-4

    with pytest.raises(WrongError):
        checks.adam(step, W, VALUES, INDICES, grad, 1e-3)(None)


def test_the_product_is_checked_too():
    case = product(SIZE, Inputs(SIZE))
    assert "max error" in case.check(case.run(0))
    with pytest.raises(WrongError):
        case.check(case.run(0) * 1.01)
