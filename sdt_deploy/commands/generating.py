"""The command that continues prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sdt_deploy.commands.inputs import read_inputs
from sdt_deploy.commands.options import (
    BundleArgument,
    Ids,
    Json,
    Quiet,
    TextFile,
    Texts,
    Threads,
)
from sdt_deploy.console import console, print_json

if TYPE_CHECKING:
    from sdt_deploy.runtime.generation import GenerationResult


def generate(
    bundle: BundleArgument,
    text: Texts = None,
    texts: TextFile = None,
    ids: Ids = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens of each prompt at most.")] = 64,
    eos: Annotated[
        list[int] | None, typer.Option(help="Id of a token that ends a text; may be given again.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, else drawn.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the likeliest K tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    target_depth: Annotated[
        float | None, typer.Option(help="Mean depth to aim at; default: the model's thresholds.")
    ] = None,
    n_threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue texts or token ids with a causal model, on the CPU.

    Examples::

        sdt-deploy generate bundle --text "To be, or" --max-new-tokens 20
        sdt-deploy generate bundle --texts prompts.txt --temperature 0.8 --top-k 40 --json
    """
    from sdt_deploy.bundle import TOKENIZER
    from sdt_deploy.runtime.generation import generate
    from sdt_deploy.runtime.session import Session

    inputs = read_inputs(text, texts, ids)
    with Session.open(bundle, n_threads=n_threads) as session:
        result = generate(
            session,
            inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            target_depth=target_depth,
        )
        written = [str(tokens.tolist()) for tokens in result.tokens]
        if session.bundle.has(TOKENIZER):
            written = [session.tokenizer.decode(tokens) for tokens in result.tokens]
    if as_json:
        print_json(_document(result, written))
        return
    for one in written:
        console.print(escape(one), highlight=False)
    usage = result.cache
    per_step = f", {result.decode_ms / result.n_steps:.1f} ms a step" if result.n_steps else ""
    console.print(
        f"mean depth {result.layer_usage.mean_depth:.2f}, prompts {result.prefill_ms:.1f} ms"
        f"{per_step}, cache {usage.n_bytes / 1e6:.2f} MB, {usage.ratio:.2f} of a dense one",
        highlight=False,
    )


def _document(result: GenerationResult, written: list[str]) -> dict[str, Any]:
    return {
        "sequences": [
            {"text": one, "tokens": tokens.tolist(), "ended": bool(ended)}
            for one, tokens, ended in zip(written, result.tokens, result.ended, strict=True)
        ],
        "layer_usage": result.layer_usage,
        "mean_depth": result.layer_usage.mean_depth,
        "cache": {**vars(result.cache), "saved_bytes": result.cache.saved_bytes},
        "prefill_ms": result.prefill_ms,
        "decode_ms": result.decode_ms,
        "n_steps": result.n_steps,
    }
