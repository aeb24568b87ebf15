"""The step of `student_step.py --model`: a pretrained text model, beside the published code and TRL's trainers.

Implementations, on the same rows; each step is loss, backward and AdamW:
    published: published.py; cross-entropy, and KL at every position of padded sequences.
    online: StudentModule on packed sequences, cross-entropy and KL at the answer tokens.
    trl-distillation: the loss of `DistillationTrainer` at the recorded answers; KL only.
    hard: StudentModule on packed sequences, without a teacher.
    trl-sft: the loss of `SFTTrainer` on one sequence per task; cross-entropy.

The losses of TRL's trainers are called directly, so their data loading, generation and logging are not timed. All
implementations share one student and one teacher in one process. TRL is the extra `trl`.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import published
import torch
import workload
from implementations import TEMPERATURE, WEIGHT
from measuring import Usage, measure_cpu, write_json
from torch.nn.utils.rnn import pad_sequence
from workload import TASKS

from distill.models.backbone import IGNORE, Backbone, Features, LoraSettings, ModelSettings, create
from distill.task.sample import Sample
from distill.training.batches import Batch, check_compatibility, encode_tasks
from distill.training.fused_loss import answer_loss
from distill.training.soft_targets import OnlineTargets
from distill.training.student import DistillationSettings, StudentModule, StudentSettings

IMPLEMENTATIONS = ("published", "online", "trl-distillation", "hard", "trl-sft")
BASELINES = {"published": "online", "trl-distillation": "online", "trl-sft": "hard"}
"""Ours that each baseline is compared with: it does the same work, or more."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of losses, in nats per token."""
LEARNING_RATE = 1e-6  # the implementations share the student: it should hardly change


def sequences(samples: Sequence[Sample], backbone: Backbone) -> list[tuple[list[int], list[int]]]:
    """Pairs of prompt and answer tokens, one for each task of each sample."""
    pairs = []
    for features in encode_tasks(samples, backbone, TASKS).values():
        for ids, labels, mask in zip(*(features[n] for n in ("input_ids", "labels", "attention_mask")), strict=True):
            kept = mask.bool()
            answer = labels[kept] != IGNORE
            pairs.append((ids[kept][~answer].tolist(), ids[kept][answer].tolist()))
    return pairs


def sft_rows(pairs: Sequence[tuple[list[int], list[int]]]) -> list[dict[str, list[int]]]:
    """Rows of `SFTTrainer`: the loss is on the answers only."""
    return [{"input_ids": p + a, "labels": [IGNORE] * len(p) + a} for p, a in pairs]


def distillation_inputs(pairs: Sequence[tuple[list[int], list[int]]], padding: int) -> Features:
    """Inputs of `DistillationTrainer`: left-padded prompts and right-padded answers [B, T], with masks."""
    inputs: Features = {}
    for name, rows, side in zip(("prompt", "completion"), zip(*pairs, strict=True), ("left", "right"), strict=True):
        ids = [torch.tensor(row) for row in rows]
        inputs[f"{name}_ids"] = pad_sequence(ids, True, padding, side)
        inputs[f"{name}_mask"] = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    return inputs


