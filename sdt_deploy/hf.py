"""Hugging Face manners: ``AutoModel`` for native directories, sentence-transformers from bundles.

::

    import sdt_deploy.hf  # registers the classes
    model = transformers.AutoModel.from_pretrained("model")  # a native directory
    model.save_pretrained("published")  # with a model card; convert and export read it too

    encoder = SentenceTransformer(modules=[sdt_deploy.hf.BundleModule("bundle")])

The model is the reference in PyTorch, which computes every token in every layer and keeps what it
should have skipped: it is for study, training and publishing, not for speed. A bundle is for speed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from sdt_deploy.bundle import MARKER, Bundle, Manifest
from sdt_deploy.config import ModelConfig
from sdt_deploy.errors import InputError
from sdt_deploy.extras import require
from sdt_deploy.files import new_directory, write_file
from sdt_deploy.model.blocks import Scorer
from sdt_deploy.model.cards import model_card
from sdt_deploy.model.checkpoints import FORMAT, FORMAT_VERSION, MODEL_TYPE
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.runtime.batch import TokenBatch
from sdt_deploy.runtime.session import Session

require("transformers", extra="hf", purpose="Hugging Face classes")
import transformers  # noqa: E402  (after a message that says how to install it)


class SdtConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    """What the ``config.json`` of a native directory holds.

    Args:
        model: :meth:`sdt_deploy.config.ModelConfig.to_dict`; None: a tiny model, since Hugging Face
            makes configurations without arguments.
        provenance: see :class:`sdt_deploy.model.checkpoints.Checkpoint`.
        score_quantiles: likewise.
        pinned_share: likewise.
        quality: what ``sdt-deploy evaluate`` measured, for the model card.
        others: of Hugging Face.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        model: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        score_quantiles: Sequence[float] | None = None,
        pinned_share: float = 0.0,
        quality: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if model is None:
            tiny = ModelConfig(
                vocab_size=1, d_model=1, n_heads=1, n_layers=1, d_ff=1, max_positions=1
            )
            model = tiny.to_dict()
        self.model = ModelConfig.from_dict(model).to_dict()
        self.provenance = dict(provenance or {})
        self.score_quantiles = None if score_quantiles is None else list(score_quantiles)
        self.pinned_share = pinned_share
        self.quality = None if quality is None else dict(quality)
        others.pop("format", None)
        others.pop("format_version", None)
        self.format = FORMAT
        self.format_version = FORMAT_VERSION
        super().__init__(**others)

    @property
    def sdt(self) -> ModelConfig:
        """The model's configuration, validated."""
        return ModelConfig.from_dict(self.model)

    @property
    def hidden_size(self) -> int:
        """Width of the states, by the name that Hugging Face tools look for."""
        return int(self.model["d_model"])

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, likewise."""
        return int(self.model["n_layers"])

    @property
    def num_attention_heads(self) -> int:
        """Number of heads, likewise."""
        return int(self.model["n_heads"])

    @property
    def num_key_value_heads(self) -> int:
        """Number of heads of keys and values, likewise."""
        return self.sdt.n_key_heads

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, likewise."""
        return int(self.model["vocab_size"])

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence, likewise."""
        return int(self.model["max_positions"])

    def to_diff_dict(self) -> dict[str, Any]:
        """Return everything: a native directory says all of it, defaults or not."""
        full: dict[str, Any] = self.to_dict()
        return full


@dataclass
class SdtModelOutput(transformers.utils.ModelOutput):  # type: ignore[misc]
    """What :class:`SdtModel` returns."""

    last_hidden_state: Tensor | None = None
    """``[batch, seq, d_model]``, after the final norm."""
    output: Tensor | None = None
    """Of the head: ``[batch, width]``, or ``[batch, seq, width]`` for heads per token."""
    scores: Tensor | None = None
    """``[batch, seq]`` float32; with routing ``per_layer`` ``[batch, seq, n_layers]``."""
    depths: Tensor | None = None
    """``[batch, seq]`` int32; 0 for padding."""


class SdtModel(transformers.PreTrainedModel):  # type: ignore[misc]
    """The reference model behind Hugging Face's interface; its weights have the native names."""

    config_class = SdtConfig
    base_model_prefix = ""
    main_input_name = "input_ids"

    def __init__(self, config: SdtConfig) -> None:
        super().__init__(config)
        oracle = SparseDepthTransformer(config.sdt)
        for name, child in oracle.named_children():
            self.add_module(name, child)
        # Not registered as a module, or every weight would have two names.
        object.__setattr__(self, "_oracle", oracle)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no file holds: the pinned ids. Weights come from files."""
        if isinstance(module, Scorer):
            pinned = torch.tensor(self.config.sdt.pinned_token_ids, dtype=torch.int32)
            module.pinned_token_ids.data.copy_(pinned)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        table: nn.Module = self.embeddings.token
        return table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        thresholds: Sequence[float] | None = None,
        return_dict: bool | None = None,
    ) -> SdtModelOutput | tuple[Tensor, ...]:
        """Run the model.

        Args:
            input_ids: ``[batch, seq]`` integers, padded on the right.
            attention_mask: ``[batch, seq]``, 1 for tokens; None: nothing is padding.
            token_type_ids: ``[batch, seq]``, or None for zeros.
            thresholds: one per layer, instead of the model's.
            return_dict: False: a tuple.

        Raises:
            InputError: if the ids are no batch, or padding stands before tokens.
        """
        if input_ids.ndim != 2 or not input_ids.numel():
            raise InputError(f"input_ids must be [batch, seq], not {list(input_ids.shape)}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask[:, 0].all()):
            raise InputError(
                "padding must stand on the right, after at least one token of every sequence: set "
                'tokenizer.padding_side = "right"'
            )
        oracle: SparseDepthTransformer = self._oracle
        found = oracle(input_ids, mask, token_type_ids, thresholds=thresholds)
        named = SdtModelOutput(
            last_hidden_state=oracle.head.normed(found.hidden_states),
            output=found.output,
            scores=found.scores,
            depths=found.depths,
        )
        return named if return_dict is not False else named.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write a native directory, with a model card unless one is there."""
        super().save_pretrained(save_directory, **options)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            config = self.config
            text = model_card(config.sdt, provenance=config.provenance, quality=config.quality)
            write_file(card, text.encode())

    @classmethod
    def from_bundle(cls, bundle: str | Path | Bundle) -> Self:
        """Rebuild the model of a bundle, with its provenance and its quality record.

        Raises:
            BundleError: if the bundle cannot be used.
            MissingExtraError: if onnx is not installed.
        """
        from sdt_deploy.exporters.restore import restore

        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = opened.manifest
        config = SdtConfig(
            model=manifest.model.to_dict(),
            provenance=manifest.provenance,
            score_quantiles=manifest.score_quantiles,
            pinned_share=manifest.pinned_share,
            quality=manifest.quality,
        )
        model: Self = cls(config).eval()
        model.load_state_dict(restore(opened).state_dict())
        return model


