"""Online soft targets: the assistant runs on the student's batches during training."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.sample import Sample
from distill.training.batches import Batch
from distill.training.fused_loss import HiddenTargets

logger = logging.getLogger(__name__)

_TOKENIZERS = "have different tokenizers"


class OnlineTargets:
    """A frozen assistant.

    It is not a torch module, so it is not trained, moved or saved with the student.

    Attributes:
        vocabulary: number of token ids that student and assistant share.
    """

    def __init__(self, assistant: Backbone, student: Backbone) -> None:
        self.assistant = assistant
        self.vocabulary = shared_vocabulary(assistant, student)
        student.packs = student.packs and assistant.packs  # the assistant reads the student's batches
        assistant.model.requires_grad_(False)
        assistant.model.eval()

    def read(self, samples: Sequence[Sample]) -> Features:
        """Return no stored soft targets; `__call__` computes them from the batch."""
        return {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenTargets:
        """Return the assistant's hidden states [N, D'] at the answer positions, its output head and cap."""
        self._move_to(batch.positions.device)
        hidden = self.assistant.hidden_states(batch.inputs).flatten(0, 1)[batch.positions]
        return HiddenTargets(hidden, self.assistant.head, self.assistant.cap)

    @torch.no_grad()
    def logits(self, features: Features) -> torch.Tensor:
        """Return the assistant's logits [B, T, V] at all positions, for the V shared ids."""
        self._move_to(features["input_ids"].device)
        return self.assistant.model(**features).logits[..., : self.vocabulary]

    def _move_to(self, device: torch.device) -> None:
        if self.assistant.device != device:
            self.assistant.model.to(device)


def shared_vocabulary(assistant: Backbone, student: Backbone) -> int:
    """Return the number of token ids that both models have. Raises SettingsError as `check_same_inputs` does."""
    check_same_inputs(assistant, student)
    sizes = [len(backbone.head) for backbone in (assistant, student)]
    if sizes[0] != sizes[1]:
        logger.info("vocabulary sizes differ: assistant %d, student %d; the %d shared ids are used", *sizes, min(sizes))
    return min(sizes)


def check_same_inputs(assistant: Backbone, student: Backbone) -> None:
    """Raise SettingsError if the models differ in tokenizer, image processor or in how they are given media.

    No weights are read.
    """
    problem = different_inputs(assistant, student)
    if problem == _TOKENIZERS:
        raise SettingsError(
            f"student.distillation: student and assistant {problem}; set its weight to 0, and its label_weight above 0 "
            "to learn from label distributions"
        )
    if problem is not None:
        raise SettingsError(f"student.distillation: student and assistant {problem}; set its weight to 0")


def different_inputs(one: Backbone, other: Backbone) -> str | None:
    """How two models differ in tokenizer, image processor or media, as the end of a sentence; None if they do not.

    No weights are read.
    """
    if one.processor.tokenizer.get_vocab() != other.processor.tokenizer.get_vocab():
        return _TOKENIZERS
    images = [model.processor.image_processor for model in (one, other)]
    if one.settings.images != other.settings.images or _settings(images[0]) != _settings(images[1]):
        return "process images differently"
    if one.encoder.media.ways != other.encoder.media.ways:
        return "are given videos and sounds differently (model.video, model.audio, model.frames)"
    if one.encoder.media.preprocessing() != other.encoder.media.preprocessing():
        return "process videos or sounds differently"
    return None


def _settings(image_processor: Any) -> dict[str, Any]:
    return {} if image_processor is None else image_processor.to_dict()