class Bench:
    """Student, teacher and the implementations, at one precision."""

    def __init__(self, options: argparse.Namespace, dtype: Any, samples: list[Sample], folder: str) -> None:
        lora = LoraSettings() if options.lora else None
        settings = ModelSettings(str(options.model), lora=lora, dtype=dtype, images=False)
        self.student = create(settings, workload.LABELS, options.model)
        self.teacher = create(
            replace(settings, path=str(options.teacher), lora=None), workload.LABELS, options.teacher, train=False
        )
        self.samples, self.size, self.dtype = samples, options.batch_size[0], dtype
        self.online, self.hard = (self._module(soft) for soft in (OnlineTargets(self.teacher, self.student), None))
        self.lengths = published.padded_lengths(samples, self.student, list(TASKS))
        self.trainable = [weight for weight in self.student.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE)
        self.sft, self.distillation = self._trl_trainers(folder)
        self.student.model.train()
        torch.manual_seed(0)
        for name, weight in self.student.model.named_parameters():
            if "lora_B" in name:  # zero at first: a student of the same weights as its teacher would equal it
                torch.nn.init.normal_(weight, std=0.02)

    def _module(self, soft: OnlineTargets | None) -> StudentModule:
        return StudentModule(
            self.student, StudentSettings(distillation=DistillationSettings(WEIGHT, TEMPERATURE)), soft
        )

    def _trl_trainers(self, folder: str) -> tuple[Any, Any]:
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

        options: dict[str, Any] = {
            "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
            "per_device_train_batch_size": self.size,
        }  # fmt: skip
        model, tokenizer = self.student.model, self.student.processor.tokenizer
        sft = SFTTrainer(
            model, SFTConfig(**options, max_length=None), processing_class=tokenizer,
            train_dataset=Dataset.from_list(sft_rows(sequences(self.batch(0), self.student))),
        )  # fmt: skip
        distillation = DistillationTrainer(
            model, self.teacher.model, DistillationConfig(**options, beta=0.0, temperature=1.0),
            processing_class=tokenizer, train_dataset=Dataset.from_list([{"prompt": "none"}]),
        )  # fmt: skip
        return sft, distillation

    def batch(self, index: int) -> list[Sample]:
        return self.samples[index * self.size : (index + 1) * self.size]

    def prepare(self, name: str, samples: list[Sample]) -> Any:
        """The encoded batch of an implementation; not timed."""
        if name == "published":
            return published.encode(samples, self.student, self.lengths)
        if name == "trl-sft":
            return self.sft.data_collator(sft_rows(sequences(samples, self.student)))
        if name == "trl-distillation":
            return distillation_inputs(sequences(samples, self.student), self.student.processor.tokenizer.pad_token_id)
        return (self.online if name == "online" else self.hard).encode(samples)

    def loss(self, name: str, batch: Any) -> torch.Tensor:
        if name == "published":
            return published.loss(self.student.model, self.teacher.model, batch, WEIGHT, TEMPERATURE)
        if name == "trl-sft":
            count = (batch["labels"] != IGNORE).sum()
            return self.sft.compute_loss(self.student.model, dict(batch), num_items_in_batch=count)  # type: ignore[no-any-return]
        if name == "trl-distillation":
            return self.distillation.compute_loss(self.student.model, batch)  # type: ignore[no-any-return]
        return (self.online if name == "online" else self.hard).loss(batch).total

    def step(self, name: str, batch: Any) -> None:
        self.loss(name, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, name: str, index: int) -> Usage:
        batch = self.prepare(name, self.batch(index))
        return measure_cpu(lambda: self.step(name, batch))

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Differences in nats between TRL's losses, means over the answer tokens, and the fused loss as such a mean.

        Raises:
            SettingsError: the model does not support the packed layout.
        """
        samples = self.batch(0)
        check_compatibility(self.student, samples, list(TASKS), True)
        self.student.model.eval()  # the adapter has dropout
        batch: Batch = self.online.encode(samples)
        hidden = self.student.hidden_states(batch.inputs).flatten(0, 1)[batch.positions]
        weights = torch.full_like(batch.loss_weights, 1 / len(batch.tokens))
        targets, differences = self.online.soft_targets(batch), {}  # type: ignore[misc]
        for name, weight in (("trl-sft", 0.0), ("trl-distillation", 1.0)):
            ours = answer_loss(
                hidden, self.student.head, batch.tokens, weights, targets, weight, 1.0, cap=self.student.cap
            ).total
            theirs = self.loss(name, self.prepare(name, samples))
            differences[name] = float((ours - theirs).abs())
        self.student.model.train()
        return differences


def summarize(runs: dict[str, list[Usage]], size: int) -> list[dict[str, Any]]:
    """Medians of each implementation; ratios are relative to ours, as in BASELINES."""
    medians = {name: Usage(*map(statistics.median, zip(*usages, strict=True))) for name, usages in runs.items()}
    return [
        {
            "implementation": name, **usage._asdict(), "rate": size / usage.seconds,
            "ours": BASELINES.get(name, name),
            **{f"{field}_ratio": getattr(usage, field) / getattr(medians[BASELINES.get(name, name)], field)
               for field in Usage._fields},
        }
        for name, usage in medians.items()
    ]  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    print("implementation     seconds  CPU seconds  samples/s  extra MB  compared with  time  CPU time  memory")
    for row in rows:
        ratios = "".join(f"{row[f'{field}_ratio']:>9.2f}" for field in Usage._fields)
        print(
            f"{row['implementation']:<17}{row['seconds']:>9.2f}{row['cpu_seconds']:>13.2f}{row['rate']:>11.3f}", end=""
        )
        print(f"{row['extra_bytes'] / 1e6:>10.0f}  {row['ours']:<10}{ratios}", flush=True)


def read_rows(options: argparse.Namespace) -> list[Sample]:
    """Posts of dev.jsonl without their pictures, shuffled."""
    samples = [replace(sample, images=()) for sample in workload.read_posts(options.data)]
    random.Random(0).shuffle(samples)
    return samples


def compare(options: argparse.Namespace, description: dict[str, Any]) -> int:
    """Check the losses, and measure all implementations at each precision. Returns the exit status."""
    torch.set_num_threads(options.threads)
    size = options.batch_size[0]
    samples = read_rows(options)
    trained = "LoRA adapters" if options.lora else "all weights"
    print(
        f"{options.model.name} and {options.teacher.name}, training {trained}; {len(samples)} rows, batch size {size}"
    )
    results = []
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options, dtype, samples, folder)
            differences = bench.check()
            print(f"\n{dtype}; padded to {bench.lengths}; load {os.getloadavg()[0]:.1f}")
            print(
                "check, differences in nats per token: " + ", ".join(f"{n} {v:.1e}" for n, v in differences.items()),
                flush=True,
            )
            if not all(value <= TOLERANCE[dtype] for value in differences.values()):
                sys.exit("check failed: the losses differ")
            runs: dict[str, list[Usage]] = {name: [] for name in options.implementations}
            for index in range(options.repeats + 1):
                for name in options.implementations:
                    usage = bench.run(name, index)
                    print(f"step {index}, {name}: {usage.seconds:.1f} s, {usage.cpu_seconds:.1f} CPU s", flush=True)
                    if index:  # the first step is a warm-up
                        runs[name].append(usage)
            rows = summarize(runs, size)
        show(rows)
        results.append({"dtype": dtype, "differences": differences, "rows": rows})
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    write_json(options.json, description | {"results": results})
    return 0
