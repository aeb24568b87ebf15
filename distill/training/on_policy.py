"""trl's trainers with the supervised tasks, the rewards and the validation of this project (`refine`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distill.errors import NonFiniteError
from distill.evaluation.evaluate import EvaluateSettings, evaluate_role
from distill.evaluation.reasoning import grounding
from distill.models.backbone import Backbone
from distill.models.local import Local
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import encode, target_answer
from distill.training.fused_loss import answer_loss
from distill.training.refine_settings import RefineSettings
from distill.training.rewards import Answered, rewards

_WEIGHTS = "weights.safetensors"
"""File of a checkpoint."""

_VALIDATED = 256
"""Largest number of validation posts that are reasoned about at each checkpoint."""


def on_policy(base: Any) -> Any:
    """trl's trainer with the supervised tasks in its loss and, with GRPO, the rewards of this project."""

    class OnPolicyTrainer(base):
        def __init__(
            self,
            student: Backbone,
            samples: Sequence[Sample],
            validation: Sequence[Sample],
            settings: RefineSettings,
            **options: Any,
        ) -> None:
            self.student, self.samples, self.validation, self.settings = student, samples, validation, settings
            self.current_ids: list[str] = []
            self.before: dict[str, float] = {}  # the result of the validation before the training
            self._rows = {sample.id: row for row, sample in enumerate(samples)}
            self._rewarded: tuple[Any, dict[str, list[float | None]]] = (None, {})
            if settings.method == "grpo":
                names = [name for name, weight in settings.rewards.weights.items() if weight]
                options["reward_funcs"] = [self._reward_function(name) for name in names]
            super().__init__(**options)

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, Any, Any]:
            ids, images, fields = super()._tokenize_prompts(prompts)
            # processors take an empty list, not None, for a post without images
            return ids, images and [each or [] for each in images], fields

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            self.current_ids = list(dict.fromkeys(post["id"] for post in inputs))
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return output | {"posts": torch.tensor([self._rows[post["id"]] for post in inputs])}

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            posts = [self.samples[row] for row in dict.fromkeys(inputs.pop("posts").tolist())]
            loss = super().compute_loss(model, inputs, *args, **options)
            # the loss of trl is divided by the number of accumulated steps already
            loss = loss + self._supervised_loss(posts) / self.current_gradient_accumulation_steps
            if not loss.isfinite():
                remedy = "lower refine.learning_rate"
                raise NonFiniteError(f"step {self.state.global_step}: the loss is", [p.id for p in posts], remedy)
            return loss

        def _supervised_loss(self, posts: Sequence[Sample]) -> torch.Tensor | float:
            """The weighted cross-entropy of the labels and of the stored rationales of posts that have them."""
            student, device = self.student, self.accelerator.device
            weights: dict[Template, float] = {
                "classify": self.settings.classify_weight,
                "reason": self.settings.reason_weight,
            }
            tasks = {task: weight for task, weight in weights.items() if weight}
            posts = [p for p in posts if any(target_answer(task, p, student.labels) is not None for task in tasks)]
            if not posts:
                return 0.0
            batch = encode(posts, student, tasks, packing=True)
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            positions, tokens, shares = (
                value.to(device) for value in (batch.positions, batch.tokens, batch.loss_weights)
            )
            hidden = student.hidden_states(inputs).flatten(0, 1)[positions]
            loss = answer_loss(hidden, student.head, tokens, shares, cap=student.cap, positions=positions)
            for index, (task, weight) in enumerate(tasks.items()):
                own = (shares * loss.hard)[(batch.tasks == index).to(device)].sum().item() / weight
                self._metrics["train"][f"{task}_loss"].append(own)
            return loss.total

        def _reward_function(self, name: str) -> Callable[..., list[float | None]]:
            def reward(completions: Any, completion_ids: Any, id: list[str], **_: Any) -> list[float | None]:
                if self._rewarded[0] is not completions:  # the first reward of a batch computes all
                    self._rewarded = completions, self._rewards(completions, completion_ids, id)
                return self._rewarded[1][name]

            reward.__name__ = name
            return reward

        def _rewards(self, completions: Any, completion_ids: Any, ids: list[str]) -> dict[str, list[float | None]]:
            posts = {id: self.samples[self._rows[id]] for id in ids}
            classified = dict(zip(posts, self._classified(list(posts.values())), strict=True))
            answered = {
                id: Answered(post.text, post.label, classified[id], post.attributes)  # type: ignore[arg-type]
                for id, post in posts.items()
            }
            return rewards(
                [message[-1]["content"] for message in completions],
                [tokens[-1] in self.eos_token_ids for tokens in completion_ids],
                [answered[id] for id in ids],
                self.student.labels,
            )

        def _classified(self, posts: Sequence[Sample]) -> list[str]:
            """The labels that label scoring by the present student gives to posts."""
            student, training = self.student, self.model.training
            scores = Local(student, "the student", student.device).classify(posts)
            self.model.train(training)
            return [student.labels.names[index] for index in scores.probabilities.argmax(-1).tolist()]

        def validate(self) -> dict[str, float]:
            """On the validation posts, the accuracy of label scoring and the measures of the rationales (`selection`),
            where an answer that does not parse counts 0; zeros without posts."""
            student, posts = self.student, self.validation[:_VALIDATED]
            if not posts:
                return dict.fromkeys(("accuracy", "reasoned_accuracy", "consistency"), 0.0)
            training, limit = self.model.training, EvaluateSettings(max_new_tokens=self.settings.max_new_tokens)
            outputs = evaluate_role(Local(student, "the student", student.device), posts, student.labels, limit)
            self.model.train(training)
            gold = [student.labels.name(post.label) for post in posts]
            labels = [outputs.label(index, student.labels) for index in range(len(posts))]
            rationales = outputs.rationales or [None] * len(posts)
            predicted = [found.prediction if found else None for found in rationales]
            pairs = zip(rationales, posts, strict=True)
            named = [value for found, post in pairs for value in grounding(found, post.attributes)]
            return {
                "accuracy": _agreement(labels, gold),
                "reasoned_accuracy": _agreement(predicted, gold),
                "consistency": _agreement(predicted, labels),
            } | ({"grounded": fmean(named)} if named else {})

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Log the result of a checkpoint, and return the value by which the best one is kept (`selection`)."""
            state, found = self.state, self.validate()
            entry = {f"val/{name}": value for name, value in found.items()}
            state.log_history.append({"epoch": state.epoch, "step": state.global_step} | entry)
            self.control: Any = self.callback_handler.on_evaluate(self.args, state, self.control, {})
            later = 1e-6 * state.global_step / state.max_steps  # decides between equal ones
            return {"eval_selection": selection(found, self.before) + later}

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            """Write the trained weights under the names that they have in memory: those of transformers' own files are
            others, and its Trainer would not find all of them when it resumes."""
            weights = {name: w.detach().cpu().contiguous() for name, w in self._trained()}
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
            save_file(weights, Path(str(output_dir)) / _WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
            with torch.no_grad():
                for name, weights in self._trained():
                    weights.copy_(saved[name])

        def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
            return [(name, weights) for name, weights in self.student.model.named_parameters() if weights.requires_grad]

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """trl writes a README.md into each checkpoint; the exported student has its own."""

        def _send_telemetry(self) -> None:
            """trl reports each training to its hub; a run reports nothing."""

    return OnPolicyTrainer


def selection(found: Mapping[str, float], before: Mapping[str, float]) -> float:
    """The value of a checkpoint: if it has at least the accuracy of the student before, the mean of its other measures.

    They are the reasoned accuracy, the consistency and, if posts have attributes, the groundedness of the rationales.
    Checkpoints with less accuracy have lower values than all others.

    Args:
        found: the measures of the checkpoint by name (`validate`).
        before: those of the student before.
    """
    if found["accuracy"] < before["accuracy"]:
        return found["accuracy"] / 2
    return 1 + fmean(value for name, value in found.items() if name != "accuracy")


def _agreement(one: Sequence[str | None], other: Sequence[str | None]) -> float:
    return fmean(a == b for a, b in zip(one, other, strict=True))
