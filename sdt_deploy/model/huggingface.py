"""Hugging Face directories: the BERT family (BERT, MiniLM, RoBERTa), GPT-2 and Llama.

Read straight from ``config.json`` and the safetensors files; transformers is not needed. A
directory of sentence-transformers also tells the pooling and whether embeddings are normalised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdt_deploy.config import HeadConfig, ModelConfig, shown
from sdt_deploy.errors import CheckpointError, ConfigError
from sdt_deploy.files import read_bytes
from sdt_deploy.model.checkpoints import (
    Checkpoint,
    model_with_weights,
    read_json,
    read_safetensors,
    read_tokenizer,
)
from sdt_deploy.model.gpt2 import gpt2_config, gpt2_names
from sdt_deploy.model.llama import llama_config, llama_names

MAX_CARD_BYTES = 2**22
_PREFIXES = ("bert.", "roberta.")
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
    "output.LayerNorm": "feed_forward_norm",
}
_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": "embeddings.token.weight",
    "embeddings.position_embeddings.weight": "embeddings.position.weight",
    "embeddings.token_type_embeddings.weight": "embeddings.token_type.weight",
    "embeddings.LayerNorm.weight": "embeddings.norm.weight",
    "embeddings.LayerNorm.bias": "embeddings.norm.bias",
}
_POOLER = {"pooler.dense": "head.dense", "classifier": "head.projection"}
_ROBERTA_CLASSIFIER = {"classifier.dense": "head.dense", "classifier.out_proj": "head.projection"}


def load_huggingface(source: Path, *, head: str | None = None) -> Checkpoint:
    """Read a dense model.

    Args:
        source: directory with ``config.json`` and ``model.safetensors``, or several such files and
            ``model.safetensors.index.json``.
        head: ``hidden``, ``embedding`` or ``classify``; None: ``classify`` for a sequence
            classifier, ``embedding`` where the directory names a pooling, else ``hidden``. Of
            GPT-2 and Llama ``hidden`` or ``lm``; None: ``lm`` for a language model.

    Raises:
        CheckpointError: if the directory is incomplete or the architecture is not supported.
    """
    config = _read_object(source / "config.json")
    kind = config.get("model_type")
    if kind not in ("bert", "roberta", "gpt2", "llama", "mistral"):
        raise CheckpointError(
            f"{source}: model_type {kind!r} is not supported; supported are 'bert' (with MiniLM), "
            "'roberta', 'gpt2', 'llama' and 'mistral'"
        )
    tensors = {_unprefixed(name): value for name, value in _read_weights(source).items()}
    try:
        if kind == "gpt2":
            model_config = gpt2_config(config, head)
        elif kind in ("llama", "mistral"):
            model_config = llama_config(config, head)
        else:
            model_config = _model_config(source, config, tensors, head)
    except KeyError as error:
        raise CheckpointError(f"{source / 'config.json'} has no {error}") from error
    except (ConfigError, TypeError, IndexError) as error:
        raise CheckpointError(f"{source / 'config.json'}: {error}") from error
    try:
        if kind == "gpt2":
            renamed = gpt2_names(tensors, model_config)
        elif kind in ("llama", "mistral"):
            tied = config.get("tie_word_embeddings", False) is True
            renamed = llama_names(tensors, model_config, tied=tied)
        else:
            renamed = _rename(tensors, model_config, kind)
    except (ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: a tensor does not have the shape of those of {kind}: {error}"
        ) from error
    card = _model_card(source / "README.md")
    return Checkpoint(
        model=model_with_weights(model_config, renamed, where=str(source)),
        provenance={
            "source": card.get("title") or source.name,
            "source_format": f"Hugging Face {kind}",
            "license": card.get("license"),
        },
        tokenizer=read_tokenizer(source / "tokenizer.json"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def _read_weights(source: Path) -> dict[str, Tensor]:
    """Read ``model.safetensors``, or the files that ``model.safetensors.index.json`` names."""
    whole, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if whole.exists():
        return read_safetensors(whole)
    if not index.exists():
        raise CheckpointError(
            f"{source} has neither model.safetensors nor model.safetensors.index.json (other "
            "formats are not read, since they can run code); save the model again with "
            "safe_serialization=True"
        )
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(name, str) and _SHARD.fullmatch(name) for name in places.values()
    ):
        raise CheckpointError(
            f"{index}: weight_map must say in which file beside it, NAME.safetensors, each tensor "
            "is"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        tensors |= read_safetensors(source / name)
    if missing := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{source}: tensors that {index.name} lists are missing: {missing}")
    return tensors


def _module_kinds(path: Path) -> list[str]:
    """Return the last part of each module's type; none if there is no ``modules.json``."""
    modules = read_json(path) if path.exists() else []
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise CheckpointError(f"{path} does not hold a list of modules")
    return [str(module.get("type", "")).rpartition(".")[2] for module in modules]


