#!/usr/bin/env bash
# One command on a machine with a GPU: builds from source, tests the CUDA ops, runs them under compute-sanitizer, and
# measures them beside their floors and peers. Writes docs/gpu.md, and JSON and logs to runs/gpu. About ten minutes; needs
# no network, only what is installed: torch with CUDA, nvcc, ninja, setuptools, pytest; peers are used where they are.
#
#     bash bench/gpu.sh
#
# Every section runs even if an earlier one failed; the exit status says whether all went well. Without a GPU it is a dry
# run: the tests' host imitation of one, and a toy size for the benchmark on the CPU, reported in runs/gpu alone.
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
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
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
else
  echo "no GPU here: this is a dry run"
  where="hopper"
  bench=(--device cpu --toy --table "$OUT/gpu.md")
fi
small="(test_any_strides or test_empty or test_activations or test_supports or test_no_rows or test_extreme) and $where"

section build 200 "$PYTHON" setup.py build_ext --inplace
section tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_cuda_columns.py \
  tests/test_cuda_rows.py -k "test_cuda.py or ($where)"
if [ -n "$capability" ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    section "$tool" 75 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -q -x \
      -p no:cacheprovider tests/test_cuda_columns.py tests/test_cuda_rows.py -k "$small"
  done
else
  echo "== memcheck, racecheck: skipped, they need a GPU and compute-sanitizer"
fi
section bench 240 "$PYTHON" bench/bench_gpu.py "${bench[@]}" --json "$OUT/gpu.json"

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
