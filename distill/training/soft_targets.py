"""The assistant's distribution over the student's batch, cut to the vocabulary that both share."""

import logging

import torch

from distill.errors import SettingsError
from distill.models.backbone import Backbone, Features

logger = logging.getLogger(__name__)


class SoftTargets:
    """A frozen assistant. It is no torch module, so it is neither trained, nor moved, nor saved with the student."""

    def __init__(self, assistant: Backbone, student: Backbone) -> None:
        self.assistant = assistant
        self.vocabulary = shared_vocabulary(assistant, student)
        assistant.model.requires_grad_(False)
        assistant.model.eval()

    @torch.no_grad()
    def __call__(self, features: Features, positions: int) -> torch.Tensor:
        """Logits [B, T, V] of the assistant at the last T = `positions` positions, V the shared ids."""
        device = features["input_ids"].device
        if self.assistant.device != device:
            self.assistant.model.to(device)
        return self.assistant.model(**features, logits_to_keep=positions).logits[..., : self.vocabulary]


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
    sizes = [backbone.model.get_output_embeddings().weight.shape[0] for backbone in (assistant, student)]  # type: ignore[operator]
    if sizes[0] != sizes[1]:
        logger.info("vocabularies of %d (assistant) and %d (student) ids, cut to the shared %d", *sizes, min(sizes))
    return min(sizes)
