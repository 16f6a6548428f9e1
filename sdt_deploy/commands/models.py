"""Commands that make models and bundles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdt_deploy.choices import Importance, Levels, ProbeRouting
from sdt_deploy.commands.options import Json, Overwrite, Quiet
from sdt_deploy.config import Attention, Context, Precision, Quantization, Selection
from sdt_deploy.config_parts import HeadKind
from sdt_deploy.console import (
    clean_up_on_sigterm,
    console,
    print_graphs,
    print_histogram,
    print_json,
    progress_bar,
)
from sdt_deploy.errors import InputError

CHECKED_WITH = {
    "float32": "ONNX Runtime",
    "float16": "ONNX Runtime and the reference evaluator of onnx; for GPUs: a CPU "
    "computes float16 in float32, through casts",
    "bfloat16": "the reference evaluator of onnx; for GPUs: no CPU backend runs it",
}


def convert(
    source: Annotated[
        Path, typer.Argument(help="Native or Hugging Face directory, or the original's .pt file.")
    ],
    out: Annotated[Path, typer.Argument(help="Native model directory to make.")],
    texts: Annotated[
        Path | None, typer.Option(help="Text to fit a probe on, or with --adapter to test on.")
    ] = None,
    target_depth: Annotated[
        float | None, typer.Option(help="Mean layers per token; default: 60 % of the layers.")
    ] = None,
    levels: Annotated[Levels | None, typer.Option(help="Depths to use; default: graded.")] = None,
    importance: Annotated[
        Importance | None,
        typer.Option(
            help="What the probe is fitted to: the attention a token receives (default), how "
            "little (stability) or much (change) its state changes, its rarity, or random numbers."
        ),
    ] = None,
    selection: Annotated[
        Selection | None,
        typer.Option(help="capacity: each layer takes a fixed share of each text's tokens."),
    ] = None,
    routing: Annotated[
        ProbeRouting | None,
        typer.Option(help="exit, skip: a probe for each layer; a token leaves, or sits one out."),
    ] = None,
    context: Annotated[
        Context | None, typer.Option(help="What active tokens see; default: as in SOURCE.")
    ] = None,
    head: Annotated[
        HeadKind | None, typer.Option(help="Output of a Hugging Face model; default: its own.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter file to merge; brings its own probe.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a checkpoint into a native model directory and fit a probe.

    Examples::

        sdt-deploy convert ./all-MiniLM-L6-v2 model --texts texts.txt
        sdt-deploy convert ./all-MiniLM-L6-v2 model --adapter adapter.safetensors
        sdt-deploy convert ./bert model --texts texts.txt --head embedding --target-depth 7
    """
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    require("torch", extra="export", purpose="Converting a model")
    require("safetensors", extra="export", purpose="Converting a model")
    from sdt_deploy.model.conversion import ProbeFit
    from sdt_deploy.model.conversion import convert as convert_model
    from sdt_deploy.tokenization import read_lines

    fit = None
    lines = None if texts is None else read_lines(texts)
    if lines is not None and adapter is None:
        fit = ProbeFit(
            texts=lines,
            target_depth=target_depth,
            levels=levels or "graded",
            importance=importance or "attention",
            selection=selection or "threshold",
            routing="once" if routing in (None, "once") else "per_layer",
            leaving="skip" if routing == "skip" else "exit",
        )
    elif any(x is not None for x in (target_depth, levels, importance, selection, routing)):
        raise InputError(
            "--target-depth, --levels, --importance, --selection and --routing need --texts to fit "
            "a probe on, and no --adapter, which brings its own"
        )
    with progress_bar("fit the probe") as advance:
        checkpoint, report = convert_model(
            source,
            out,
            adapter=adapter,
            sample_texts=lines if adapter is not None else None,
            fit=fit,
            context=context,
            head=head,
            overwrite=overwrite,
            progress=lambda n_tokens: advance(f"fit the probe ({n_tokens} tokens)", 0, 0),
        )
    config = checkpoint.model.config
    if as_json:
        print_json(
            {
                "model": str(out),
                "config": config,
                "provenance": checkpoint.provenance,
                "fit": report,
            }
        )
        return
    console.print(
        f"[bold]{escape(str(out))}[/bold]: {config.n_layers} layers, d_model {config.d_model}, "
        f"head {config.head.kind}, context {config.context}, probe {config.probe}, "
        f"licence {checkpoint.provenance.get('license') or 'unknown'}"
    )
    if report is not None:
        console.print(
            f"depth on {report.n_held_out_tokens} held-out tokens: {report.mean_depth:.2f} of "
            f"{config.n_layers} layers"
        )
        print_histogram(report.depth_histogram)


