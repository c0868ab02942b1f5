"""`moectl analyze-routing`: how a Mixture-of-Experts model routes, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moectl.cli import analyzing, checks, options
from moectl.errors import CheckFailed, UsageError
from moectl.text import few


def analyze_routing(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_TRACE",
            help="Directory, Hub id or hf://org/name@rev; or a trace, of --trace or of another engine.",
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OTHER]...",
            help="What to compare it with, on the same tokens; several are checkpoints in their order.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: a file, a directory, a Hub dataset; built-in text when left out. Repeatable.",
            show_default=False,
        ),
    ] = None,
    html: options.Page = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also keep who went where, of whole documents.",
            show_default=False,
            callback=checks.place,
        ),
    ] = None,
    trace_size: Annotated[str, typer.Option(metavar="SIZE", help="The most that is kept, as 500MB.")] = "256MiB",
    mask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERTS",
            help="Measure the loss without them too: kept:1, removed:2, or 3:17,5:4-7 (layer:experts). Repeatable.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare the experts' weights and the routers' rows too.")
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="ROUTERS",
            help="Route the tokens again: switch:cf=1.25,expert-choice,deepseek-v3:groups=8,top=4. "
            "`moectl routers` lists all.",
            show_default=False,
        ),
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUESTIONS",
            help="all, or some of capacity, rectify, cache, prefetch, offload, placement, dynamic, parallelism, "
            "all-to-all, node-limit, pruning, coalescing; cache:expert_mb=8,gb_per_s=25 has options.",
            show_default=False,
        ),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Say what to do with it on the machine of --gpus and so on.")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Of that machine.")] = 8,
    gpu_memory: Annotated[float, typer.Option(metavar="GB", help="Of each GPU.")] = 80.0,
    link: Annotated[
        str, typer.Option(metavar="RATE", help="Of a GPU to the other nodes, or to other GPUs if there is one node.")
    ] = "50GB/s",
    nodes: Annotated[int, typer.Option(min=1, help="That the GPUs are on.")] = 1,
    placement: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write a placement of the experts on --gpus for an engine.",
            show_default=False,
            callback=checks.file,
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="Who reads the placement: sglang, vllm or vllm-ascend.")] = "sglang",
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 5 if true of a layer: 'max_vio>2', '3.effective<4', 'unseen>0'.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to read.")] = 65536,
    seq_len: options.SeqLen = None,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate after each document, recorded too.")] = 0,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="One layer in memory at a time, for models larger than it.")
    ] = False,
    format: Annotated[
        str | None,
        typer.Option(help="The kind of trace, where it cannot be told from its content.", show_default=False),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(min=1, help="Experts per layer, of a trace that does not say.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts per token, of a trace that does not say.", show_default=False)
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers, dense ones too, of a flat trace that does not say.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Whose tokenizer makes words of a trace's token ids.", show_default=False),
    ] = None,
    olmoe_compat: Annotated[
        bool, typer.Option("--olmoe-compat", help="Count pairs of adjacent ranks only, as OLMoE's released code does.")
    ] = False,
    fixed_order: Annotated[
        bool, typer.Option("--fixed-order", help="Experts by number, not by load, in the heat strip.")
    ] = False,
    device: options.Device = "auto",
    dtype: options.RunDtype = "auto",
    experts_implementation: options.ExpertsImplementation = None,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the trace in DIR, and the placement.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Record which experts every token goes to, and say what it means: balance, domains, words, locality, each beside
    what chance gives.

    The table has a row per layer; the verdict and what stands out go to stderr. With OTHER, both read the same text and
    are compared token by token; of several, each with the last. --replay, --what-if and --advise answer from the trace,
    with tables of their own in place of that: in a pipe, each of several below a line with its name.
    """
    from moectl.data.documents import EVERY_BUILTIN
    from moectl.report import output
    from moectl.routing import gate
    from moectl.routing.report import report
    from moectl.routing.study import is_model

    conditions = [gate.parse(text) for text in fail_on or ()]
    most = output.parse_size(trace_size, "--trace-size")
    analyzing.require_places(trace, placement, engine, overwrite)
    machine = {"gpus": gpus, "gpu_memory_gb": gpu_memory, "link": link, "nodes": nodes}
    file = None if placement is None else {"path": placement, "engine": engine, "overwrite": overwrite}
    asked = analyzing.asked(replay, what_if or [], machine, file, advise=advise)
    sources = [model, *(others or ())]
    run = [format is None and is_model(source) for source in sources]
    if not any(run) and (data or generate or layerwise):
        raise UsageError(
            f"{model} is a trace, and --data, --generate and --layerwise are about running a model.",
            "",
            "Leave them out, or give the model.",
        )
    if (mask or weights) and not run[0]:
        raise UsageError(f"{model} is a trace.", "--mask and --weights need a model.", "Give the model first.")
    facts = {"num_experts": num_experts, "top_k": top_k, "layers": layers}
    if any(run) and any(fact is not None for fact in facts.values()):
        raise UsageError("--num-experts, --top-k and --layers are for traces.", "A model knows.", "Leave them out.")
    text = tuple(data or EVERY_BUILTIN)
    if any(run) and not data:
        output.note(f"Without --data the text is {', '.join(EVERY_BUILTIN)}.", quiet=quiet)
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sequence_length": seq_len,
        "trace_bytes": most,
        "generate": generate,
        "layerwise": layerwise,
        "device": device,
        "dtype": dtype,
        "experts_implementation": experts_implementation,
        "seed": seed,
    }
    masks = analyzing.masks(mask)
    studies = [
        analyzing.recorded(source, text, settings, revision, quiet) if runs else analyzing.opened(source, format, facts)
        for source, runs in zip(sources, run, strict=True)
    ]
    if not studies[0].recordings:
        return  # this process of torchrun is not the one that tells
    losses = analyzing.masked(studies[0], text, masks, settings, quiet) if masks else None
    similar = analyzing.alike(studies[0], quiet) if weights else []
    found = report(studies, losses=losses, weights=similar, adjacent=olmoe_compat, seed=seed)
    found = analyzing.answered(found, studies[0], asked, seed, quiet)
    files = analyzing.keep(found, studies[0], html, trace, tokenizer, overwrite)
    analyzing.show(found, files, json=json, quiet=quiet, by_number=fixed_order)
    failed = [line for condition in conditions for line in gate.failures(condition, found.rows)]
    if failed:
        raise CheckFailed(f"{few(failed)}.", "--fail-on says so.", "Look at the table, or change the condition.")
