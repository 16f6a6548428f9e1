"""Model cards: what a model is, how good it is, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdt_deploy.config import ModelConfig


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
    thresholds = ", ".join(f"{value:.4g}" for value in config.thresholds)
    lines = [
        f"# {source or 'A depth-sparse transformer'}, depth-sparse",
        "",
        "A linear probe scores every token on its embedding; a layer runs for the tokens whose "
        "score is above its threshold. Tokens below it skip the deeper layers.",
        "",
        "| | |",
        "| --- | --- |",
        f"| made from | {source or 'unknown'} |",
        f"| layers | {config.n_layers} |",
        f"| width, heads, feed-forward | {config.d_model}, {config.n_heads}, {config.d_ff} |",
        f"| positions | {config.max_positions} |",
        f"| head | {config.head.kind} |",
        f"| context of active tokens | {config.context} |",
        f"| thresholds | {thresholds} |",
        "",
        "## Quality",
        "",
    ]
    if quality is None:
        lines.append("Not measured. `sdt-deploy evaluate` compares it with its dense teacher.")
    else:
        lines += [
            "Beside its dense teacher on text that was not trained on (`sdt-deploy evaluate`):",
            "",
            "| measure | value |",
            "| --- | --- |",
            *(
                f"| {name} | {f'{value:.4f}' if isinstance(value, float) else value} |"
                for name, value in quality.items()
            ),
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
