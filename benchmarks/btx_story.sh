#!/usr/bin/env bash
# Branch-Train-MiX against what it replaces, at a size a CPU trains: 0.99M parameters dense, three domains.
#
#   benchmarks/btx_story.sh FOLDER SEED SEED_STEPS
#
# One cell: a seed model (SEED_STEPS steps of 4,096 tokens), a branch for each domain, their weight average, their
# ensemble (BTM), their mixture (BTX) after a short training, and beside it the seed continued dense and sparsely upcycled.
# All continued trainings have steps of 2,048 tokens, one learning rate and one schedule:
#
#   branch 60 steps each, mixture 150 steps           sequential steps 210, tokens 330 * 2,048 in all
#   dense, upcycled 330 steps                         equal tokens in all
#   upcycled-sequential 210 steps                     equal sequential steps: branches run side by side
#
# The grid, decided before it was run, every cell of which is reported (benchmarks/btx_story_table.py): random seeds
# 0, 1, 2, each with a short training of the seed model (150 steps) and a long one (600 steps).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
folder=${1:?a folder to work in} seed=${2:?a random seed} seed_steps=${3:?steps of the seed model}
branch_steps=60 moe_steps=150
total=$((3 * branch_steps + moe_steps)) sequential=$((branch_steps + moe_steps))
domains=(--data builtin:code --data builtin:prose --data builtin:arithmetic)
how=(--batch-size 8 --seq-len 256 --lr 1e-3 --warmup 10 --seed "$seed" --quiet)
mkdir -p "$folder"

python - "$folder/seed" "$seed_steps" "$seed" <<'PYTHON'
import sys
from pathlib import Path
from moectl.training.byte_llama import train_byte_llama

if not Path(sys.argv[1]).exists():
    train_byte_llama(Path(sys.argv[1]), steps=int(sys.argv[2]), seed=int(sys.argv[3]))
PYTHON
moectl branch "$folder/seed" "${domains[@]}" -o "$folder/branches" --steps "$branch_steps" "${how[@]}" >"$folder/branches.txt"
mapfile -t branches <"$folder/branches.txt"
moectl average "${branches[@]}" -o "$folder/average" --quiet
moectl upcycle btx "${branches[@]}" -o "$folder/btx-start" --top-k 2 --router-init text "${domains[@]}" --seed "$seed" --quiet
moectl train "$folder/btx-start" -o "$folder/btx" "${domains[@]}" --steps "$moe_steps" "${how[@]}"
moectl train "$folder/seed" -o "$folder/dense" "${domains[@]}" --steps "$total" "${how[@]}"
moectl upcycle sparse "$folder/seed" -o "$folder/upcycled-start" --experts 3 --top-k 2 --seed "$seed" --quiet
moectl train "$folder/upcycled-start" -o "$folder/upcycled" "${domains[@]}" --steps "$total" "${how[@]}"
moectl train "$folder/upcycled-start" -o "$folder/upcycled-sequential" "${domains[@]}" --steps "$sequential" "${how[@]}"
members=()
for branch in "${branches[@]}"; do members+=(--member "$branch"); done
moectl eval "$folder/seed" "${branches[@]}" "$folder"/{average,btx-start,btx,dense,upcycled,upcycled-sequential} "${domains[@]}" \
    "${members[@]}" --max-tokens 30000 --quiet --json >"$folder/eval.partial"
mv "$folder/eval.partial" "$folder/eval.json"
