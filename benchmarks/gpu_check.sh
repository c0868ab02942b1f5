#!/usr/bin/env bash
# One command for a machine with a GPU, within 9 minutes: the GPU tests, the tables against every peer that imports, a
# short tuning. Needs a python3 that has torch, triton, transformers, typer and rich; nothing has to be installed.
#
#   benchmarks/gpu_check.sh                 results into benchmarks/results/gpu
#   OUT=folder PYTHON=.venv/bin/python benchmarks/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT"
failed=()

# step NAME SECONDS COMMAND...: run it with a limit, keep what it says, go on whatever happens
step() {
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1 || code=$?
    printf '%-12s %4d s  exit %d\n' "$name" $((SECONDS - began)) "$code"
    if ((code)); then
        failed+=("$name")
        tail -n 15 "$OUT/$name.txt"
    fi
}

bench() {
    local kind=$1 name=$2
    shift 2
    "$PYTHON" -m moectl bench "$kind" --device cuda --dtype bfloat16 --quiet --output "$OUT/$name.json" "$@"
}

acceptance=(--shape 2048,768,128,8 --shape 4096,1024,64,4)
presets=(qwen3-30b-a3b mixtral-8x7b olmoe-1b-7b gpt-oss-20b deepseek-v3)
export -f bench
export PYTHON OUT

step tests 140 "$PYTHON" -m pytest tests/gpu
step train 105 bash -c 'bench layer train "$@"' - "${acceptance[@]}" --tokens 32768 --what fwd,train --html "$OUT/train.html"
step decode 105 bash -c 'bench layer decode "$@"' - "${presets[@]}" --tokens 1,16,128 --what decode --time 0.2
step kernels 45 bash -c 'bench kernels kernels "$@"' - "${acceptance[@]}" --tokens 128,32768 --time 0.2
step ternary 45 bash -c 'bench kernels ternary "$@"' - mixtral-8x7b qwen3-30b-a3b --what ternary --tokens 1,2,4,8,32 \
    --time 0.1 --html "$OUT/ternary.html"

# Tuned tables stay out of the user's cache; what they gain is the last table beside the first.
export XDG_CACHE_HOME=$OUT/cache
step tune 95 bash -c 'bench layer tuned "$@"' - --shape 2048,768,128,8 --tokens 32768 --backend moectl,grouped_mm \
    --tune --tune-time 50 --export vllm "$OUT"
cp "$XDG_CACHE_HOME"/moectl/tuning/*.json "$OUT"/ 2>/dev/null
rm -rf "$XDG_CACHE_HOME"

for name in train decode kernels ternary tuned; do
    [[ -f $OUT/$name.json ]] && "$PYTHON" -m moectl bench report "$OUT/$name.json" && echo
done
((${#failed[@]})) && echo "failed: ${failed[*]}" && exit 1
exit 0