class SdtTokenizer(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
    """The ``tokenizer.json`` of a native directory; the padding token comes from it."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Self:
        """Read a directory, see ``transformers``.

        No ``__init__`` does it: where there is one, transformers builds the tokenizer anew from its
        vocabulary and drops what else the file says.
        """
        made: Any = super().from_pretrained(*arguments, **options)
        made.padding_side = "right"
        if made.pad_token is None:
            padding, vocabulary = made.backend_tokenizer.padding or {}, made.get_vocab()
            known = (padding.get("pad_token"), "[PAD]", "<pad>")
            made.pad_token = next((token for token in known if token in vocabulary), None)
        found: Self = made
        return found


class BundleModule(nn.Module):
    """A bundle as the only module of a ``SentenceTransformer``.

    Args:
        bundle: directory of a bundle with an embedding head and a tokenizer.
        options: of :meth:`sdt_deploy.Session.open`.

    Raises:
        BundleError: if the bundle cannot be used.
        InputError: if it has no embedding head, or no tokenizer.
    """

    save_in_root = False
    _BUNDLE = "bundle"

    def __init__(self, bundle: str | Path, **options: Any) -> None:
        super().__init__()
        self.session = Session.open(bundle, **options)
        check_embeds(self.session.manifest, str(bundle))
        self.tokenizer = self.session.tokenizer
        self.max_seq_length = self.session.manifest.model.max_positions

    @property
    def modalities(self) -> list[str]:
        """What it embeds."""
        return ["text"]

    def get_embedding_dimension(self) -> int:
        """Return the length of an embedding."""
        return self.session.manifest.model.output_width

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(
        self, inputs: Sequence[str], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Tokenize texts; long ones are cut to ``max_seq_length``.

        Returns:
            ``input_ids`` and ``attention_mask``, both ``[batch, seq]`` int64, padded with zeros.
        """
        texts = [f"{prompt or ''}{text}" for text in inputs]
        ids, cu_seqlens = self.tokenizer.encode(
            texts, max_length=self.max_seq_length, overflow="truncate"
        )
        batch = TokenBatch.from_packed(ids, cu_seqlens, config=self.session.manifest.model)
        padded = {
            "input_ids": batch.padded(batch.input_ids),
            "attention_mask": batch.attention_mask,
        }
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in padded.items()}

    tokenize = preprocess

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Run the session; adds ``sentence_embedding [batch, width]`` float32."""
        ids, mask = features["input_ids"], features["attention_mask"]
        result = self.session.run(ids.cpu().numpy(), attention_mask=mask.cpu().numpy())
        features["sentence_embedding"] = torch.from_numpy(result.output).to(ids.device)
        return features

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Copy the bundle, so that what ``SentenceTransformer.save`` writes stands alone.

        A bundle that is there already is replaced.

        Raises:
            BundleIntegrityError: if this one was removed or exported anew since it was opened.
            OutputError: if it cannot be written.
        """
        source, target = self.session.bundle.path, Path(output_path) / self._BUNDLE
        if target.exists() and target.samefile(source):
            return
        with new_directory(target, marker=MARKER, overwrite=True) as directory:
            shutil.copytree(source, directory, dirs_exist_ok=True)
            self.session.bundle.check_current()

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> Self:
        """Open what :meth:`save` wrote, in a local directory.

        ``SentenceTransformer(path, trust_remote_code=True)`` comes here: the class is not its own.
        """
        return cls(Path(model_name_or_path) / subfolder / cls._BUNDLE)


def check_embeds(manifest: Manifest, where: str) -> None:
    """Check that a bundle gives one embedding per text.

    Raises:
        InputError: if it does not.
    """
    head = manifest.model.head.kind
    if head != "embedding":
        raise InputError(
            f"{where} has the head {head!r}; sentence-transformers take bundles with the head "
            "'embedding' (convert --head embedding)"
        )


def _register() -> None:
    transformers.AutoConfig.register(MODEL_TYPE, SdtConfig, exist_ok=True)
    transformers.AutoModel.register(SdtConfig, SdtModel, exist_ok=True)
    transformers.AutoTokenizer.register(SdtConfig, fast_tokenizer_class=SdtTokenizer, exist_ok=True)


_register()
