#!/usr/bin/env bash
# One command on a machine with a GPU, in under five minutes: builds the CUDA ops for that GPU, runs the commands and the
# tests that need one, measures every op beside its floor and its peers, and shows where a training step's time goes.
# Needs no network, but these installed: torch with CUDA (which brings triton), nvcc, a C++ compiler, ninja, setuptools,
# pybind11, pytest, pytest-benchmark and what rbfast requires; pytest-xdist and peers are used if installed.
#
#     bash bench/gpu.sh                                  # writes docs/gpu.md, and JSON and logs to runs/gpu
#     bash bench/gpu.sh --no-build                       # with the existing rbfast/_C_cuda*.so
#     bash bench/gpu.sh --profile "column_grad 14B"      # one case's kernels under ncu, nothing else
#
# A line for each section; every section runs even if an earlier one failed, and the exit status says whether all went
# well. The last lines are a table of all cases with their bars. If OUT is set, the page and the JSON are copied there.
# Without a GPU it is a dry run: toy sizes on the CPU, reported in runs/gpu alone.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$PYTHON" -c 'import torch' || { echo "$PYTHON has no torch: set PYTHON to the interpreter that has it"; exit 2; }
LOGS=runs/gpu
export PYTHON PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=()
case ${1:-} in
  "" | --no-build | --profile) ;;
  *) echo "expected --no-build, --profile CASE or nothing, got $1"; exit 2 ;;
esac

