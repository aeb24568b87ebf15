"""The assistant's soft targets at the answer positions of the student's batch, asked for while training."""

import logging
from collections.abc import Sequence

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features
from distill.task.sample import Sample
from distill.training.batches import Batch
from distill.training.fused_loss import HiddenTargets

logger = logging.getLogger(__name__)


class SoftTargets:
    """A frozen assistant. It is no torch module, so it is neither trained, nor moved, nor saved with the student."""

    def __init__(self, assistant: Backbone, student: Backbone) -> None:
        self.assistant = assistant
        self.vocabulary = shared_vocabulary(assistant, student)
        assistant.model.requires_grad_(False)
        assistant.model.eval()

    def read(self, samples: Sequence[Sample]) -> Features:
        """What a batch carries of them: nothing."""
        return {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> HiddenTargets:
        """What the assistant says at the N positions that predict an answer token."""
        self._follow(batch.columns.device)
        hidden = self.assistant.hidden_states(batch.inputs).flatten(0, 1)[batch.columns]
        return HiddenTargets(hidden, self.assistant.head)

    @torch.no_grad()
    def logits(self, features: Features) -> torch.Tensor:
        """Logits [B, T, V] of the assistant at every position, V the shared ids."""
        self._follow(features["input_ids"].device)
        return self.assistant.model(**features).logits[..., : self.vocabulary]

    def _follow(self, device: torch.device) -> None:
        if self.assistant.device != device:
            self.assistant.model.to(device)


def shared_vocabulary(assistant: Backbone, student: Backbone) -> int:
    """How many ids both models have, after checking that an id means the same to both.

    Raises:
        SettingsError: the tokenizers differ, or the two see pictures differently: one cannot read the other's batch.
    """
    if assistant.processor.tokenizer.get_vocab() != student.processor.tokenizer.get_vocab():
        raise SettingsError(
            "student.distillation: student and assistant have different tokenizers; set its weight to 0"
        )
    if assistant.processor.image_processor.to_dict() != student.processor.image_processor.to_dict():
        raise SettingsError(
            "student.distillation: student and assistant process images differently; set its weight to 0"
        )
    sizes = [len(backbone.head) for backbone in (assistant, student)]
    if sizes[0] != sizes[1]:
        logger.info("vocabularies of %d (assistant) and %d (student) ids, cut to the shared %d", *sizes, min(sizes))
    return min(sizes)
