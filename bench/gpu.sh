#!/usr/bin/env bash
# One command on a machine with a GPU: builds from source, tests the CUDA ops, measures them beside their floors and
# peers, and runs them in Triton and under compute-sanitizer. Writes docs/gpu.md, and JSON and logs to runs/gpu. Under ten
# minutes whatever happens; needs no network, only what is installed: torch with CUDA (which brings triton), nvcc, a C++
# compiler, ninja, setuptools, pybind11, pytest, transformers, safetensors; peers are used where they are.
#
#     bash bench/gpu.sh
#
# Every section runs even if an earlier one failed; the exit status says whether all went well. Without a GPU it is a dry
# run: the tests' host imitation of one, Triton's interpreter, and a toy size for the benchmark on the CPU, reported in
# runs/gpu alone. What it has no time for is the demo, end to end on the GPU:
#
#     rbfast demo --device cuda --out runs/demo-gpu
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
"$PYTHON" -c 'import torch' || { echo "$PYTHON has no torch: set PYTHON to the interpreter that has it"; exit 2; }
OUT=runs/gpu
export PYTHONPATH=$PWD
mkdir -p "$OUT"
failed=()

# section NAME SECONDS COMMAND...
section() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  printf '== %s: ' "$name"
  if timeout $((limit * slack)) "$@" >"$OUT/$name.log" 2>&1; then
    echo "ok, $((SECONDS - start)) s; $(tail -n 1 "$OUT/$name.log")"
  else
    echo "FAILED after $((SECONDS - start)) s, see $OUT/$name.log"
    tail -n 25 "$OUT/$name.log"
    failed+=("$name")
  fi
}

capability=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".") if torch.cuda.is_available() else None')
if [ -n "$capability" ]; then
  [ "$capability" = 9.0 ] && capability=9.0a
  export RBFAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
  where="cuda and not hopper and not ampere and not starved"
  bench=(--device cuda --table docs/gpu.md)
  interpret=0
  slack=1
else
  echo "no GPU here: this is a dry run"
  where="hopper"
  bench=(--device cpu --toy --table "$OUT/gpu.md")
  interpret=1
  slack=4
fi
small="(test_any_strides or test_empty or test_activations or test_supports or test_no_rows or test_extreme) and $where"
# Few of the cases: each compiles kernels of its own.
in_triton="(columns_match and shape2) or near_the_teacher or in_place or outside_the_vocabulary"
test=("$PYTHON" -m pytest -q -p no:cacheprovider)

# The limits add up to 570 seconds.
section build 120 "$PYTHON" setup.py build_ext --inplace
section tests 100 "${test[@]}" tests/test_cuda.py tests/test_cuda_columns.py tests/test_cuda_rows.py \
  -k "test_cuda.py or ($where)"
section bench 180 "$PYTHON" bench/bench_gpu.py "${bench[@]}" --json "$OUT/gpu.json"
section triton 70 env TRITON_INTERPRET=$interpret "${test[@]}" tests/test_triton.py -k "$in_triton"
if [ -n "$capability" ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Without torch's own pool of memory, in which a read past a tensor ends in the next one and is not noticed.
    section "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "${test[@]}" -x tests/test_cuda_columns.py tests/test_cuda_rows.py -k "$small"
  done
else
  echo "== memcheck, racecheck: skipped, they need a GPU and compute-sanitizer"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
