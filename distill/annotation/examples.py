"""The examples in the prompts of the annotating teacher: training posts with their answers."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest

from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, check, render
from distill.task.sample import Sample


def with_examples(labels: LabelSpace, posts: Iterable[Sample], count: int) -> LabelSpace:
    """The label space with `count` of the labelled posts as examples.

    The labels take turns. Of each label, posts with a valid rationale come first, otherwise in the order of the data.

    Raises:
        SettingsError: fewer posts have a label.
    """
    if count == 0:
        return labels
    found = sorted((_example(post, labels) for post in posts if post.label is not None), key=lambda e: not e.rationale)
    if len(found) < count:
        raise SettingsError(f"task.examples is {count}; {len(found)} posts of the training split have a label")
    by_label = [[example for example in found if labels.name(example.label) == name] for name in labels.names]
    in_turn = [example for turn in zip_longest(*by_label) for example in turn if example is not None]
    return replace(labels, examples=tuple(in_turn[:count]))


def _example(post: Sample, labels: LabelSpace) -> Sample:
    """The post with its rationale in the canonical format; without one that is not valid."""
    try:
        rationale = post.rationale and render(check(post.rationale, labels, post.label, post=post.text))
    except InvalidRationale:
        rationale = None
    return replace(post, rationale=rationale)
