#!/usr/bin/env bash
# Branch-Train-MiX against what it replaces, at a size a CPU trains: one seed model, a branch for each of three domains,
# BTX of the branches, a short training of it; beside it a dense and a sparsely upcycled continuation of the seed with as
# many tokens in all. Held-out loss per domain of everything, with the ensemble of the branches (BTM), as JSON.
#
#   benchmarks/btx_story.sh FOLDER SEED [SEED_STEPS BRANCH_STEPS MOE_STEPS]      150 80 60 by default, 4,096 tokens each
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
folder=${1:?a folder to work in} seed=${2:?a random seed}
seed_steps=${3:-150} branch_steps=${4:-80} moe_steps=${5:-60}
total=$((3 * branch_steps + moe_steps))
domains=(--data builtin:code --data builtin:prose --data builtin:arithmetic)
sizes=(--batch-size 16 --seq-len 256 --warmup 10 --seed "$seed" --quiet)
mkdir -p "$folder"

python - "$folder/seed" "$seed_steps" "$seed" <<'PYTHON'
import sys
from pathlib import Path
from moectl.training.byte_llama import train_byte_llama

train_byte_llama(Path(sys.argv[1]), steps=int(sys.argv[2]), seed=int(sys.argv[3]))
PYTHON
moectl branch "$folder/seed" "${domains[@]}" -o "$folder/branches" --steps "$branch_steps" --lr 1e-3 "${sizes[@]}" >"$folder/branches.txt"
mapfile -t branches <"$folder/branches.txt"
moectl upcycle btx "${branches[@]}" -o "$folder/btx-start" --top-k 2 --seed "$seed" --quiet
moectl train "$folder/btx-start" -o "$folder/btx" "${domains[@]}" --steps "$moe_steps" --lr 1e-3 "${sizes[@]}"
moectl train "$folder/seed" -o "$folder/dense" "${domains[@]}" --steps "$total" --lr 1e-3 "${sizes[@]}"
moectl upcycle sparse "$folder/seed" -o "$folder/upcycled-start" --experts 3 --top-k 2 --seed "$seed" --quiet
moectl train "$folder/upcycled-start" -o "$folder/upcycled" "${domains[@]}" --steps "$total" --lr 1e-3 "${sizes[@]}"
moectl eval "$folder/seed" "${branches[@]}" "$folder/btx" "$folder/dense" "$folder/upcycled" "${domains[@]}" \
    --ensemble --max-tokens 60000 --quiet --json >"$folder/eval.json"
