"""Distil all-MiniLM-L6-v2: compare ways of training, then train the one that ships.

    python benchmarks/distill_data.py TEXTS_DIR DATA               # where the texts are
    python benchmarks/distill_minilm.py explore DATA OUT           # where the GPU is
    python benchmarks/distill_minilm.py train DATA OUT --name main --limit-s 540
    python benchmarks/distill_ship.py DATA OUT/main.safetensors adapter.safetensors

``explore`` runs variants side by side on one GPU, each for the same time, as one process each.
``train`` runs one variant alone. Both end within ``--limit-s`` seconds, the schedule with them, and
append a JSON line to ``OUT/NAME.jsonl`` for every measurement and now and then for the loss. They
need torch, numpy and safetensors only. ``--resume FILE`` begins where another run ended.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from distill_data import HELD_OUT, first, load_base, read_packed
from distill_variants import EXPLORED, MAIN, VARIANTS, Variant

from sdt_deploy.evaluation.agreement import agreement
from sdt_deploy.evaluation.oracle import embed_with_oracle
from sdt_deploy.files import write_file
from sdt_deploy.model.checkpoints import Checkpoint, TokenSample
from sdt_deploy.model.conversion import rebuilt
from sdt_deploy.model.probe import set_thresholds
from sdt_deploy.model.transformer import SparseDepthTransformer
from sdt_deploy.training import gates
from sdt_deploy.training.calibration import calibrated, free_logits
from sdt_deploy.training.config import DistillConfig
from sdt_deploy.training.distill import Distillation, StepReport
from sdt_deploy.training.lora import adapter_factors, merged_weights
from sdt_deploy.training.losses import LossWeights
from sdt_deploy.training.skipping import refitted_probe

DEPTHS = (3.0, 3.6, 4.0, 5.0, 6.0)
SWEEP = (2.6, 3.0, 3.3, 3.5, 3.6, 3.7, 4.0, 4.3, 4.6, 5.0, 5.5, 6.0)


class Student:
    """Data, teacher and student of one variant; trains, measures and writes."""

    def __init__(
        self, data: Path, out: Path, name: str, options: Variant, extra: Variant, begun: float
    ) -> None:
        self.out, self.name, self.extra, self.begun = out, name, extra, begun
        out.mkdir(parents=True, exist_ok=True)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base, probes = load_base(data)
        self.tests = {kind: read_packed(data / f"held-out-{kind}.xz") for kind in HELD_OUT}
        dense = copy.deepcopy(self.base.model).as_dense().to(self.device)
        values = {**MAIN, **options}
        values["loss"] = LossWeights(**values["loss"])
        if self.device == "cpu":
            values["batch_size"] = min(16, values["batch_size"])
            self.tests = {kind: first(sample, 128) for kind, sample in self.tests.items()}
        self.config = DistillConfig(**values)
        self.references = {
            kind: embed_with_oracle(dense, sample).embeddings for kind, sample in self.tests.items()
        }
        self.calibration = read_packed(data / "calibration.xz")
        self._calibrate(self._started(probes, self.calibration))
        self.train_s = 1.0
        self.training_begun = time.monotonic()
        self.distillation = Distillation(
            self.start,
            copy.deepcopy(self.base.model).as_dense(),
            read_packed(data / "texts.xz"),
            self.config,
            device=self.device,
            mixed_precision=self.device == "cuda",
            progress=lambda step: (time.monotonic() - self.training_begun) / self.train_s,
        )
        if extra.get("compile"):
            gates.layer_forward = torch.compile(gates.layer_forward, dynamic=True)

    def _calibrate(self, student: Checkpoint) -> None:
        self.start = calibrated(
            student,
            self.calibration,
            target_depth=self.config.target_depth,
            levels=self.config.levels,
            shallow_depth=self.config.shallow_depth,
        )
        self.scores = free_logits(self.start.model, self.calibration)[0].sigmoid().numpy()

    def _started(self, probes: dict[str, torch.Tensor], sample: TokenSample) -> Checkpoint:
        model, extra = self.base.model, self.extra
        if "context" in extra:
            model = rebuilt(model, context=extra["context"])
        if "probe_of" in extra:  # an adapter file
            model, found = rebuilt(model), safetensors.torch.load_file(extra["probe_of"])
            with torch.no_grad():
                model.scorer.weight.copy_(found["scorer.weight"])
                model.scorer.bias.copy_(found["scorer.bias"])
        if "probe" in extra:
            model = rebuilt(model)
            with torch.no_grad():
                model.scorer.weight.copy_(probes[f"{extra['probe']}/weight"])
                model.scorer.bias.copy_(probes[f"{extra['probe']}/bias"])
        if "n_layers" in extra:
            weights = model.state_dict()
            model = SparseDepthTransformer(
                model.config.replace(n_layers=extra["n_layers"], thresholds=())
            )
            model.load_state_dict({name: weights[name] for name in model.state_dict()})
        if extra.get("shallow_sep"):
            model = _with_shallow_last_token(model, sample)
        return dataclasses.replace(self.base, model=model.eval())

    def note(self, **values: Any) -> None:
        """Append a line to the log of the variant."""
        seconds = round(time.monotonic() - self.begun, 1)
        line = {"name": self.name, "step": self.distillation.step, "seconds": seconds, **values}
        with (self.out / f"{self.name}.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def train(
        self,
        until: float,
        measure_at: tuple[float, ...],
        log_every: int,
        save: Callable[[], None],
        save_every_s: float,
    ) -> None:
        """Train until ``time.monotonic()`` is ``until``; measure at those shares of the time."""
        saved = time.monotonic()
        self.training_begun, waiting = time.monotonic(), list(measure_at)
        self.train_s = max(1.0, until - self.training_begun)
        refit_at = self.extra.get("refit_at", 2.0)
        while not self.distillation.done:
            if (time.monotonic() - self.training_begun) / self.train_s >= refit_at:
                refit_at = 2.0
                self.refit()
            report = self.distillation.run_step()
            if report.step in (1, 20) or report.step % log_every == 0:
                self.note(**_shown(report))
            share = (time.monotonic() - self.training_begun) / self.train_s
            if waiting and share >= waiting[0]:
                waiting.pop(0)
                self.measure(DEPTHS)
            if time.monotonic() - saved > save_every_s:
                saved = time.monotonic()
                save()

    def measure(self, depths: tuple[float, ...]) -> None:
        """Log the agreement on held-out texts, in float32, at several depths."""
        config, torch.backends.cuda.matmul.allow_tf32 = self.config, False
        n_layers = self.start.model.config.n_layers
        wanted = [depth for depth in depths if depth <= n_layers] if n_layers == 6 else [n_layers]
        model = self._oracle()
        for depth in wanted:
            thresholds = set_thresholds(
                self.scores,
                self.start.pinned_share,
                model.config,
                depth,
                config.levels,
                shallow_depth=config.shallow_depth,
            )
            for kind, sample in self.tests.items():
                found = embed_with_oracle(model, sample, thresholds=thresholds)
                figures = dataclasses.asdict(agreement(found.embeddings, self.references[kind]))
                rounded = {key: round(float(value), 4) for key, value in figures.items()}
                depth_found = round(found.mean_depth, 3)
                self.note(target=depth, kind=kind, mean_depth=depth_found, **rounded)
        torch.backends.cuda.matmul.allow_tf32 = True

    def _oracle(self) -> SparseDepthTransformer:
        model = SparseDepthTransformer(self.start.model.config)
        model.load_state_dict(merged_weights(self.distillation.model))
        return model.to(self.device).eval()

    def refit(self) -> None:
        """Fit the probe to what skipping costs the model as it is, and set thresholds anew."""
        config, torch.backends.cuda.matmul.allow_tf32 = self.config, False
        before = self.start.model.scorer.weight.detach().clone()
        found = refitted_probe(
            self._oracle(),
            self.distillation.teacher.model,
            self.calibration,
            self.start.model.config.thresholds,
            shallow_depth=config.shallow_depth,
            max_tokens=60_000 if self.device == "cuda" else 2000,
        )
        with torch.no_grad():
            for parameter, value in zip(self.start.model.scorer.parameters(), found, strict=True):
                parameter.copy_(value)
        self._calibrate(self.start)
        now = self.start.model.scorer.state_dict()
        self.distillation.model.scorer.load_state_dict(now)
        same = torch.cosine_similarity(before, now["weight"].cpu(), dim=0)
        self.note(refitted=True, cosine_to_probe_before=round(float(same), 4))
        torch.backends.cuda.matmul.allow_tf32 = True

    def save(self, path: Path) -> None:
        """Write the trained tensors: factors and weights in float16, the rest in float32."""
        tensors = {}
        for name, (up, down) in (factors := adapter_factors(self.distillation.model)).items():
            tensors[f"{name}.up"], tensors[f"{name}.down"] = up.half(), down.half()
        base = self.base.model.state_dict()
        for name, value in merged_weights(self.distillation.model).items():
            changed = name not in base or not torch.equal(value.cpu(), base[name])
            if name not in factors and (changed or name.startswith("scorer.")):
                tensors[name] = value if value.ndim < 2 else value.half()
        recipe = {**self.config.to_dict(), "steps_made": self.distillation.step}
        meta = {
            "config": json.dumps(self.start.model.config.to_dict()),
            "recipe": json.dumps({**recipe, "train_s": round(self.train_s), "extra": self.extra}),
        }
        parts: list[dict[str, torch.Tensor]] = [{}]
        for name, tensor in tensors.items():  # parts of at most 15 MB
            if sum(x.nbytes for x in parts[-1].values()) + tensor.nbytes > 15_000_000:
                parts.append({})
            parts[-1][name] = tensor.detach().cpu().contiguous()
        for i, part in enumerate(parts):
            where = path.with_stem(f"{path.stem}-{i}") if i else path
            _write(where, part, meta)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Begin with the parameters that :meth:`save_parameters` wrote."""
        parameters = dict(self.distillation.model.named_parameters())
        for name, tensor in safetensors.torch.load_file(path).items():
            parameters[name].copy_(tensor)

    def save_parameters(self, path: Path) -> None:
        """Write the trained parameters in float32, without the optimiser's state."""
        trained = self.distillation.model.named_parameters()
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in trained
            if parameter.requires_grad
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, tensors)


