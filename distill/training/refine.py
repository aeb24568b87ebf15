"""On-policy training of the student by trl: its own answers are graded by a larger model or by rewards.

Both methods generate answers to the *reason* prompts of the training posts with the present student. `distill`
minimises the divergence from the next-token distributions of the assistant or teacher on them (Agarwal et al., arXiv
2306.13649), `grpo` reinforces answers with more reward than others to the same prompt (Shao et al., arXiv
2402.03300). The cross-entropy of the labels and the stored rationales of the same posts is added to the loss, so that
the student keeps what it has learned (as in Ouyang et al., arXiv 2203.02155).
"""

import dataclasses
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PrinterCallback, TrainerCallback

from distill.errors import NonFiniteError, SettingsError, first_line
from distill.files import read_json, write_csv
from distill.models.backbone import Backbone, hide_progress_bars
from distill.models.memory import memory_errors
from distill.task.sample import Sample
from distill.training.on_policy import on_policy, selection
from distill.training.refine_settings import RefineSettings, trl_arguments, trl_classes
from distill.training.soft_targets import different_inputs
from distill.training.trl_datasets import escaping, prompt_dataset

log = logging.getLogger(__name__)

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
    accuracy of the student before, the student ends with that of the best rationales (`on_policy.selection`).

    Args:
        teacher: the model whose distributions are learned; None with rewards.
        samples: the training posts, each once.
        validation: labelled posts; without any, the last weights are kept.
        folder: of the stage.
        log_metrics: is called with the metrics of a step.
        progress: is called with the number of posts so far, and of all steps.

    Returns:
        Whether there is a checkpoint with at least the accuracy and the rationales of the student before; if not, its
        weights should be kept.

    Raises:
        SettingsError: there are fewer posts than a step takes, or trl would train on other prompts than the student
            was trained on.
        RunError: there is not enough memory, or the loss is not finite.
    """
    checkpoints, base, config = folder / "checkpoints", *trl_classes(settings)
    model: Any = student.model
    config_before = deepcopy(model.config)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    args = config(**trl_arguments(settings, checkpoints, seed=seed, device=device, checkpointing=checkpointing))
    needed = settings.batch_size * args.gradient_accumulation_steps
    if not 0 < needed <= len(samples):
        given = "refine.batch_size times arguments.gradient_accumulation_steps"
        raise SettingsError(f"{given} is {needed}; it takes 1 to {len(samples)}, the number of posts")
    args._n_gpu = min(args.n_gpu, 1)  # otherwise transformers would use all GPUs of the machine
    with_images = student.encoder.reads_images
    shown = samples if with_images else [dataclasses.replace(sample, images=()) for sample in samples]
    data = prompt_dataset(shown, student.labels, escaping(student.processor), student.settings.image_size)
    try:
        trainer = on_policy(base)(
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
    except SettingsError:
        raise
    except (ValueError, ImportError) as error:  # of an argument, or of a library that it needs
        raise SettingsError(f"refine.arguments: {first_line(error)}") from error
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
    model.config = config_before  # the Trainer switches the cache off, and the config is saved with the weights
    if "ref" in getattr(model, "peft_config", {}):  # trl's copy of the adapter before the training
        model.delete_adapter("ref")
    for name, weights in model.named_parameters():
        if weights.requires_grad and not weights.isfinite().all():
            raise NonFiniteError(f"after the last step, the weights {name} are")
    return bool(state["best_metric"] >= selection(trainer.before, trainer.before))


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
