"""The check of an export: the folder, loaded by transformers alone, against the student as it was evaluated.

Five steps lead from the student to the folder. The logits [N, V] after each are compared with those before it, on the
same N *classify* prompts, each difference being the maximum absolute one:

- quantisation: a student with a quantised base against the same student with the original base, in the same dtype.
- rounding: the student in its dtype against the same student in float32, before merging. What its dtype costs.
- merging: the float32 student against its merged weights, computed in float32.
- casting: the merged weights against the same weights rounded to the dtype, computed in float32.
- saving: the rounded weights against the folder, loaded in float32.

Merging and saving must keep the logits within the limit of float32, 1e-4 or 1e-5 of the largest logit: an error in the
weights appears there, whatever the dtype is. Logits do not show every error: a norm after a projection undoes a factor
of its weights. So each weight after merging must be W + B A alpha / r, and each weight of the folder that which was
saved, bit for bit. The folder may then differ from the evaluated student by that limit +
quantisation + rounding + casting (the triangle inequality); all three are 0 for a student in float32. At least 99% of
the labels agree (of fewer than 100 posts, all but one), and a label that does not is within that tolerance of a tie: so
much more does the student prefer its label to the next one. Labels that quantisation changes are reported and not
limited: they are a property of the student, not of its export.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill.errors import RunError
from distill.models.backbone import Backbone, Features
from distill.models.scoring import next_token_logits
from distill.task.sample import Sample

LIMIT = 1e-4
"""Difference of logits that float32 computations of the same function may have, if no logit is above 10."""

_STEPS = ("quantisation", "rounding", "merging", "casting", "saving")

_BATCH = 8


@dataclass
class Check:
    """Logits of a student on N samples, recorded while it is exported; `compare` gives the result.

    Attributes:
        stages: logits [N, V] of the student as evaluated, and after each of the steps recorded so far.
        weights: digests of the weights that are saved (`reload.digests`).
        wrong: for merging and saving, the names of the weights that are not as they must be.
    """

    samples: Sequence[Sample]
    labels: Sequence[str]
    label_ids: torch.Tensor
    dtype: str
    batches: list[Features]
    stages: list[torch.Tensor] = field(default_factory=list)
    weights: Mapping[str, str] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def begin(cls, student: Backbone, samples: Sequence[Sample]) -> "Check":
        """Encode the samples and record the student as it is evaluated."""
        batches = [student.encode(samples[i : i + _BATCH], "classify") for i in range(0, len(samples), _BATCH)]
        check = cls(samples, student.labels.names, student.label_ids, student.settings.dtype, batches)
        check.record(student)
        return check

    @torch.inference_mode()
    def record(self, student: Backbone, *, changed: bool = True) -> None:
        """Record the logits of the student after one more step; `changed`: whether it does something."""
        if not changed:
            self.stages.append(self.stages[-1])
            return
        logits = [
            next_token_logits(student, {name: value.to(student.device) for name, value in inputs.items()})
            for inputs in self.batches
        ]
        self.stages.append(torch.cat(logits).float().cpu() if logits else torch.zeros(0, 1))

    def compare(self, step: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
        """Record which weights differ after a step, by their digests."""
        self.wrong[step] = [name for name, digest in expected.items() if found.get(name) != digest]

    def reload(self, folder: Path) -> None:
        """Record logits and weights of a folder that a new process loads, which does not import this package.

        Raises:
            RunError: the folder does not load.
        """
        with tempfile.TemporaryDirectory() as scratch:
            batches, logits, weights = (Path(scratch) / name for name in ("batches.pt", "logits.pt", "weights.json"))
            torch.save(self.batches, batches)
            script = Path(__file__).with_name("reload.py")
            command = [sys.executable, "-I", *map(str, (script, folder, batches, logits, weights))]
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                lines = process.stderr.strip().splitlines()
                reason = lines[-1] if lines else "no output"
                raise RunError(f"export: {folder} does not load with transformers alone: {reason}")
            self.stages.append(torch.load(logits, weights_only=True))
            self.compare("saving", self.weights, json.loads(weights.read_text()))

    def result(self) -> dict[str, Any]:
        """Compare the recorded stages.

        Returns:
            `dtype`, `weights` (the number of tensors), `samples`, `labels_equal`; `difference` of the folder from the
            evaluated student, and its `tolerance`; `float32_limit`; `steps`, the difference by each step; and
            `disagreements`, the posts whose labels differ, with both labels and the `margin` between the student's
            first two labels, in logits.
            Differences are None without samples.

        Raises:
            RunError: the folder gives other results than the student.
        """
        student, exported = self.stages[0], self.stages[-1]
        result: dict[str, Any] = {"dtype": self.dtype, "weights": len(self.weights), "samples": len(self.samples)}
        changed = next((f"{step} changes {names[0]}" for step, names in self.wrong.items() if names), "")
        if not self.samples:
            if changed:
                raise RunError(f"export: {changed}")
            return result | {"labels_equal": 0, "difference": None, "tolerance": None,
                             "float32_limit": None, "steps": None, "disagreements": []}  # fmt: skip
        pairs = zip(self.stages, self.stages[1:], strict=False)
        steps = dict(zip(_STEPS, map(_difference, pairs), strict=True))
        limit = max(LIMIT, LIMIT / 10 * float(self.stages[2].abs().max()))
        tolerance = limit + steps["quantisation"] + steps["rounding"] + steps["casting"]
        disagreements = self._disagreements(student, exported)
        result |= {
            "labels_equal": len(self.samples) - len(disagreements),
            "difference": _difference((student, exported)),
            "tolerance": tolerance,
            "float32_limit": limit,
            "steps": steps,
            "disagreements": disagreements,
        }
        if reason := _refusal(result, self._disagreements(self.stages[1], exported)) or changed:
            raise RunError(
                f"export: after reloading, {result['labels_equal']} of {result['samples']} labels agree and logits "
                f"differ by {result['difference']:.1e}; the limit is {tolerance:.1e}; {reason}"
            )
        return result

    def _disagreements(self, student: torch.Tensor, exported: torch.Tensor) -> list[dict[str, Any]]:
        """The samples whose most probable labels differ between logits [N, V]."""
        student, exported = student[:, self.label_ids], exported[:, self.label_ids]
        top = student.topk(min(2, student.shape[1])).values
        found = zip(
            self.samples, student.argmax(1).tolist(), exported.argmax(1).tolist(), top[:, 0] - top[:, -1], strict=True
        )
        return [
            {"id": sample.id, "student": self.labels[ours], "export": self.labels[theirs], "margin": float(margin)}
            for sample, ours, theirs, margin in found
            if ours != theirs
        ]


def _difference(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Maximum absolute difference of two tensors; infinite if either has a NaN or an infinity."""
    return float(
        (pair[0] - pair[1]).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()
    )  # Python's `max` ignores NaN


def _refusal(result: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Why an export is refused; empty if it is not.

    Args:
        others: disagreements with the student on its original base.
    """
    for name in ("merging", "saving"):
        if not (change := result["steps"][name]) <= result["float32_limit"]:
            return f"{name} changes them by {change:.1e}, more than {result['float32_limit']:.1e}"
    tolerance = result["tolerance"]
    if not result["difference"] <= tolerance < math.inf:
        return "the student and its merged weights give other logits"
    if len(others) > max(1, result["samples"] // 100):
        return f"at most {max(1, result['samples'] // 100)} label may differ, the first is that of {others[0]['id']}"
    if far := [other for other in others if other["margin"] > tolerance - result["steps"]["quantisation"]]:
        return f"the label of {far[0]['id']} differs, which has a margin of {far[0]['margin']:.1e}"
    return ""
