"""moectl beside llm-compressor, GPTQModel and HQQ: the same small trained model, the same calibration tokens.

For each of three seeds a Qwen3-MoE is trained (`compress_peers_model.py`), and calibration text is drawn. Then every
tool quantises its experts, and nothing else, in a process of its own, one after the other, bound to the same cores:
wall and CPU seconds and peak memory are those of that process from its start to the saved checkpoint. Bits are all
bytes of the tensors it stored for experts, per expert weight. The plain matrices that its checkpoint stands for, as
its own code unpacks them, are put into the same model and scored on the same held-out documents.

Differences of losses have 95 % intervals by resampling documents, over all seeds together and for each alone.

    for each of llmc, gptqmodel, hqq: python -m venv VENVS/NAME, and in it
        pip install 'torch<2.14' llmcompressor | gptqmodel==7.6.0 | hqq
    python benchmarks/compress_peers.py --venvs VENVS [--work DIR] [--seeds 0 1 2] [--threads 1] [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compress_peers_model as the_model
import numpy as np
from compress_peers_score import score
from machine import command, machine, run
from safetensors import safe_open

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compress_peers.json"
SAMPLES = 64
PACKAGES = {"llmc": "llmcompressor", "gptqmodel": "gptqmodel", "hqq": "hqq"}
MOECTL = "moectl"


@dataclass(frozen=True)
class Entry:
    """One way to quantise: a tool, the bits asked for (None: ternary), and its arguments."""

    tool: str
    bits: int | None
    label: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """How it is called in the results."""
        return f"{self.tool} {self.label}"


def entries() -> list[Entry]:
    """All that is compared: groups of 128 with a zero of their own, which every tool has."""
    found = []
    for bits in (4, 2):
        given = ("--bits", str(bits))
        found.append(Entry(MOECTL, bits, f"W{bits}", given))
        found += [Entry(tool, bits, f"W{bits}", (*given, "--group-size", "128")) for tool in PACKAGES]
    found.append(Entry(MOECTL, None, "ternary, at most 0.99 bits", ("--bits", "0.99")))
    found.append(Entry(MOECTL, None, "ternary as in the paper", ("--qmoe-compat",)))
    return found


def main() -> None:
    """Measure what is asked for, and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--venvs", type=Path, help="left out: print the table of the last results")
    parser.add_argument("--work", type=Path, help="where models are made and kept; nowhere when left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", help="part of a name: these again, others as they were")
    options = parser.parse_args()
    if options.venvs is None:
        print(table(json.loads(RESULTS.read_text())["summary"]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        rows = []
        for seed in options.seeds:
            place = work / f"seed-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            the_model.make(place, seed, SAMPLES)
            rows += [{"seed": seed, **row} for row in measured(place, options, seed)]
    document = {
        "schema": "moectl.compress-peers/1",
        "command": command(),
        "machine": machine(),
        "threads": options.threads,
        "versions": {tool: version(options.venvs, tool) for tool in PACKAGES},
        "model": described(),
        "rows": [{key: value for key, value in row.items() if key not in ("nats", "tokens")} for row in rows],
        "summary": (found := summarised(rows)),
        "needed": needed(found, rows),
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(table(found))
    print(json.dumps(document["needed"], indent=1))


def measured(place: Path, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """The rows of one model: itself, and every entry; each is kept in a file, and measured again only if asked for."""
    todo = [None, *entries()]
    turn = seed * 5 % len(todo)
    rows = {}
    for entry in [*todo[turn:], *todo[:turn]]:  # each tool comes early in one seed and late in another
        name = "bf16" if entry is None else entry.name
        kept = place / "rows" / f"{name}.json"
        asked = options.only and any(part in name for part in options.only)
        if asked or not (options.only or kept.exists()):
            print(f"seed {seed}: {name}", flush=True)
            row = score(place, None) if entry is None else tried(place, entry, options)
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"name": name, **row}))
        if kept.exists():
            rows[name] = json.loads(kept.read_text())
    names = ["bf16" if entry is None else entry.name for entry in todo]
    return [rows[name] for name in names if name in rows]


def tried(place: Path, entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    """Run one tool, unpack what it stored, and score it."""
    out, plain = place / "out", place / "plain.safetensors"
    for path in (out, place / "dense"):
        shutil.rmtree(path, ignore_errors=True)
    settings = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    bound = ["taskset", "--cpu-list", ",".join(map(str, cores))]
    # llm-compressor writes a log where it is started.
    found = run([*bound, *to_quantise(place, entry, out, options.venvs)], env=environment, cwd=place)
    to_unpack(place, entry, out, plain, options.venvs, environment)
    row = score(place, plain)
    nbytes = stored_bytes(out)
    plain.unlink()
    return {
        "tool": entry.tool,
        "asked_bits": entry.bits,
        "wall_seconds": round(found.wall, 2),
        "cpu_seconds": round(found.cpu, 2),
        "peak_rss_bytes": found.peak_rss,
        "bits_per_expert_weight": round(8 * nbytes / the_model.expert_weights(), 4),
        **row,
    }


def to_quantise(place: Path, entry: Entry, out: Path, venvs: Path) -> list[str]:
    """The command that is timed."""
    if entry.tool == MOECTL:
        data = ["--data", str(place / "calibration.jsonl"), "--samples", str(SAMPLES)]
        given = [*data, "--seq-len", str(the_model.LENGTH), "--dense", "bf16", "--no-eval", "--quiet"]
        model = str(place / "model")
        return [sys.executable, "-m", "moectl", "compress", "qmoe", model, "-o", str(out), *given, *entry.arguments]
    driver = HERE / "peers_compress" / f"run_{entry.tool}.py"
    inputs = ["--model", str(place / "model"), "--tokens", str(place / "calibration.npy"), "--out", str(out)]
    return [str(venvs / entry.tool / "bin" / "python"), str(driver), "quantise", *inputs, *entry.arguments]


def to_unpack(place: Path, entry: Entry, out: Path, plain: Path, venvs: Path, environment: dict[str, str]) -> None:
    """Plain matrices of what was stored, by the tool's own code."""
    if entry.tool == MOECTL:
        dense = place / "dense"
        run([sys.executable, "-m", "moectl", "decompress", str(out), "-o", str(dense), "--quiet"], env=environment)
        the_model.extract(dense, plain)
        return
    driver = HERE / "peers_compress" / f"run_{entry.tool}.py"
    python = str(venvs / entry.tool / "bin" / "python")
    run([python, str(driver), "plain", "--out", str(out), "--plain", str(plain)], env=environment)


def stored_bytes(out: Path) -> int:
    """Bytes of all tensors that were stored for experts."""
    total = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.offset_keys():
                if ".experts." in name:
                    tensor = opened.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each entry over all seeds: means, and the loss of all held-out tokens together."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        each = {"name": name, "tool": own[0].get("tool"), "asked_bits": own[0].get("asked_bits")}
        for key in ("wall_seconds", "cpu_seconds", "peak_rss_bytes", "bits_per_expert_weight", "weight_error"):
            if key in own[0]:
                each[key] = float(np.mean([row[key] for row in own]))
        each["losses"] = [loss(row) for row in own]
        each["loss"] = float(np.mean(each["losses"]))
        each["perplexity"] = math.exp(each["loss"])
        found.append(each)
    return found


def loss(row: dict[str, Any]) -> float:
    """Nats per token of a row's documents."""
    return sum(row["nats"].values()) / sum(row["tokens"].values())


def difference(rows: Sequence[dict[str, Any]], one: str, other: str) -> dict[str, Any]:
    """How much more the one loses than the other, in nats per token, with intervals over documents.

    All seeds score the same documents, so a document is drawn with its sums over seeds.
    """
    from moectl.bootstrap import interval, resampled_sums

    pairs = [[row for row in rows if row["name"] == name] for name in (one, other)]
    gap_SD = np.array([[a["nats"][d] - b["nats"][d] for d in a["nats"]] for a, b in zip(*pairs, strict=True)])
    token_D = np.array(list(pairs[0][0]["tokens"].values()), np.float64)
    sums_R2 = resampled_sums(np.stack([gap_SD.mean(0), token_D]), seed=0)
    return {
        "one": one,
        "other": other,
        "nats_per_token": float(gap_SD.mean(0).sum() / token_D.sum()),
        "interval": interval(sums_R2[:, 0] / sums_R2[:, 1]),
        "of_seeds": (gap_SD.sum(1) / token_D.sum()).tolist(),
    }


def needed(found: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the comparison was made for: every claim, the numbers it rests on, and whether it holds."""
    claims: dict[str, Any] = {}
    for bits in (4, 2):
        of_bits = [each for each in found if each["asked_bits"] == bits]
        ours = next(each for each in of_bits if each["tool"] == MOECTL)
        peers = [each for each in of_bits if each["tool"] != MOECTL]
        best = min(peers, key=lambda each: each["loss"])
        gap = difference(rows, ours["name"], best["name"])
        all_gaps = [difference(rows, ours["name"], each["name"]) for each in peers]
        calibrated = [each for each in peers if each["tool"] != "hqq"]
        claims[f"W{bits}"] = {
            "best_peer": best["name"],
            "not_worse_than_best_peer": gap["interval"][0] <= 0,
            "differences": all_gaps,
            **{
                f"less_{key}": all(ours[key] < each[key] for each in calibrated)
                for key in ("wall_seconds", "cpu_seconds", "peak_rss_bytes")
            },
        }
    ternary = [each for each in found if each["name"].startswith(f"{MOECTL} ternary")]
    claims["ternary"] = {
        each["name"]: {"bits": each["bits_per_expert_weight"], "loss": each["loss"]} for each in ternary
    }
    claims["ternary"]["one_is_below_1_bit"] = any(each["bits_per_expert_weight"] < 1 for each in ternary)
    return claims


def table(found: Sequence[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| tool | bits per expert weight | held-out loss | wall s | CPU s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for each in found:
        if each["tool"] is None:
            lines.append(f"| {each['name']} | 16 | {each['loss']:.4f} | | | |")
            continue
        cells = f"{each['bits_per_expert_weight']:.3f} | {each['loss']:.4f} | {each['wall_seconds']:.1f}"
        lines.append(f"| {each['name']} | {cells} | {each['cpu_seconds']:.1f} | {each['peak_rss_bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def described() -> dict[str, Any]:
    """The model in numbers."""
    names = ("LAYERS", "EXPERTS", "TOP_K", "WIDTH", "EXPERT_WIDTH", "STEPS", "BATCH", "LENGTH", "HELDOUT_TOKENS")
    return {
        "family": "qwen3_moe",
        "data": list(the_model.DATA),
        "samples": SAMPLES,
        **{name.lower(): getattr(the_model, name) for name in names},
    }


def version(venvs: Path, tool: str) -> dict[str, str]:
    """Versions of a peer and of what it runs on."""
    names = [PACKAGES[tool], "torch", "transformers"]
    code = f"from importlib.metadata import version as v; import json; print(json.dumps({{n: v(n) for n in {names}}}))"
    python = str(venvs / tool / "bin" / "python")
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
