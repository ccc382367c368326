#!/usr/bin/env bash
# Measures every table of docs/benchmarks.md and the README, in short pieces, then writes them there.
#
#   benchmarks/run_all.sh [PIECE ...]     pieces: encode real topk backward step peers memory steer (default: all)
#
#   PYTHON=.venv/bin/python   interpreter      CACHE=DIR   activations and SAEs of the real rows
#   WRAP="nice -n -5"         put before each piece, e.g. a lock that keeps the machine quiet
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
cache=${CACHE:-$HOME/.cache/fastsae-bench}
shapes=${SHAPES:-"2048x768x24576 2048x384x12288 1024x2048x32768"}
pieces=${*:-encode real topk backward step peers memory steer}

run() { ${WRAP:-} "$python" "$@"; }

for piece in $pieces; do
  case $piece in
    encode)
      for shape in $shapes; do
        run benchmarks/bench_topk_encode.py --shapes "$shape" --k 32
        run benchmarks/bench_topk_encode.py --shapes "$shape" --k 64
        run benchmarks/bench_topk_encode.py --shapes "$shape" --k 32 --dtype bfloat16
      done ;;
    real)
      "$python" benchmarks/minilm_activations.py --cache "$cache"
      "$python" benchmarks/_real.py --cache "$cache"
      run benchmarks/bench_topk_encode.py --real --k 32 --cache "$cache" ;;
    topk)
      run benchmarks/bench_topk.py
      run benchmarks/bench_topk.py --shapes 64x16384 --k 4000 8192 16384 ;;
    backward)
      for op in sparse_decode sparse_grad_values sparse_grad_weight sparse_adam_step; do
        for shape in $shapes; do
          for k in 32 64; do run benchmarks/bench_$op.py --shapes "$shape" --k $k; done
          [ $op = sparse_adam_step ] || run benchmarks/bench_$op.py --shapes "$shape" --k 32 --dtype bfloat16
        done
      done ;;
    step)
      for shape in $shapes; do
        for k in 32 64; do
          run benchmarks/bench_training_step.py --shapes "$shape" --k $k --only '^fastsae|^product' --rounds 31
        done
      done ;;
    peers)
      for shape in $shapes; do
        for k in 32 64; do
          for peer in '^dense PyTorch, (default|oneDNN)' '^dense PyTorch, fused Adam, oneDNN' \
              '^sparsify.*oneDNN' '^SAELens.*oneDNN' '^dictionary_learning.*oneDNN'; do
            run benchmarks/bench_training_step.py --shapes "$shape" --k $k --only "$peer" --rounds 7
          done
        done
        run benchmarks/bench_training_step.py --shapes "$shape" --k 32 --compiled --only 'compiled, oneDNN' --rounds 7
      done ;;
    memory)
      run benchmarks/bench_memory.py ;;
    steer)
      run benchmarks/bench_steer.py
      for batch in 1 32; do
        run benchmarks/bench_generate.py --batches $batch --rounds 31 --texts 0
        run benchmarks/bench_generate.py --batches $batch --rounds 0 --texts 30
      done ;;
    *) echo "run_all.sh: unknown piece $piece" >&2; exit 2 ;;
  esac
done
"$python" benchmarks/make_tables.py
