#!/usr/bin/env bash
# Everything that a machine with a GPU can add, in two runs of under ten minutes each: build, known
# answers, compute-sanitizer, GPU tests, benchmarks; prints each kernel against this run's ceilings
# and the target table, and writes benchmarks/results/<device>/<date>-<commit>.json. No network.
#
#   benchmarks/gpu_suite.sh              run; stages that this commit has finished are not repeated
#   benchmarks/gpu_suite.sh --dry-run    list the stages, their limits, and which are done
#   benchmarks/gpu_suite.sh --fresh      forget what this commit has finished, then run
#
#   PYTHON=python3   interpreter, with a torch that has CUDA
#   STATE=DIR        where finished stages, their output, what was compiled and what was verified
#                    are kept (default build/gpu_suite)
#   BUDGET=580       seconds in all: a stage whose limit does not fit in what is left waits for the
#                    next run
#   DEVICE_CHECK=CMD what must succeed for a GPU to be there (default: asks torch)
#
# A stage over its limit is stopped, with all that it started, and stays undone; the others still
# run, and most go on where they were stopped. The exit status is the number of stages that failed,
# or 64 when none did and some wait for the next run. Unverified on a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain -- fastsae csrc triton_kernels 2>/dev/null)" ] || commit+=+
case ${STATE:-} in /*) all=$STATE ;; *) all=$PWD/${STATE:-build/gpu_suite} ;; esac
state=$all/$commit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# beside the marks of finished stages, so that the marks never outlive what they stand for
export FASTSAE_CACHE=$state/verified TRITON_CACHE_DIR=$all/triton

# Name and limit in seconds, counted for 16 cores and nothing compiled: importing torch 4 s and
# making a context 1 s a process; a Triton kernel 0.5-2 s, compiled by `warm` in all processes at
# once; one measured row 6-10 s, nvcc 60-90 s. Two runs of at most 580.
stages="build:100 warm:85 verify:145 sanitizer:120 hopper:45 tests:85
  bench:120 plots:45 encode:90 grid:105 gather:55 step:95 largest:45 report:15"
ops="topk topk_encode topk_member sparse_decode sparse_grad_values sparse_grad_weight
  sparse_grad_weight_rows sparse_adam_step steer"
tests="cuda/test_kernels ops/test_sparse_decode ops/test_sparse_grad_values
  ops/test_sparse_grad_weight ops/test_sparse_adam_step ops/test_topk ops/test_topk_encode
  triton/test_topk_encode triton/test_topk_encode_fused triton/test_topk_encode_fp8
  ops/test_topk_member ops/test_steer harness/test_bench train/test_training_graph
  train/test_ahead triton/test_batch_invariance ops/test_large_addresses"

targets() { "$python" benchmarks/gpu_targets.py "$1" --out "$state/$1.json"; }
# Runs a part of a stage for every line of stdin, so many at once; what is done is not repeated.
parts() { GPU_SUITE_STAGE="$1" xargs -P "$2" -L 1 "$0"; }
part() {
  local name=${1//[ \/]/.}
  local mark=$state/part.$name.done log=$state/part.$name.log
  [ -e "$mark" ] && return
  shift
  if "$@" >"$log" 2>&1; then touch "$mark"; else
    local status=$?
    tail -n 15 "$log"
    echo "== failed with status $status: $*, see $log" >&2
    return 1
  fi
}

# The stages run in a shell of their own, under `timeout`.
stage_build() {
  local arch
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  case $arch in 90|100) arch+=a ;; esac
  FASTSAE_BUILD=1 FASTSAE_CUDA=1 FASTSAE_CUDA_ARCHS=$arch "$python" setup.py build_ext --inplace
}
# The checks of verify, unfenced and all ops at once: what they compile is found by those after.
stage_warm() {
  printf '%s\n' $ops | parts warm_one 9
  echo "what failed here is told by verify"
}
stage_warm_one() {
  part "warm $1" timeout --foreground 75 \
    "$python" -m fastsae verify --device cuda --in-process --op "$1"
}
stage_verify() { "$python" -m fastsae verify --device cuda --json "$state/verify.json"; }
stage_sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then echo "no compute-sanitizer here: skipped"; return; fi
  local tool
  for tool in memcheck racecheck synccheck; do printf "$tool %s\n" $ops; done | parts sanitizer_one 6
}
stage_sanitizer_one() {
  part "$1 $2" timeout --foreground 110 compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$python" -m fastsae verify --device cuda --in-process --op "$2"
}
stage_hopper() {
  timeout --foreground --kill-after=2 25 "$python" -m pytest -q -p no:cacheprovider \
    tests/cuda/test_topk_encode_hopper.py && targets hopper
}
# A process for each file: they mostly wait for Triton to compile.
stage_tests() { printf '%s\n' $tests | parts tests_one 8; }
stage_tests_one() { part "tests $1" tests_of "$1"; }
tests_of() {
  "$python" -m pytest -q -p no:cacheprovider "tests/$1.py" -k "cuda or triton or gpu or fused or fp8"
  local status=$?
  return $((status == 5 ? 0 : status))  # 5: none of a file's tests is asked for
}
stage_bench() { targets bench; }
stage_plots() {
  "$python" -m fastsae bench --device cuda --quick --in-process --plot "$state/plots" \
    --backends cuda,triton --shapes 8192x768x131072 --k 64 \
    --ops topk_encode,sparse_decode,sparse_adam_step
}
stage_encode() { targets encode; }
stage_grid() { targets grid; }
stage_gather() { targets gather; }
stage_step() { targets step; }
stage_largest() { targets largest; }
stage_report() { "$python" benchmarks/gpu_targets.py report --state "$state"; }

if [ -n "${GPU_SUITE_STAGE:-}" ]; then
  "stage_$GPU_SUITE_STAGE" "$@"
  exit
fi

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

# Ends what a stage left running: its workers have sessions of their own, which `timeout` misses.
end_leftovers() {
  local found
  for found in $(grep -lzx "GPU_SUITE_RUN=$$" /proc/[0-9]*/environ 2>/dev/null); do
    found=${found#/proc/}
    kill -9 "${found%/environ}" 2>/dev/null
  done
}

failed=0 waiting=
for stage in $stages; do
  name=${stage%:*} limit=${stage#*:}
  if [ -e "$state/$name.done" ] && [ "$name" != report ]; then
    echo "== $name: done before, at $(cat "$state/$name.done")"
    continue
  fi
  if [ -n "$waiting" ] || [ $((SECONDS + limit)) -gt "${BUDGET:-580}" ]; then
    waiting+=" $name"  # the later ones too: they are in order
    continue
  fi
  echo "== $name (at most $limit s)"
  start=$SECONDS
  exec 3> >(exec tee "$state/$name.log")
  tee=$!
  GPU_SUITE_RUN=$$ GPU_SUITE_STAGE=$name timeout --kill-after=10 "$limit" "$0" >&3 2>&1 3>&-
  status=$?
  end_leftovers  # before tee is waited for, whose pipe they may hold
  exec 3>&-
  wait "$tee"
  if [ "$status" = 0 ]; then
    date -u +%Y-%m-%dT%H:%M:%SZ >"$state/$name.done"
    echo "== $name: $((SECONDS - start)) s"
  else
    failed=$((failed + 1))
    echo "== $name: failed with status $status after $((SECONDS - start)) s" >&2
  fi
done
[ -z "$waiting" ] || echo "== for the next run:$waiting"
[ "$failed" = 0 ] && [ -n "$waiting" ] && exit 64
exit "$failed"
