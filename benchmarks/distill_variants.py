"""What the trainings of ``distill_minilm.py`` differ in."""

from __future__ import annotations

from typing import Any

from distill_data import MAX_LENGTH

MAIN: dict[str, Any] = {
    "target_depth": 3.55,
    "n_steps": 10**9,
    "batch_size": 512,
    "max_length": MAX_LENGTH,
    "learning_rate": 5e-4,
    "warm_up": 0.03,
    "curriculum_share": 0.15,
    "mixed_share": 0.4,
    "n_memory": 16384,
    "loss": {"neighbours": 0.5, "temperature": 0.04, "hidden": 0.1, "shallow": 0.0},
}
LOSS = MAIN["loss"]
LONG: dict[str, Any] = {
    "batch_size": 1024,
    "max_length": 160,
    "curriculum_share": 0.1,
    "mixed_share": 0.3,
    "crop_share": 0.3,
    "replaced_share": 0.03,
    "loss": {**LOSS, "neighbours": 1.0},
}
Variant = dict[str, Any]
VARIANTS: dict[str, tuple[Variant, Variant]] = {
    "full": ({}, {}),
    "full-1.5e-3": ({"learning_rate": 1.5e-3}, {}),
    "full-2e-4": ({"learning_rate": 2e-4}, {}),
    "lora-112": ({"lora_rank": 112, "learning_rate": 2e-3}, {}),
    "lora-56": ({"lora_rank": 56, "learning_rate": 2e-3}, {}),
    "unmixed": ({"mixed_share": 0.0}, {}),
    "augmented": ({"crop_share": 0.5, "replaced_share": 0.1}, {}),
    "cropped": ({"crop_share": 0.5}, {}),
    "shallow-sep": ({}, {"shallow_sep": True}),
    "shallow-2": ({"shallow_depth": 2}, {}),
    "no-hidden": ({"loss": {**LOSS, "hidden": 0.0}}, {}),
    "all-hidden": ({"loss": {**LOSS, "hidden": 1.0, "shallow": 1.0}}, {}),
    "sharp": ({"loss": {**LOSS, "temperature": 0.02}}, {}),
    "stability": ({}, {"probe": "stability"}),
    "random": ({}, {"probe": "random"}),
    "truncated-4": ({"target_depth": 4.0}, {"n_layers": 4}),
    "truncated-3": ({"target_depth": 3.0}, {"n_layers": 3}),
    "compiled": ({}, {"compile": True}),
    "long-lora": ({**LONG, "lora_rank": 56, "learning_rate": 2e-3}, {}),
    "long-full": ({**LONG, "learning_rate": 6e-4}, {}),
    "long-refit": ({**LONG, "lora_rank": 56, "learning_rate": 2e-3}, {"refit_at": 0.3}),
    "refit-again": (
        {**LONG, "lora_rank": 56, "learning_rate": 7e-4, "curriculum_share": 0.0},
        {"refit_at": 0.0},
    ),
}
"""Name: what differs from :data:`MAIN`, and what differs in the model or the way of running it.

``refit_at`` is the share of the run after which the probe is fitted to what skipping costs;
``refit-again`` is for ``--resume`` with a run that ended.
"""
EXPLORED = [
    "full",
    "full-1.5e-3",
    "lora-112",
    "unmixed",
    "augmented",
    "shallow-sep",
    "random",
    "truncated-4",
]
