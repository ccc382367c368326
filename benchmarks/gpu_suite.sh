#!/usr/bin/env bash
# Everything that a machine with a GPU can add, in under ten minutes: build, GPU tests,
# compute-sanitizer, benchmarks; prints each kernel against this run's ceilings and the target
# table, and writes benchmarks/results/<device>/<date>-<commit>.json. Needs no network.
#
#   benchmarks/gpu_suite.sh              run; stages that this commit has finished are not repeated
#   benchmarks/gpu_suite.sh --dry-run    list the stages, their limits, and which are done
#   benchmarks/gpu_suite.sh --fresh      forget what this commit has finished, then run
#
#   PYTHON=python3   interpreter, with a torch that has CUDA
#   STATE=DIR        where finished stages and their output are kept (default build/gpu_suite)
#   DEVICE_CHECK=CMD what must succeed for a GPU to be there (default: asks torch)
#
# A stage over its limit is stopped and stays undone; the others still run. The exit status is the
# number of stages that failed. Unverified on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain -- fastsae csrc triton_kernels 2>/dev/null)" ] || commit+=+
state=${STATE:-build/gpu_suite}/$commit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# name, limit in seconds; 600 in all
stages="build:100 tests:95 sanitizer:40 bench:50 plots:45 encode:55 grid:60 gather:30 step:50
  largest:25 hopper:40 report:10"

case ${1:-} in
  "" ) ;;
  --fresh) rm -rf "$state" ;;
  --dry-run)
    for stage in $stages; do
      name=${stage%:*}
      done=; [ -e "$state/$name.done" ] && done="  done"
      printf '%-10s %4d s%s\n' "$name" "${stage#*:}" "$done"
    done
    exit 0 ;;
  *) echo "gpu_suite.sh: unknown option $1 (--dry-run, --fresh)" >&2; exit 2 ;;
esac

ask='import sys, torch; sys.exit(not torch.cuda.is_available())'
if ! ${DEVICE_CHECK:-"$python" -c "$ask"} >/dev/null 2>&1; then
  echo "gpu_suite.sh: no GPU that $python's torch can use (PYTHON names another): nothing was run" >&2
  exit 3
fi
mkdir -p "$state"

targets() { "$python" benchmarks/gpu_targets.py "$1" --out "$state/$1.json"; }

# The functions run in a shell of their own, under `timeout`.
stage_build() {
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  case $arch in 90|100) arch+=a ;; esac
  FASTSAE_BUILD=1 FASTSAE_CUDA=1 FASTSAE_CUDA_ARCHS=$arch "$python" setup.py build_ext --inplace
}
stage_tests() {
  local workers=
  "$python" -c 'import xdist' 2>/dev/null && workers="-n 8"  # they mostly wait for Triton to compile
  "$python" -m pytest -q -p no:cacheprovider $workers --ignore tests/test_topk_encode_hopper.py \
    tests/test_cuda_kernels.py tests/test_sparse_*.py tests/test_topk.py tests/test_topk_encode*.py tests/test_topk_member.py \
    tests/test_steer.py tests/test_bench.py tests/test_training_graph.py \
    -k "cuda or triton or gpu or fused or fp8"
}
stage_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then echo "no compute-sanitizer here: skipped"; return; fi
  compute-sanitizer --error-exitcode 1 "$python" -m fastsae bench --device cuda --quick \
    --shapes 33x72x1025 --k 7
}
stage_bench() {
  "$python" -m fastsae bench --device cuda --json "$state/bench.json" --backends cuda,triton \
    --shapes 8192x768x131072
}
stage_plots() {
  "$python" -m fastsae bench --device cuda --quick --plot "$state/plots" --backends cuda,triton \
    --shapes 8192x768x131072 --k 64 --ops topk_encode,sparse_decode,sparse_adam_step
}
stage_encode() { targets encode; }
stage_grid() { targets grid; }
stage_gather() { targets gather; }
stage_step() { targets step; }
stage_largest() { targets largest; }
stage_hopper() {
  timeout --kill-after=2 30 "$python" -m pytest -q -p no:cacheprovider \
    tests/test_topk_encode_hopper.py && targets hopper
}
stage_report() { "$python" benchmarks/gpu_targets.py report --state "$state"; }

if [ -n "${GPU_SUITE_STAGE:-}" ]; then "stage_$GPU_SUITE_STAGE"; exit; fi

failed=0
for stage in $stages; do
  name=${stage%:*}
  if [ -e "$state/$name.done" ] && [ "$name" != report ]; then
    echo "== $name: done before, at $(cat "$state/$name.done")"
    continue
  fi
  echo "== $name (at most ${stage#*:} s)"
  start=$SECONDS
  GPU_SUITE_STAGE=$name timeout --kill-after=10 "${stage#*:}" "$0" 2>&1 | tee "$state/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 0 ]; then
    date -u +%Y-%m-%dT%H:%M:%SZ >"$state/$name.done"
    echo "== $name: $((SECONDS - start)) s"
  else
    failed=$((failed + 1))
    echo "== $name: failed with status $status after $((SECONDS - start)) s" >&2
  fi
done
exit "$failed"
