"""Commands about training and quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sdt_deploy.choices import Baseline, Curriculum, Device, Levels, ProbeTraining
from sdt_deploy.commands.options import Json, Overwrite, Quiet
from sdt_deploy.console import clean_up_on_sigterm, console, print_json, progress_bar
from sdt_deploy.errors import InputError


def evaluate(
    subject: Annotated[Path, typer.Argument(help="Bundle, or any model that convert accepts.")],
    teacher: Annotated[Path, typer.Option(help="Dense model to compare with.")],
    texts: Annotated[Path, typer.Option(help="Held-out text, one paragraph per line.")],
    depths: Annotated[
        str | None, typer.Option(help="Mean depths to sweep, 3,3.5,4; nothing is recorded then.")
    ] = None,
    baseline: Annotated[
        list[Path] | None, typer.Option(help="Model or bundle to set beside it; with --depths.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw quality over depth (PNG); with --depths.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare with a dense teacher on held-out text; a bundle keeps the result.

    Examples::

        sdt-deploy evaluate bundle --teacher ./all-MiniLM-L6-v2 --texts held-out.txt
        sdt-deploy evaluate bundle --teacher ./all-MiniLM-L6-v2 --texts held-out.txt --json
        sdt-deploy evaluate model --teacher ./dense --texts t.txt --depths 3,4,5 --baseline first-4
    """
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    require("torch", extra="export", purpose="Running the teacher")
    from sdt_deploy.description import quality_figures
    from sdt_deploy.evaluation.evaluate import evaluate as measure
    from sdt_deploy.tokenization import read_lines

    if depths is not None:
        _sweep(subject, teacher, texts, depths, baseline or [], plot_file, as_json)
        return
    if baseline or plot_file is not None:
        raise InputError("--baseline and --plot go with a sweep: give --depths too")
    quality = measure(subject, teacher, read_lines(texts)).to_dict()
    if as_json:
        print_json(quality)
        return
    for name, shown in quality_figures(quality).items():
        console.print(f"[bold]{name:<16}[/bold]{shown}", highlight=False)


def _sweep(
    subject: Path,
    teacher: Path,
    texts: Path,
    depths: str,
    baselines: list[Path],
    plot_file: Path | None,
    as_json: bool,
) -> None:
    from rich.table import Table

    from sdt_deploy.evaluation.frontier import frontier, plot, read_depths
    from sdt_deploy.tokenization import read_lines

    wanted, lines = read_depths(depths), read_lines(texts)
    with progress_bar("sweep") as advance:
        found = frontier(subject, teacher, lines, wanted, baselines=baselines, progress=advance)
    if plot_file is not None:
        plot(found, plot_file)
    if as_json:
        print_json(found.to_dict())
        return
    table = Table("model", "depth", "FLOPs", "cosine", "p5", "Spearman", "top-1", "top-10")
    for point in found.points:
        q = point.quality
        shown = point.flops_ratio, q.mean_cosine, q.p5_cosine, q.spearman
        shares = *shown, q.top1_agreement, q.top10_agreement
        cells = [f"{q.mean_depth:.2f}", *(f"{value:.3f}" for value in shares)]
        table.add_row(escape(point.model), *cells)
    console.print(table)


def distill(
    teacher: Annotated[Path, typer.Argument(help="Dense model; any that convert accepts.")],
    out: Annotated[Path, typer.Argument(help="Native model directory to make.")],
    texts: Annotated[list[Path], typer.Option(help="Text, one paragraph a line; repeatable.")],
    target_depth: Annotated[float, typer.Option(help="Mean layers per token at the end.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to make.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens; longer texts are cut.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 3e-4,
    probe: Annotated[
        ProbeTraining,
        typer.Option(
            help="fixed: as it was fitted. straight-through, annealed: trained through gates that "
            "are hard, or become so."
        ),
    ] = "fixed",
    levels: Annotated[Levels, typer.Option(help="Depths to use.")] = "two-level",
    curriculum: Annotated[
        Curriculum, typer.Option(help="How the depth falls to the target.")
    ] = "cosine",
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank; default: all weights.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Write an adapter file too; needs --lora-rank.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Go on from this adapter file, its probe included.")
    ] = None,
    baseline: Annotated[
        Baseline | None,
        typer.Option(
            help="Train something to compare with: the first TARGET_DEPTH layers for every token, "
            "or a random probe."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE, a field of DistillConfig, or loss.NAME=VALUE, of LossWeights.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of order and adapters.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to train.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run stopped.")] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    cache_mb: Annotated[
        int, typer.Option(min=0, help="Keep the teacher's states if they fit.")
    ] = 1024,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a dense model to skip layers and keep its output.

    Examples::

        sdt-deploy distill ./all-MiniLM-L6-v2 model --texts texts.txt --target-depth 3.6
        sdt-deploy distill ./bert model --texts a.txt --target-depth 7 --device cuda --resume
    """
    from sdt_deploy.extras import require

    clean_up_on_sigterm()
    require("torch", extra="export", purpose="Training")
    require("safetensors", extra="export", purpose="Training")
    from sdt_deploy.tokenization import read_lines
    from sdt_deploy.training.config import DistillConfig
    from sdt_deploy.training.job import JobOptions, training_directory
    from sdt_deploy.training.job import distill as distil

    config = DistillConfig(
        target_depth=target_depth,
        n_steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=learning_rate,
        probe=probe,
        levels=levels,
        curriculum=curriculum,
        lora_rank=lora_rank,
        seed=seed,
    ).with_settings(settings or [])
    options = JobOptions(
        device=device,
        resume=resume,
        save_every=save_every,
        cache_mb=cache_mb,
        adapter=adapter,
        overwrite=overwrite,
    )
    lines = [line for path in texts for line in read_lines(path)]
    with progress_bar("distil") as advance:
        _, last = distil(
            teacher,
            out,
            lines,
            config,
            options,
            start=start,
            baseline=baseline,
            progress=advance,
        )
    if as_json:
        log = str(training_directory(out))
        print_json({"model": str(out), "n_steps": config.n_steps, "last_step": last, "log": log})
        return
    said = (
        "" if last is None else f", loss {last.loss:.4f}, depth of the last batch {last.depth:.2f}"
    )
    console.print(
        f"[bold]{escape(str(out))}[/bold]: {config.n_steps} steps{said}; log in "
        f"{escape(str(training_directory(out)))}",
        highlight=False,
    )