def _unprefixed(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _model_config(
    source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: str | None
) -> ModelConfig:
    activation = config["hidden_act"]
    if activation not in ("gelu", "relu"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: gelu, relu")
    if config.get("is_decoder"):
        raise ConfigError(
            "is_decoder is set: its tokens see earlier ones only, and this reader knows encoders"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ConfigError("only absolute position embeddings are supported")
    offset = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    return ModelConfig(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        n_layers=config["num_hidden_layers"],
        d_ff=config["intermediate_size"],
        max_positions=config["max_position_embeddings"] - offset,
        position_offset=offset,
        n_token_types=config["type_vocab_size"],
        activation=activation,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        eps=config["layer_norm_eps"],
        context="all",
        probe="none",
        head=_head(source, config, tensors, head),
    )


def _head(
    source: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: str | None
) -> HeadConfig:
    classifiers = [
        name
        for name, needs in (
            ("classifier.weight", "pooler.dense.weight"),
            ("classifier.out_proj.weight", "classifier.dense.weight"),
        )
        if name in tensors and needs in tensors
    ]
    pooling = source / "1_Pooling" / "config.json"
    if wanted is None:
        wanted = "classify" if classifiers else "embedding" if pooling.exists() else "hidden"
    if wanted == "hidden":
        return HeadConfig(kind="hidden")
    if wanted == "classify":
        if not classifiers:
            raise ConfigError("the checkpoint has no sequence classifier")
        return HeadConfig(
            kind="classify",
            pooling="cls",
            n_classes=tensors[classifiers[0]].shape[0],
            dense_tanh=True,
        )
    if wanted != "embedding":
        raise ConfigError(f"head {wanted!r} is not one of hidden, embedding, classify")
    if not pooling.exists():
        return HeadConfig(kind="embedding", pooling="mean")
    modes = _read_object(pooling)
    kinds = _module_kinds(source / "modules.json")
    mode = modes.get("pooling_mode")  # since sentence-transformers 6; before, a flag for each
    if mode is None:
        flags = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        chosen = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value]
        mode = flags.get(chosen[0], chosen[0]) if len(chosen) == 1 else chosen
    if mode not in ("mean", "cls"):
        raise ConfigError(f"pooling {shown(mode)} is not supported; supported: mean, cls")
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ConfigError(f"sentence-transformers modules not supported: {sorted(unknown)}")
    return HeadConfig(
        kind="embedding",
        pooling="mean" if mode == "mean" else "cls",
        normalize="Normalize" in kinds,
    )


def _rename(tensors: Mapping[str, Tensor], config: ModelConfig, kind: str) -> dict[str, Tensor]:
    """Give the tensors their names here.

    Left out are a pooler or a classifier that the chosen head does not use, masked-language-model
    heads, and position ids, which are not weights.
    """
    heads: dict[str, str] = {}
    if config.head.kind == "classify":
        heads = _ROBERTA_CLASSIFIER if kind == "roberta" else _POOLER
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base, _, leaf = name.rpartition(".")
        match = _LAYER.fullmatch(name)
        if match and match[2] in _LAYER_NAMES:
            renamed[f"layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"] = tensor
        elif name in _EMBEDDINGS:
            renamed[_EMBEDDINGS[name]] = tensor
        elif base in heads:
            renamed[f"{heads[base]}.{leaf}"] = tensor
        elif leaf != "position_ids" and not name.startswith(
            ("pooler.", "classifier.", "cls.", "lm_head.")
        ):
            renamed[name] = tensor
    return renamed


def _model_card(path: Path) -> dict[str, str]:
    """Return the title of a model card and the licence in its front matter, as far as given."""
    try:
        text = read_bytes(path, max_bytes=MAX_CARD_BYTES).decode(errors="replace")
    except OSError:
        return {}
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    license_line = re.search(r"^license:\s*(\S+)", front[1] if front else "", re.MULTILINE)
    title = re.search(r"^# (.+)$", text[front.end() if front else 0 :], re.MULTILINE)
    found = {"license": license_line and license_line[1], "title": title and title[1].strip()}
    return {key: value for key, value in found.items() if value}
