"""Settings of `refine`, what they need of a recipe, and the trainer and arguments of trl that follow from them.

trl is an extra (`pip install 'distill[trl]'`); it is imported when the stage is checked or begins.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from distill.errors import SettingsError, first_line
from distill.models.backbone import ModelSettings
from distill.settings import Count, NonNegative, Positive, Range, Settings
from distill.training.assistant import TrainSettings
from distill.training.rewards import RewardSettings

_RESERVED = frozenset({
    "beta", "chat_template_kwargs", "data_seed", "disable_tqdm", "eval_strategy", "generation_batch_size",
    "gradient_checkpointing", "greater_is_better", "ignore_data_skip", "learning_rate",
    "load_best_model_at_end", "logging_strategy", "max_completion_length", "max_steps", "metric_for_best_model",
    "model_init_kwargs", "num_generations", "num_iterations", "num_train_epochs", "output_dir",
    "per_device_train_batch_size", "push_to_hub", "remove_unused_columns", "report_to", "reward_weights",
    "save_only_model", "save_strategy", "save_total_limit", "seed", "steps_per_generation",
    "teacher_model_init_kwargs", "temperature", "use_cpu",
})  # fmt: skip
"""Arguments of trl that the stage sets itself, or that its checkpoints do not support."""

_CHECKPOINTS = 10
"""Checkpoints of a training."""


@dataclass
class RefineSettings(Settings):
    """On-policy training of the student by trl, after its training on stored rationales."""

    method: Literal["distill", "grpo"] = "distill"
    """distill: trl's DistillationTrainer, which learns the distributions of `teacher`; grpo: trl's GRPOTrainer, which
    learns from `rewards`."""
    teacher: Literal["assistant", "teacher"] = "assistant"
    """Whose distributions distill learns: the assistant's, or those of the teacher on this machine. It must share the
    tokenizer and the image processor of the student."""
    learning_rate: Positive = 1e-5
    """Learning rate of AdamW at the first step; it falls linearly to 0."""
    batch_size: Count = 8
    """Posts per step; a step takes `batch_size` times `arguments.gradient_accumulation_steps` posts."""
    max_steps: Count = 100
    """Steps of the optimizer."""
    max_new_tokens: Count = 512
    """Maximum number of tokens of a generated rationale."""
    temperature: Annotated[float, Range(0.01)] = 1.0
    """Sampling temperature of the generated rationales; in distill also that of both distributions."""
    generations: Annotated[int, Range(2)] = 8
    """Rationales per post and step (grpo); they are compared with each other."""
    rewards: RewardSettings = field(default_factory=RewardSettings)
    """Weights of the rewards (grpo)."""
    beta: NonNegative | None = None
    """trl's beta; null: trl's default. distill: 0 is the forward KL, 1 the reverse KL (default), between them the
    generalized Jensen-Shannon divergence; grpo: weight of the KL divergence from the student before the stage (0)."""
    classify_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the classify task on the posts of a step; 0: none."""
    reason_weight: NonNegative = 1.0
    """Weight of the cross-entropy of the stored rationales of the posts of a step; 0: none."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of trl's DistillationConfig or GRPOConfig, such as bf16, warmup_steps or loss_type."""

    @property
    def learns_from(self) -> Literal["assistant", "teacher"] | None:
        """Whose distributions the student learns; None with rewards."""
        return self.teacher if self.method == "distill" else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "distill" and self.beta is not None and self.beta > 1:
            raise SettingsError(f"beta is {self.beta:g}; with method distill it takes 0 to 1")


def check_refine(
    settings: RefineSettings,
    student: TrainSettings | None,
    assistant: TrainSettings | None,
    teacher: Any,
    *,
    annotated: bool,
) -> None:
    """Check that the recipe has what the stage needs.

    Args:
        student: the settings of its training; None: it is not trained.
        assistant: likewise.
        teacher: the settings of the teacher that is trained or annotates; None without one.
        annotated: whether the recipe has an annotate section.

    Raises:
        SettingsError: it has not.
    """
    if student is None:
        raise SettingsError("refine needs a student section")
    if not annotated:
        raise SettingsError("refine needs an annotate section: without one the student does not learn to reason")
    if "reason" not in student.tasks:
        raise SettingsError("refine needs reason in student.tasks: it trains the student on its own rationales")
    if settings.classify_weight and "classify" not in student.tasks:
        raise SettingsError("refine.classify_weight must be 0 if student.tasks has no classify")
    if settings.method == "grpo":
        if settings.rewards.consistency and "classify" not in student.tasks:
            raise SettingsError("refine.rewards.consistency must be 0 if student.tasks has no classify")
        return
    if settings.teacher == "assistant" and assistant is None:
        raise SettingsError("refine.teacher: assistant needs an assistant section; or set refine.method to grpo")
    if settings.teacher == "teacher" and not isinstance(teacher, TrainSettings | ModelSettings):
        raise SettingsError(
            "refine.teacher: teacher needs a teacher on this machine: a teacher section, or annotate.model; a server "
            "gives no distributions over all tokens"
        )
    learner = assistant if settings.teacher == "assistant" else teacher
    if isinstance(learner, TrainSettings) and "reason" not in learner.tasks:
        raise SettingsError(f"refine needs reason in {settings.teacher}.tasks: it grades the student's rationales")


def check_arguments(settings: RefineSettings) -> None:
    """Raise SettingsError if trl is not installed, or refuses an argument."""
    config = trl_classes(settings)[1]
    known = {item.name for item in dataclasses.fields(config) if item.init}
    for name in settings.arguments:
        if name in _RESERVED:
            raise SettingsError(f"refine.arguments.{name} is set by the stage; remove it")
        if name not in known:
            raise SettingsError(f"refine.arguments.{name} is not an argument of trl's {config.__name__}")
    try:
        config(**trl_arguments(settings, Path("unused"), seed=0, device="cpu", checkpointing=False))
    except Exception as error:  # noqa: BLE001 (of many types; each is the answer to an argument)
        raise SettingsError(f"refine.arguments: {first_line(error)}") from None


def trl_classes(settings: RefineSettings) -> tuple[Any, Any]:
    """The trainer of the method and the class of its arguments. Raises SettingsError if trl is not installed."""
    try:
        import trl

        name = {"distill": "Distillation", "grpo": "GRPO"}[settings.method]
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"refine needs trl 1.10 or later: pip install 'distill[trl]' ({first_line(error)})"
        ) from None


def trl_arguments(
    settings: RefineSettings, folder: Path, *, seed: int, device: str, checkpointing: bool
) -> dict[str, Any]:
    """The arguments of trl's config; those of the recipe come last."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "gradient_checkpointing": checkpointing,
        "bf16": False,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": max(1, settings.max_steps // 50),
        "save_steps": max(1, settings.max_steps // _CHECKPOINTS),
        "save_total_limit": 1,
        "metric_for_best_model": "selection",
        "greater_is_better": True,
    }
    if settings.beta is not None:
        given["beta"] = settings.beta
    if settings.method == "grpo":
        weights = [weight for weight in settings.rewards.weights.values() if weight]
        given["per_device_train_batch_size"] *= settings.generations
        given |= {"num_generations": settings.generations, "reward_weights": weights}
    return given | settings.arguments
