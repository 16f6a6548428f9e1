"""Model cards: what a model is, how good it is, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.config import ModelConfig
from sdt_deploy.description import described, quality_figures


def model_card(
    config: ModelConfig,
    *,
    provenance: Mapping[str, Any],
    quality: Mapping[str, Any] | None,
) -> str:
    """Return a card in Markdown, with the front matter that Hugging Face reads.

    Args:
        config: the model.
        provenance: where the weights come from, their licence, how the probe was made.
        quality: what ``sdt-deploy evaluate`` measured; None: what the adapter says of itself, if
            one was merged.
    """
    source = provenance.get("source")
    quality = quality or provenance.get("adapter", {}).get("quality")
    is_embedding = config.head.kind == "embedding"
    front = [
        "---",
        f"license: {provenance.get('license') or 'unknown'}",
        "library_name: sdt-deploy",
        f"pipeline_tag: {'sentence-similarity' if is_embedding else 'feature-extraction'}",
        "tags: [depth-sparse, dynamic-depth, sdt-deploy]",
        "---",
    ]
    lines = [
        f"# {source or 'A depth-sparse transformer'}, depth-sparse",
        "",
        _how(config),
        "",
        "| | |",
        "| --- | --- |",
        f"| made from | {source or 'unknown'} |",
        *(f"| {name} | {what} |" for name, what in described(config).items()),
        "",
        "## Quality",
        "",
    ]
    if quality is None:
        lines.append(
            "Not measured. `sdt-deploy evaluate` compares a bundle with its dense teacher and "
            "keeps the result in it; `sdt_deploy.hf.SdtModel.from_bundle` takes that along."
        )
    else:
        lines += [
            "Beside its dense teacher on text that was not trained on (`sdt-deploy evaluate`):",
            "",
            "| measure | value |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in quality_figures(quality).items()),
        ]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import sdt_deploy.hf",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")',
        'model = AutoModel.from_pretrained("THIS_DIRECTORY")',
        'found = model(**tokenizer(["To be, or not to be"], return_tensors="pt"))',
        "print(found.output.shape, found.depths)",
        "```",
        "",
        "That computes every layer for every token. For speed, export a bundle: "
        "`sdt-deploy export THIS_DIRECTORY bundle`.",
    ]
    return "\n".join([*front, *lines]) + "\n"


def _how(config: ModelConfig) -> str:
    """Say how tokens are routed."""
    if config.probe == "none":
        return "A dense model: every token passes through every layer."
    capacity = config.selection == "capacity"
    takes = (
        "the share of a text's tokens that its threshold leaves, those with the highest scores"
        if capacity
        else "the tokens whose score is above its threshold"
    )
    if config.routing == "once":
        return (
            f"A linear probe scores every token on its embedding; a layer runs for {takes}. The "
            "others skip the deeper layers."
        )
    then = "have left for good" if config.leaving == "exit" else "sit out this layer only"
    return (
        "Each layer has a linear probe, which scores the states that come into it; the layer runs "
        f"for {takes}. The others {then}."
    )