def _write(
    path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, str] | None = None
) -> None:
    write_file(path, safetensors.torch.save(tensors, metadata=meta))


@torch.no_grad()
def _with_shallow_last_token(
    model: SparseDepthTransformer, sample: TokenSample
) -> SparseDepthTransformer:
    """Return the model with only its first special token pinned, and the last one scored low.

    Pinned tokens are a tenth of a short text, and pass through all layers.
    """
    first_id, last_id = model.config.pinned_token_ids
    model = rebuilt(model, pinned_token_ids=(first_id,))
    mean = model.embed(torch.from_numpy(sample.input_ids[None, :100]).long())[0].mean(dim=0)
    apart = model.embed(torch.full((1, 100), last_id))[0].mean(dim=0) - mean
    weight = model.scorer.weight
    weight.sub_((weight @ apart + 4.0) / apart.square().sum() * apart)
    return model


def _shown(report: StepReport) -> dict[str, float]:
    terms = {key: round(value, 5) for key, value in report.terms.items()}
    return {
        "loss": round(report.loss, 5),
        **terms,
        "depth": round(report.depth, 3),
        "wanted_depth": round(report.wanted_depth, 3),
        "n_tokens": report.n_tokens,
    }


def one(arguments: argparse.Namespace, begun: float) -> None:
    """Train and measure one variant within the limit."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # the other fused kernels take any mask
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    options, extra = VARIANTS.get(arguments.variant or arguments.name, ({}, {}))
    options, extra = {**options, **arguments.options}, {**extra, **arguments.extra}
    student = Student(arguments.data, arguments.out, arguments.name, options, extra, begun)
    if arguments.resume:
        student.load(arguments.resume)
    student.note(config=student.config.to_dict(), extra=extra, device=student.device)
    end = begun + arguments.limit_s

    def save() -> None:
        if arguments.command == "train":
            student.save(arguments.out / f"{arguments.name}.safetensors")
            student.save_parameters(arguments.keep / f"{arguments.name}.safetensors")

    student.train(
        end - arguments.reserve_s,
        tuple(arguments.measure_at),
        arguments.log_every,
        save,
        arguments.save_every_s,
    )
    save()
    student.measure(SWEEP if arguments.command == "train" else DEPTHS)
    student.note(finished=True)


def explore(arguments: argparse.Namespace, begun: float) -> None:
    """Run the variants side by side; end those that outstay the limit."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    started = {}
    options = json.dumps({"batch_size": 256, "max_length": 128, **arguments.options})
    for name in arguments.only or EXPLORED:
        left = arguments.limit_s - (time.monotonic() - begun) - 3
        command = [sys.executable, __file__, "one", arguments.data, arguments.out, "--name", name]
        command += ["--limit-s", f"{left}", "--reserve-s", f"{arguments.reserve_s}"]
        command += ["--options", options, "--log-every", f"{arguments.log_every}"]
        with (arguments.out / f"{name}.txt").open("w") as output:
            started[name] = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
    for name, process in started.items():
        try:
            process.wait(max(0.1, arguments.limit_s - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"{name}: ended at the limit", flush=True)
        text = (arguments.out / f"{name}.txt").read_text()
        (arguments.out / f"{name}.txt").unlink()
        print(f"{name}: exit status {process.returncode}")
        if process.returncode:
            print(text[-1500:], flush=True)
    _gather(arguments.out, list(started))


def _gather(out: Path, names: list[str]) -> None:
    """Put the logs of the variants into one file, and print the last measurements."""
    with (out / "explore.jsonl").open("w") as stream:
        for name in names:
            log = out / f"{name}.jsonl"
            lines = log.read_text().splitlines() if log.exists() else []
            stream.writelines(f"{line}\n" for line in lines)
            log.unlink(missing_ok=True)
            last = {(x["kind"], x["target"]): x for x in map(json.loads, lines) if "kind" in x}
            for (kind, target), x in last.items():
                print(
                    f"{name:12} {kind:8} step {x['step']:5} depth {x['mean_depth']:.2f} "
                    f"({target}) cosine {x['mean_cosine']:.4f} rho {x['spearman']:.3f} "
                    f"top1 {x['top1_agreement']:.3f} top10 {x['top10_agreement']:.3f}",
                    flush=True,
                )


def main() -> None:
    """Parse and run."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("explore", "train", "one"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="main")
    parser.add_argument("--variant", help="of VARIANTS; without it the one called like --name")
    parser.add_argument("--only", nargs="*", default=[], help="variants to explore")
    parser.add_argument("--limit-s", type=float, default=330)
    parser.add_argument("--reserve-s", type=float, default=40, help="for the last measurement")
    parser.add_argument("--measure-at", type=float, nargs="*", default=[0.5])
    parser.add_argument("--save-every-s", type=float, default=240)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--extra", type=json.loads, default={})
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--keep", type=Path, default=Path("/tmp/sdt-distill"))  # noqa: S108
    arguments = parser.parse_args()
    if arguments.command == "explore":
        explore(arguments, begun)
        return
    try:
        one(arguments, begun)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
