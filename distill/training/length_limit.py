"""Training posts whose sequence is longer than `max_length`."""

import logging
from collections.abc import Mapping, Sequence

from distill.data.stored import selected
from distill.errors import SettingsError
from distill.models.backbone import Backbone
from distill.task.prompts import Template
from distill.task.sample import Sample
from distill.training.batches import encode, row_lengths, target_answer

log = logging.getLogger(__name__)

_SHOWN = 10  # ids in the warning


def limit_length(
    samples: Sequence[Sample], backbone: Backbone, tasks: Mapping[Template, float], *, packing: bool, max_length: int
) -> Sequence[Sample]:
    """Return the samples whose longest training sequence has at most `max_length` tokens; all of them if it is 0.

    The length is that of the encoded sample, with the tokens of its images. Logs the ids of those that are left out.

    Raises:
        ImageError: an image cannot be read.
        SettingsError: no sample is left.
    """
    if not max_length:
        return samples
    long: list[str] = []

    def fits(sample: Sample) -> bool:
        answered = any(target_answer(task, sample, backbone.labels) is not None for task in tasks)
        is_short = not answered or int(row_lengths(encode([sample], backbone, tasks, packing)).max()) <= max_length
        if not is_short:
            long.append(sample.id)
        return is_short

    kept = selected(samples, fits)
    if not kept:
        raise SettingsError(
            f"max_length: the sequences of all {len(long)} training posts have more than {max_length} tokens"
        )
    if long:
        ids = ", ".join(long[:_SHOWN]) + (", ..." if len(long) > _SHOWN else "")
        message = (
            "%d of %d posts are left out of the training: their sequences have more than %d tokens (max_length): %s"
        )
        log.warning(message, len(long), len(samples), max_length, ids)
    return kept
