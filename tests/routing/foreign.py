"""One routing written down as each other program writes it, to be read back: what every format has to agree on."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def choices(tokens: int, seed: int = 0, layers: int = LAYERS) -> np.ndarray:
    """Experts [T, L, K], each token's different."""
    generator = np.random.default_rng(seed)
    return generator.permuted(np.tile(np.arange(EXPERTS), (tokens, layers, 1)), axis=-1)[..., :TOP_K].astype(np.int32)


def lines(path: Path, records: list[dict]) -> Path:
    """Records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def olmoe(path: Path, index_TLK: np.ndarray, token_T: np.ndarray) -> Path:
    """OLMoE: the layer is the last axis."""
    record = {"input_ids": token_T.tolist(), "predicted_token_ids": np.roll(token_T, -1).tolist()}
    return lines(path, [record | {"exp_ids": index_TLK.swapaxes(1, 2).tolist()}])


def megatron(path: Path, index_TLK: np.ndarray, rank: int = 0, step: int = 0, **more: object) -> Path:
    """Megatron-LM: a record per layer."""
    records = [
        {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
        | {"num_tokens": len(index_TLK), "topk": TOP_K, "top_indices": index_TLK[:, layer].tolist(), **more}
        for layer in range(index_TLK.shape[1])
    ]
    return lines(path, records)


def vllm(path: Path, index_TLK: np.ndarray, token_T: np.ndarray, prompt: int) -> Path:
    """vLLM: prompt and choice apart, the last token without a row."""
    choice = {"token_ids": token_T[prompt:].tolist(), "routed_experts": index_TLK[prompt:-1].tolist()}
    record = {"choices": [choice], "prompt_token_ids": token_T[:prompt].tolist()}
    return lines(path, [record | {"prompt_routed_experts": index_TLK[:prompt].tolist()}])


def flat(index_TLK: np.ndarray) -> str:
    """As SGLang sends arrays."""
    return base64.b64encode(np.ascontiguousarray(index_TLK, "<i4").tobytes()).decode()


def npy_text(index_TLK: np.ndarray) -> str:
    """As vLLM sends arrays."""
    buffer = io.BytesIO()
    np.save(buffer, index_TLK.astype(np.int16))
    return base64.b64encode(buffer.getvalue()).decode()


def sglang(path: Path, index_TLK: np.ndarray, prompt: int) -> Path:
    """SGLang: one flat array without the last token."""
    counts = {"prompt_tokens": prompt, "completion_tokens": len(index_TLK) - prompt}
    return lines(path, [{"text": "...", "meta_info": {**counts, "routed_experts": flat(index_TLK[:-1])}}])


def per_token(path: Path, index_TLK: np.ndarray, token_T: np.ndarray) -> Path:
    """SGLang's recorder: layers first, eight places padded with -1, experts by place; here place e holds E - 1 - e."""
    padded = np.full((index_TLK.shape[1], len(index_TLK), 8), -1, np.int32)
    padded[..., :TOP_K] = EXPERTS - 1 - index_TLK.swapaxes(0, 1)
    record = {
        "forward_pass_id": 7,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": token_T.tolist(),
        "positions": list(range(len(token_T))),
        "extend_seq_lens": [len(token_T)],
        "forward_mode": 1,
        "topk_ids_of_layer": torch.from_numpy(padded),
        "misc_objects": [],
    }
    mapping = torch.arange(EXPERTS - 1, -1, -1).repeat(index_TLK.shape[1], 1)
    torch.save({"records": [record], "last_physical_to_logical_map": mapping}, path)
    return path


def stat(path: Path, counts_SLE: np.ndarray) -> Path:
    """SGLang's recorder: counts alone."""
    count = torch.from_numpy(counts_SLE)
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, path)
    return path


def narrow_csv(path: Path, passes: list[np.ndarray]) -> Path:
    """llama.cpp: passes over some tokens, layer by layer."""
    rows = [f"{layer},{e}" for each in passes for layer in range(LAYERS) for e in each[:, layer].ravel()]
    path.write_text("\n".join(rows) + "\n")
    return path


def wide_csv(path: Path, passes: list[np.ndarray]) -> Path:
    """llama.cpp's fork: a row per token and layer, the prompt's positions negative."""
    rows, decoded = [], 0
    for each in passes:
        for layer in range(LAYERS):
            for place, experts in enumerate(each[:, layer]):
                position = place - len(each) if len(each) > 1 else decoded
                rows.append(",".join(map(str, [position, layer, *experts])))
        decoded += len(each) == 1
    path.write_text("\n".join(rows) + "\n")
    return path