capability=$("$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep=".") if torch.cuda.is_available() else None')
[ "$capability" = None ] && capability=
if [ "${1:-}" = --profile ]; then
  [ -n "$capability" ] || { echo "--profile needs a GPU"; exit 2; }
  exec ncu --profile-from-start off --clock-control none --section SpeedOfLight --section Occupancy --section LaunchStats \
    --section MemoryWorkloadAnalysis --section WarpStateStats "$PYTHON" bench/run.py "${2:?name a case}" --device cuda --once
fi

mkdir -p "$LOGS"
rm -f "$LOGS"/*.log "$LOGS"/*.go "$LOGS"/cases.jsonl "$LOGS"/kernels.txt
TOTAL=${TOTAL:-295}  # seconds for all sections together, so that a slow one cannot use up the GPU's time

# allow LOG SECONDS: sets `limit` to SECONDS or to the time left; fails if none is left.
allow() {
  limit=$2
  if [ -z "$capability" ]; then
    limit=$((limit * 4))  # a dry run shares a smaller machine with others
  elif [ $((TOTAL - SECONDS)) -lt "$limit" ]; then
    limit=$((TOTAL - SECONDS))
  fi
  [ "$limit" -ge 3 ] || { echo "no time is left for it" >>"$1"; return 124; }
}

# bounded NAME SECONDS COMMAND...: runs COMMAND within a time limit; returns its exit status, 124 on a timeout.
bounded() {
  local log=$LOGS/$1.log limit
  allow "$log" "$2" || return
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
}

# tell NAME STATUS SINCE: prints the section's line.
tell() {
  if [ "$2" = 0 ]; then
    echo "== $1: ok, $((SECONDS - $3)) s; $(tail -n 1 "$LOGS/$1.log" | cut -c1-150)"
  else
    echo "== $1: FAILED ($2) after $((SECONDS - $3)) s, see $LOGS/$1.log"
    if grep -q '^FAILED\|^ERROR\| FAILS ' "$LOGS/$1.log"; then
      grep '^FAILED\|^ERROR\| FAILS ' "$LOGS/$1.log" | cut -c1-300 | head -n 20
      tail -n 1 "$LOGS/$1.log" | cut -c1-150
    else
      tail -n 5 "$LOGS/$1.log" | cut -c1-200
    fi
    failed+=("$1")
  fi
}

# section NAME SECONDS COMMAND...
section() {
  local start=$SECONDS name=$1
  bounded "$@"
  tell "$name" $? "$start"
}

# beside NAME SECONDS COMMAND...: like section, but in the background; wait_for_all prints its line.
names=() pids=()
beside() {
  bounded "$@" &
  names+=("$1") pids+=($!)
}

# prepare NAME ARGUMENTS...: starts a bench/run.py that imports what it needs while untimed sections run, then waits for
# `timed NAME SECONDS`. Each runs in its own process, so that a crash (an illegal access ends the process) spares the
# others.
declare -A waiting=()
trap '[ ${#waiting[@]} = 0 ] || kill "${waiting[@]}" 2>/dev/null' EXIT
prepare() {
  local name=$1
  shift
  "$PYTHON" -W ignore bench/run.py --after "$LOGS/$name.go" "$@" >"$LOGS/$name.log" 2>&1 &
  waiting[$name]=$!
}

timed() {
  local name=$1 start=$SECONDS pid=${waiting[$1]} status limit
  if allow "$LOGS/$name.log" "$2"; then
    touch "$LOGS/$name.go"
    timeout "$limit" tail --pid="$pid" -f /dev/null || kill -9 "$pid"
  else
    kill "$pid"
  fi
  wait "$pid" 2>/dev/null
  status=$?
  unset "waiting[$name]"
  tell "$name" "$status" "$start"
}

wait_for_all() {
  local start=$1 i
  for i in "${!pids[@]}"; do
    wait "${pids[$i]}"
    tell "${names[$i]}" $? "$start"
  done
}

is_built() {
  local built
  built=$(ls rbfast/_C_cuda*.so 2>/dev/null | head -n 1)
  [ -n "$built" ] && [ -z "$(find csrc setup.py -newer "$built" -type f | head -n 1)" ]
}

export COLUMNS=300  # pytest truncates the messages of failed tests to the width of the screen
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --tb=short --show-capture=no)
if [ -n "$capability" ]; then
  [ "$capability" = 9.0 ] && capability=9.0a
  export RBFAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
  if [ "${1:-}" = --no-build ] || is_built; then
    echo "== build: skipped, $(ls rbfast/_C_cuda*.so)"
  else
    section build 180 "$PYTHON" setup.py build_ext --inplace
  fi
  size=() page=docs/gpu.md
else
  echo "no GPU here: this is a dry run"
  size=(--toy) page=$LOGS/gpu.md
fi

cases=(--device cuda --peers "${size[@]}" --record "$LOGS/cases.jsonl")
quiet=(-- --tb=line --show-capture=no -W ignore)
prepare ops "${cases[@]}" rows columns accuracy fold "${quiet[@]}"
prepare loss "${cases[@]}" loss "${quiet[@]}"
prepare steps "${cases[@]}" step trainer teacher mixture "${quiet[@]}"
prepare kernels --device cuda "${size[@]}" --kernels 12 "four 7B" "top-k frozen"

if [ -n "$capability" ]; then  # everything that is not timed, in parallel
  start=$SECONDS
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8) || workers=()
  not_the_host=$("$PYTHON" -c 'import sys; sys.path.append("tests/support"); from cuda_devices import HOSTS
print(*(f"not {name}" for name in HOSTS), "not under_the_interpreter", sep=" and ")')
  mapfile -t on_gpu < <(grep -rl --include='test_*.py' 'not torch\.cuda\.is_available\|cuda_devices' tests)
  beside tests 120 env OMP_NUM_THREADS=2 "${pytest[@]}" "${workers[@]}" "${on_gpu[@]}" -k "$not_the_host"
  beside smoke 90 "$PYTHON" bench/smoke.py
  if command -v compute-sanitizer >/dev/null; then
    small="(test_any_strides or test_empty or test_activations or test_matrices or test_supports or test_no_rows or \
test_bits or test_extreme)"
    for tool in memcheck racecheck; do
      # Without torch's caching allocator, in which a read past a tensor lands in the next one and goes unnoticed.
      beside "$tool" 80 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "${pytest[@]}" -x tests/ops/test_cuda_columns.py tests/ops/test_cuda_rows.py -k "$small and $not_the_host"
    done
  fi
  wait_for_all "$start"
fi

timed ops 75
timed loss 90
timed steps 80
timed kernels 30
cp "$LOGS/kernels.log" "$LOGS/kernels.txt"
[ -n "$capability" ] && head -n 30 "$LOGS/kernels.txt" | cut -c1-90

"$PYTHON" bench/gpu_page.py "$LOGS/cases.jsonl" --page "$page" --json "$LOGS/gpu.json" --kernels "$LOGS/kernels.txt"
if [ -n "${OUT:-}" ]; then
  cp "$page" "$LOGS"/*.json "$LOGS"/*.log "$OUT"
fi
echo "$SECONDS s; wrote $page and $LOGS/gpu.json${failed[*]:+; failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
