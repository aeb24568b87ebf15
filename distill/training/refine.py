"""On-policy training of the student by trl: its own answers are graded by a larger model or by rewards.

Both methods generate answers to the *reason* prompts of the training posts with the present student. `distill`
minimises the divergence from the next-token distributions of the assistant or teacher on them (Agarwal et al., arXiv
2306.13649), `grpo` reinforces answers with more reward than others to the same prompt (Shao et al., arXiv
2402.03300). The cross-entropy of the *classify* task on the same posts is added to the loss, so that the student keeps
its labels.
"""

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback

from distill.errors import NonFiniteError, SettingsError
from distill.evaluation.evaluate import EvaluateSettings, evaluate_role
from distill.files import read_json, write_csv
from distill.models.backbone import Backbone, hide_progress_bars
from distill.models.local import Local
from distill.models.memory import memory_errors
from distill.task.sample import Sample
from distill.training.batches import encode
from distill.training.fused_loss import answer_loss
from distill.training.refine_settings import RefineSettings, trl_arguments, trl_classes
from distill.training.rewards import Answered, rewards
from distill.training.soft_targets import different_inputs
from distill.training.trl_datasets import escaping, prompt_dataset

log = logging.getLogger(__name__)

_WEIGHTS = "weights.safetensors"
"""File of a checkpoint."""

_VALIDATED = 256
"""Largest number of validation posts that are reasoned about at each checkpoint."""

_REMEDY = "reduce refine.batch_size and raise refine.arguments.gradient_accumulation_steps by the same factor"


def check_models(student: Backbone, teacher: Backbone | None, role: str) -> None:
    """Check that trl can train the student; no weights are read.

    Args:
        teacher: the model whose distributions are learned; None with rewards.
        role: its role, for messages.

    Raises:
        SettingsError: it cannot.
    """
    name = student.family.name
    if student.family.answer_type or (student.encoder.reads_images and not hasattr(_config(student), "image_token_id")):
        raise SettingsError(f"refine: trl does not support the answers of {name}; remove the section")
    if isinstance(student.model.get_output_embeddings(), BaseTunerLayer):  # type: ignore[operator]
        raise SettingsError("student.model.lora.targets: trl cannot train an adapter of the output head in refine")
    if teacher is None:
        return
    if (problem := different_inputs(teacher, student)) is not None:
        raise SettingsError(f"refine: student and {role} {problem}; set refine.method to grpo")
    if len(teacher.head) < len(student.head):
        raise SettingsError(f"refine: the vocabulary of the {role} is smaller than the student's; set method to grpo")


