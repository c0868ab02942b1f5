"""Bits per weight of the ternary codes, and how fast one core encodes and decodes.

    OMP_NUM_THREADS=1 python benchmarks/codec.py [--rounds 9] [--out codec.json]

Weights are independent, + as likely as -, from a fixed seed. Rates are without rows' overhead, over rows of 500,000
weights, next to the entropy of the weights that were drawn; at the two matrices of switch-c-2048's experts they are
with it: 48 bits a row here, 64 in the paper's files. Speeds are in MB of bfloat16 weights per second of CPU time of one
thread, the median of rounds over a matrix of 2048 x 4096; what a decoder writes is bfloat16. The exit status is 1 where
a rate or a speed misses what is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from machine import command, machine

from moectl.codecs.blob import pack
from moectl.codecs.qmoe import ROW_BITS
from moectl.codecs.rate import measure
from moectl.codecs.tables import QMOE, choose, table

RESULTS = Path(__file__).parent / "results"
ZERO_SHARES = (0.885, 0.90, 0.95)
LONG_ROWS = (8, 500_000)
C2048 = ((6144, 2080), (2080, 6144))
SPEED = (2048, 4096)
AT_MOST = {0.885: 0.68, 0.95: 0.42}
ENCODE, DECODE = 100, 300


def drawn(shape: tuple[int, int], zero_share: float) -> np.ndarray:
    """Ternary weights."""
    plus = (1 - zero_share) / 2
    share = np.random.default_rng(0).random(shape, np.float32)
    return (share < plus).astype(np.int8) - (share > 1 - plus)


def rates(shape: tuple[int, int], zero_share: float) -> dict[str, Any]:
    """What a matrix takes in our code and in the paper's, in bits per weight."""
    trits = drawn(shape, zero_share)
    levels = np.ones((shape[0], 2), ml_dtypes.bfloat16)
    number = choose(zero_share)
    ours, paper = (measure(pack(trits, levels, number=code), trits) for code in (number, QMOE))
    with_rows = paper.codes + ROW_BITS / shape[1]
    return {
        "shape": list(shape),
        "zero_share": zero_share,
        "table": table(number).name,
        "entropy": round(ours.entropy, 4),
        "codes": {"ours": round(ours.codes, 4), "qmoe": round(paper.codes, 4)},
        "with_rows": {"ours": round(ours.achieved, 4), "qmoe": round(with_rows, 4)},
        "times_smaller_than_bfloat16": {"ours": round(16 / ours.achieved, 2), "qmoe": round(16 / with_rows, 2)},
    }


def speeds(zero_share: float, number: int, rounds: int) -> dict[str, Any]:
    """MB/s of one thread, compiled before the first round."""
    trits = drawn(SPEED, zero_share)
    levels = np.random.default_rng(1).standard_normal((SPEED[0], 2)).astype(ml_dtypes.bfloat16)
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    pack(trits[:1], levels[:1], number=number).weights()
    for _ in range(rounds):
        started = time.process_time()
        blob = pack(trits, levels, number=number)
        encoded = time.process_time()
        blob.weights()
        seconds["encode"].append(encoded - started)
        seconds["decode"].append(time.process_time() - encoded)
    megabytes = 2 * trits.size / 1e6
    return {
        "zero_share": zero_share,
        "table": table(number).name,
        **{what: round(megabytes / statistics.median(each)) for what, each in seconds.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "codec.json")
    options = parser.parse_args()
    long_rows = [rates(LONG_ROWS, share) for share in ZERO_SHARES]
    c2048 = [rates(shape, ZERO_SHARES[0]) for shape in C2048]
    speed = [speeds(share, number, options.rounds) for share in ZERO_SHARES for number in (choose(share), QMOE)]
    document = {
        "schema": "moectl.codec/1",
        "command": command(),
        "machine": machine(),
        "needed": {"bits_at_most": AT_MOST, "encode_MB_per_s": ENCODE, "decode_MB_per_s": DECODE},
        "bits_per_weight": long_rows,
        "c2048": c2048,
        "c2048_times_smaller": {
            code: round(statistics.mean(row["times_smaller_than_bfloat16"][code] for row in c2048), 2)
            for code in ("ours", "qmoe")
        },
        "MB_per_s": speed,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({key: document[key] for key in ("bits_per_weight", "c2048_times_smaller", "MB_per_s")}, indent=1))
    missed = [row for row in long_rows if row["codes"]["ours"] > AT_MOST.get(row["zero_share"], 1)]
    missed += [row for row in speed if row["encode"] < ENCODE or row["decode"] < DECODE]
    if missed:
        sys.exit(f"missed: {missed}")


if __name__ == "__main__":
    main()
