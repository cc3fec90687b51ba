#!/usr/bin/env bash
# Measures llama-jax on a machine with one GPU, within 9 minutes: bench/gpu.sh [--toy]
#
# The machine needs this repository, and Python with jax (for CUDA), flax and numpy. The steps run in
# the order in which their results matter, so that a run that is cut off has the most important ones.
# Each step writes a JSON file into $OUT (default: .bench/gpu) as soon as it ends, and STEP.partial.json
# while it runs. It has a deadline, and a step that fails does not stop the others. $OUT/machine.tar.gz
# has the logs, what XLA's autotuner found, and XLA's description of the GPU.
#
# The exit status is 0 if every step ran, whether or not it met its goals, and 1 otherwise.
#
#   STEPS     which of them to run, to go on after a run that was cut off (default: all)
#   PYTHON    the interpreter (default: python3)
#   LIMIT     seconds for everything (default: 530)
#   --toy     tiny sizes on the CPU, and five times as long for each step: to test this script
set -u
cd "$(dirname "$0")/.." || exit 1

toy=() patience=1
case "${1-}" in
  "") ;;
  --toy)
    toy=(--toy) patience=5
    export JAX_PLATFORMS=cpu
    ;;
  *)
    echo "usage: bench/gpu.sh [--toy]" >&2
    exit 2
    ;;
esac

all="rates attention sanitize_attention products step model_70b int4 sanitize_int4 model_8b"
steps=${STEPS:-$all}
for name in $steps; do
  [[ " $all " == *" $name "* ]] || { echo "STEPS: $name is none of $all" >&2; exit 2; }
done

python=${PYTHON:-python3}
limit=${LIMIT:-$((530 * patience))}
out=$(realpath -m "${OUT:-.bench/gpu}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/kept"

export PYTHONUNBUFFERED=1
# 70 GB of weights must fit on a card of 80 GB; the default is 75 %.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# With a cache of its own, JAX keeps the results of the autotuner, too: later steps reuse them.
cache=${JAX_COMPILATION_CACHE_DIR:-$work/cache}
export JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export COLUMNS=130 # of the tables

summary=() failed=0
stopped=" " # the steps that did not end

# wanted NAME: whether to run a step.
wanted() { [[ " $steps " == *" $1 "* ]]; }

# report NAME WHAT: notes how a step ended.
report() {
  summary+=("$(printf '%-18s %s (at %d s)' "$1" "$2" "$SECONDS")")
  echo "--- ${summary[-1]}"
  local autotuned=$cache/xla_gpu_per_fusion_autotune_cache_dir
  [[ -d $autotuned ]] && cp -rT "$autotuned" "$work/kept/autotuned"
  tar -czf "$out/machine.tar.gz" -C "$work/kept" .
}

# seconds_for DEADLINE: the smaller of a deadline and the seconds that are left.
seconds_for() {
  local left=$((limit - SECONDS)) deadline=$(($1 * patience))
  echo $((deadline < left ? deadline : left))
}

# step NAME DEADLINE MEASUREMENT [OPTION...]: runs one measurement of `python -m bench`.
step() {
  local name=$1 seconds status
  wanted "$name" || return
  seconds=$(seconds_for "$2")
  rm -f "$out/$name.json" "$out/$name.partial.json"
  if ((seconds < 5)); then
    failed=1
    report "$name" "skipped: no time is left"
    return
  fi
  echo "=== $name (at most $seconds s)"
  timeout --kill-after=5 "$seconds" "$python" -m bench "${@:3}" "${toy[@]}" \
    --output "$out/$name.json" 2>&1 | tee "$work/kept/$name.txt"
  status=${PIPESTATUS[0]}
  rm -f "$out/$name"*.svg # `python -m bench report` draws them again
  # Status 1 is a missed goal, and also that of a traceback, which leaves no result.
  if ((status <= 1)) && [[ -e $out/$name.json ]]; then
    report "$name" "$( ((status)) && echo "ran, and missed a goal" || echo "ran")"
  else
    failed=1
    if ((status == 124 || status == 137)); then
      stopped+="$name "
      report "$name" "stopped after $seconds s"
    else
      report "$name" "failed with status $status"
    fi
  fi
}

# sanitize NAME DEADLINE MEASUREMENT [OPTION...]: runs the small checks of a measurement again under
# compute-sanitizer, where it is installed.
sanitize() {
  local name=$1 seconds log=$work/kept/$1.txt
  wanted "$name" && command -v compute-sanitizer >/dev/null || return
  # What hangs would hang again, and take the time of later steps.
  [[ $stopped == *" ${name#sanitize_} "* ]] && return
  seconds=$(seconds_for "$2")
  ((seconds < 5)) && return
  rm -f "$work/sanitized.json"
  # Each array in memory of its own, so that an access beyond it is noticed.
  XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout --kill-after=5 "$seconds" \
    compute-sanitizer --tool memcheck --report-api-errors no \
    "$python" -m bench "${@:3}" --check-only --small "${toy[@]}" \
    --output "$work/sanitized.json" >"$log" 2>&1
  case $(grep -o 'ERROR SUMMARY: [0-9][0-9]*' "$log" | tail -1) in
    "ERROR SUMMARY: 0")
      # It also says so of a program that failed before the first kernel.
      if [[ -e $work/sanitized.json ]]; then
        report "$name" "found nothing"
      else
        report "$name" "did not run to its end: $(grep -v '^=========' "$log" | tail -1)"
      fi
      ;;
    "ERROR SUMMARY: "*)
      failed=1
      report "$name" "FOUND ERRORS"
      grep -m 20 '^=========' "$log"
      ;;
    *) report "$name" "did not run here: $(tail -1 "$log")" ;;
  esac
}

nvidia-smi >"$work/kept/nvidia-smi.txt" 2>&1
XLA_FLAGS="--xla_dump_to=$work/xla ${XLA_FLAGS-}" step rates 60 roofline
description=$(find "$work/xla" -name '*gpu_target_config.pbtxt' -print -quit 2>/dev/null)
[[ $description ]] && cp "$description" "$work/kept/gpu_target_config.pbtxt"
rm -rf "$work/xla"
step attention 110 attention
sanitize sanitize_attention 50 attention
step products 140 products --formats int8 fp8 bfloat16
step step 190 step
step model_70b 120 model --cases b5 --quantize fp8
# In a process of its own: a kernel that crashes takes the GPU from its process.
step int4 130 products --formats int4
sanitize sanitize_int4 40 products
step model_8b 110 model --cases b2 b3

echo
printf '%s\n' "${summary[@]}"
echo "results in $out"
exit $failed