def refine(
    student: Backbone,
    teacher: Backbone | None,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    settings: RefineSettings,
    folder: Path,
    *,
    seed: int,
    device: str,
    log_metrics: Callable[[Mapping[str, float], int], None],
    progress: Callable[[int, int], None],
) -> bool:
    """Train the student in place; resumes from the last checkpoint. Writes `checkpoints/` and `metrics.csv`.

    At each checkpoint, validation posts are classified and reasoned about. Of the checkpoints that have at least the
    accuracy of the student before, the student ends with that of the highest consistency, the last of several.

    Args:
        teacher: the model whose distributions are learned; None with rewards.
        samples: the training posts, each once.
        validation: labelled posts; without any, the last weights are kept.
        folder: of the stage.
        log_metrics: is called with the metrics of a step.
        progress: is called with the number of posts so far, and of all steps.

    Returns:
        Whether there is a checkpoint with at least the accuracy and the consistency of the student before; if not, its
        weights should be kept.

    Raises:
        SettingsError: trl would train on other prompts than the student was trained on.
        RunError: there is not enough memory, or the loss is not finite.
    """
    checkpoints, base, config = folder / "checkpoints", *trl_classes(settings)
    model: Any = student.model
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    args = config(**trl_arguments(settings, checkpoints, seed=seed, device=device, checkpointing=checkpointing))
    args._n_gpu = min(args.n_gpu, 1)  # otherwise transformers would use all GPUs of the machine
    with_images = student.encoder.reads_images
    shown = samples if with_images else [dataclasses.replace(sample, images=()) for sample in samples]
    data = prompt_dataset(shown, student.labels, escaping(student.processor), student.settings.image_size)
    trainer = _on_policy(base)(
        student,
        samples,
        validation,
        settings,
        model=model,
        args=args,
        train_dataset=data if with_images else data.remove_columns("images"),
        processing_class=student.processor if with_images else student.processor.tokenizer,
        callbacks=[_Metrics(folder / "metrics.csv", log_metrics, progress)],
        **_teaching(student, teacher),
    )
    trainer.remove_callback(PrinterCallback)
    _check_prompts(trainer, student, samples)
    trainer.before, last = trainer.validate(), _last_checkpoint(checkpoints)
    with memory_errors(lambda: trainer.current_ids, _REMEDY), hide_progress_bars(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about what trl calls
        if last is None or _step(last) < settings.max_steps:  # otherwise it was killed after its last step
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        last = _last_checkpoint(checkpoints)
        assert last is not None  # is written after the last step
        state = read_json(last / "trainer_state.json")
        trainer._load_from_checkpoint(str(last.with_name(f"checkpoint-{state['best_global_step']}")))
    if "ref" in getattr(model, "peft_config", {}):  # trl's copy of the adapter before the training
        model.delete_adapter("ref")
    for name, weights in model.named_parameters():
        if weights.requires_grad and not weights.isfinite().all():
            raise NonFiniteError(f"after the last step, the weights {name} are")
    return bool(state["best_metric"] >= _selection(*trainer.before, trainer.before[0]))


def _config(student: Backbone) -> Any:
    return student.model.config


def _teaching(student: Backbone, teacher: Backbone | None) -> dict[str, Any]:
    """What the trainer of a method takes besides the student."""
    if teacher is None:
        return {}
    model: Any = teacher.model.requires_grad_(False).eval()
    if len(teacher.head) > len(student.head):  # padded to another size; the ids that no token has are cut
        (model.get_base_model() if hasattr(model, "peft_config") else model).resize_token_embeddings(len(student.head))
    return {"teacher_model": model}


def _on_policy(base: Any) -> Any:
    """trl's trainer with the *classify* task in its loss and, with GRPO, the rewards of this project."""

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
            self.before = (0.0, 0.0)  # the result of the validation before the training
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
            labelled = [post for post in posts if post.label is not None]
            if self.settings.classify_weight and labelled:
                own = self._classify_loss(labelled)
                self._metrics["train"]["classify_loss"].append(own.item())
                # the loss of trl is divided by the number of accumulated steps already
                loss = loss + self.settings.classify_weight * own / self.current_gradient_accumulation_steps
            if not loss.isfinite():
                remedy = "lower refine.learning_rate"
                raise NonFiniteError(f"step {self.state.global_step}: the loss is", [p.id for p in posts], remedy)
            return loss

        def _classify_loss(self, posts: Sequence[Sample]) -> torch.Tensor:
            student, device = self.student, self.accelerator.device
            batch = encode(posts, student, {"classify": 1.0}, packing=True)
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            positions, tokens, weights = (
                value.to(device) for value in (batch.positions, batch.tokens, batch.loss_weights)
            )
            hidden = student.hidden_states(inputs).flatten(0, 1)[positions]
            return answer_loss(hidden, student.head, tokens, weights, cap=student.cap, positions=positions).total

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

        def validate(self) -> tuple[float, float]:
            """On the validation posts, the accuracy of label scoring and the share of rationales that predict the
            classified label; 0 without posts."""
            student, posts = self.student, self.validation[:_VALIDATED]
            if not posts:
                return 0.0, 0.0
            training, limit = self.model.training, EvaluateSettings(max_new_tokens=self.settings.max_new_tokens)
            outputs = evaluate_role(Local(student, "the student", student.device), posts, student.labels, limit)
            self.model.train(training)
            labels = [outputs.label(index, student.labels) for index in range(len(posts))]
            accuracy = fmean(label == post.label for label, post in zip(labels, posts, strict=True))
            predicted = [found and found.prediction for found in outputs.rationales or ()]
            return accuracy, fmean(found == label for found, label in zip(predicted, labels, strict=True))

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            """Log the result of a checkpoint, and return the value by which the best one is kept (`_selection`)."""
            state, (accuracy, consistency) = self.state, self.validate()
            entry = {"val/accuracy": accuracy, "val/consistency": consistency}
            state.log_history.append({"epoch": state.epoch, "step": state.global_step} | entry)
            self.control: Any = self.callback_handler.on_evaluate(self.args, state, self.control, {})
            later = state.global_step / state.max_steps / (2 * _VALIDATED)
            return {"eval_selection": _selection(accuracy, consistency, self.before[0]) + later}

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


def _selection(accuracy: float, consistency: float, before: float) -> float:
    """The value of a checkpoint: its consistency if it has at least the accuracy of the student before.

    Checkpoints with less accuracy have lower values than all others.
    """
    return 1 + consistency if accuracy >= before else accuracy / 2


def _check_prompts(trainer: Any, student: Backbone, samples: Sequence[Sample]) -> None:
    """Raise SettingsError if trl's prompts of the longest post and of that with most images are not the student's."""
    from trl.data_utils import prepare_multimodal_messages

    rows = {max(range(len(samples)), key=lambda row: len(samples[row].text))}
    rows.add(max(range(len(samples)), key=lambda row: len(samples[row].images)))
    for row in rows:
        item = trainer.train_dataset[row]
        prompt = item["prompt"]
        if student.encoder.reads_images:
            prompt = prepare_multimodal_messages(prompt, images=item["images"])
        found = list(trainer._tokenize_prompts([prompt])[0][0])
        features = student.encode([samples[row]], "reason")
        if found != features["input_ids"][0][features["attention_mask"][0].bool()].tolist():
            raise SettingsError(
                f"refine: trl makes another prompt of post {samples[row].id} than the student was trained on; "
                f"it does not support {student.family.name}"
            )


def _last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; later ones, which a kill has cut, are deleted."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            read_json(path / "trainer_state.json")  # is written last
            return path
        except (OSError, SettingsError):
            shutil.rmtree(path)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Metrics(TrainerCallback):
    """Writes what the trainer logs to `metrics.csv`; a checkpoint holds the log so far, so that no step is lost."""

    def __init__(
        self, path: Path, log_metrics: Callable[[Mapping[str, float], int], None], progress: Callable[[int, int], None]
    ) -> None:
        self.path, self.log_metrics, self.progress, self.written = path, log_metrics, progress, 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        rows = [_row(entry) for entry in state.log_history if "loss" in entry or "val/accuracy" in entry]
        if len(rows) == self.written:
            return
        self.written = len(rows)
        names = dict.fromkeys(name for row in rows for name in row)
        write_csv(self.path, list(names), rows)
        self.log_metrics({name: value for name, value in rows[-1].items() if name != "step"}, state.global_step)

    on_evaluate = on_log

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = control.should_save
        self.progress(state.global_step, state.max_steps)


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in entry.items() if name not in ("step", "epoch") and value is not None}
    return {"epoch": entry.get("epoch"), "step": entry["step"]} | {
        name if "/" in name else f"train/{name}": value for name, value in values.items()
    }
