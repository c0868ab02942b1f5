"""The model that `compress_peers.py` compares on: a small Qwen3-MoE, trained here and now.

Three layers of 8 experts, two for a token, 512 wide as their experts are: 21 million parameters, 19 million of them in
experts. Every tool that is compared loads and saves this family as it should. Tokens are bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

DATA = ("builtin:code", "builtin:prose")
LAYERS, EXPERTS, TOP_K, WIDTH, EXPERT_WIDTH = 3, 8, 2, 512, 512
STEPS, BATCH, LENGTH = 400, 8, 256
HELDOUT_TOKENS = 16_384
"""Of each domain."""


def make(place: Path, seed: int, samples: int) -> None:
    """Write what is not there yet: `model` (bfloat16), `calibration.jsonl` and .npy, `heldout.npz`.

    The held-out documents are the same for every seed; weights, the order of training and the calibration text are not.
    """
    if not (place / "model").exists():
        train(place, seed)
    if not (place / "heldout.npz").exists():
        calibrate(place, seed, samples)
        np.savez(place / "heldout.npz", **heldout())


def train(place: Path, seed: int) -> None:
    """A model from scratch."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moectl.checkpoint.source import Checkpoint
    from moectl.data.tokens import BYTE_EOS_ID, BYTE_PAD_ID, byte_tokenizer
    from moectl.training.metrics import Metrics
    from moectl.training.recipe import TrainRecipe
    from moectl.training.run import Reporting
    from moectl.training.run import train as trained
    from moectl.training.world import World

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=WIDTH,
        intermediate_size=EXPERT_WIDTH,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.03,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=BYTE_EOS_ID,
        pad_token_id=BYTE_PAD_ID,
    )
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=BYTE_EOS_ID, pad_token_id=BYTE_PAD_ID)
    recipe = TrainRecipe(
        data=DATA,
        steps=STEPS,
        batch_size=BATCH,
        sequence_length=LENGTH,
        learning_rate=2e-3,
        warmup=STEPS // 10,
        min_rate=0.0,
        seed=seed,
    )

    def tell(metrics: Metrics) -> None:
        if metrics.step % 20 == 0:
            print(f"seed {seed}, step {metrics.step} of {STEPS}: loss {metrics.loss:.3f}", flush=True)

    with TemporaryDirectory(dir=place) as scratch:
        untrained, finished = Path(scratch) / "untrained", Path(scratch) / "trained"
        model.save_pretrained(untrained)
        byte_tokenizer().save_pretrained(untrained)
        alone = World(0, 1, torch.device("cpu"))
        trained(Checkpoint.open(untrained), recipe, finished, alone, reporting=Reporting(on_step=tell))
        AutoModelForCausalLM.from_pretrained(finished, dtype=torch.bfloat16).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")


def calibrate(place: Path, seed: int, samples: int) -> None:
    """Training text drawn with the seed, as much of one domain as of the other, and its ids [samples, LENGTH]."""
    from moectl.checkpoint.source import Checkpoint
    from moectl.compress.calibration import Calibration, calibration_tokens
    from moectl.data.documents import read_documents

    draw = random.Random(seed)
    drawn: list[str] = []
    for documents in read_documents(DATA).by_domain().values():
        texts, left = [document.text for document in documents], samples * LENGTH // len(DATA)
        draw.shuffle(texts)
        while left > 0:
            drawn.append(texts.pop())
            left -= len(drawn[-1].encode())
    draw.shuffle(drawn)
    file = place / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn), encoding="utf-8")
    asked = Calibration((str(file),), samples, LENGTH)
    np.save(place / "calibration.npy", calibration_tokens(Checkpoint.open(str(place / "model")), asked))


def heldout() -> dict[str, np.ndarray]:
    """The ids of each held-out document, named DOMAIN.NUMBER."""
    from moectl.evaluation.domains import heldout_texts

    texts = heldout_texts(DATA, lambda text: list(text.encode()), HELDOUT_TOKENS)
    return {
        f"{domain}.{number}": np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        for domain, documents in texts.items()
        for number, text in enumerate(documents)
    }


def expert_weights() -> int:
    """How many there are."""
    return LAYERS * EXPERTS * 3 * WIDTH * EXPERT_WIDTH


def extract(dense: Path, plain: Path) -> None:
    """The expert matrices of an ordinary checkpoint, as one file."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor for file in dense.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name}, plain)