def export(
    model: Annotated[Path, typer.Argument(help="Native model directory.")],
    bundle: Annotated[Path, typer.Argument(help="Bundle directory to make.")],
    target_depth: Annotated[
        float | None, typer.Option(help="Mean layers per token; default: as the model was set.")
    ] = None,
    layers_per_stage: Annotated[int, typer.Option(min=1, help="Layers in one graph.")] = 1,
    stages: Annotated[
        str | None,
        typer.Option(
            help="Layers of each graph in order (1,3,2), or auto: planned from the depths on the "
            "model's text sample and from times measured here."
        ),
    ] = None,
    stage_batch: Annotated[
        str | None, typer.Option(help="BATCHxSEQ that --stages auto plans for; default: 8x128.")
    ] = None,
    quantize: Annotated[
        Quantization,
        typer.Option(help="int8: faster on CPUs, outputs depend a little on the batch."),
    ] = "none",
    precision: Annotated[
        Precision,
        typer.Option(help="Type of products and states; float16 and bfloat16 are for GPUs."),
    ] = "float32",
    attention: Annotated[
        Attention,
        typer.Option(help="fused: the form for GPUs, where onnxruntime-cuda captures it."),
    ] = "decomposed",
    single_file: Annotated[
        bool | None,
        typer.Option(
            "--single-file/--no-single-file",
            help="The whole loop in one more graph, fastest at small sizes; default: in float32 "
            "and int8.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model as a bundle of ONNX graphs and check each of them.

    Examples::

        sdt-deploy export model bundle
        sdt-deploy export model bundle-deep --target-depth 4.5
        sdt-deploy export model bundle-short --stages auto --stage-batch 2x20
        sdt-deploy export model bundle-int8 --quantize int8 --overwrite
        sdt-deploy export model bundle-gpu --precision float16 --attention fused
    """
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    for module in ("torch", "onnx", "onnxscript", "safetensors"):
        require(module, extra="export", purpose="Exporting a model")
    require("onnxruntime", extra="cpu", purpose="Checking the exported graphs")
    from sdt_deploy.config import ExportConfig
    from sdt_deploy.exporters.export import export as export_model
    from sdt_deploy.model.checkpoints import load
    from sdt_deploy.model.conversion import at_depth
    from sdt_deploy.stages import parse_stages

    checkpoint = load(model)
    if target_depth is not None:
        checkpoint = at_depth(checkpoint, target_depth)
    planned = stages == "auto"
    if stage_batch is not None and not planned:
        raise InputError("--stage-batch is for --stages auto")
    config = ExportConfig(
        layers_per_stage=layers_per_stage,
        stages=() if planned or stages is None else parse_stages(stages),
        precision=precision,
        quantization=quantize,
        attention=attention,
    )
    with progress_bar("export") as advance:
        if planned:
            from sdt_deploy.bench.cases import parse_case
            from sdt_deploy.bench.stage_costs import auto_stages

            sizes = auto_stages(
                checkpoint,
                config,
                batch=None if stage_batch is None else parse_case(stage_batch),
                progress=lambda what, done, total: advance(f"measure: {what}", done, total),
            )
            config = dataclasses.replace(config, stages=sizes)
        manifest = export_model(
            checkpoint,
            bundle,
            config,
            single_file=single_file,
            overwrite=overwrite,
            progress=advance,
        )
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "n_files": len(manifest.files),
                "precision": precision,
                "checked_with": CHECKED_WITH[precision],
                "stages": [stop - first for first, stop in manifest.stage_layers],
                "graphs": list(manifest.graphs.values()),
            }
        )
        return
    print_graphs(manifest.graphs.values())
    if planned:
        console.print(f"stages of {', '.join(map(str, config.stages))} layers", highlight=False)
    console.print(
        f"[bold]{escape(str(bundle))}[/bold]: {len(manifest.files)} files, {config.numbers}, "
        f"checked with {CHECKED_WITH[precision]}"
    )
