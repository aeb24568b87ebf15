"""Fixtures shared by the tests of models."""

from dataclasses import replace

import pytest

from distill.data.corpus import Corpus
from distill.task.sample import Sample


@pytest.fixture(scope="module")
def posts(postcards: Corpus) -> list[Sample]:
    """Seven posts with texts of different lengths, one without images and one with two."""
    posts = [replace(sample, text=sample.text * (1 + i % 3)) for i, sample in enumerate(postcards.test[:7])]
    posts[2] = replace(posts[2], images=())
    posts[4] = replace(posts[4], images=posts[4].images * 2)
    return posts


@pytest.fixture(scope="module")
def mixed(postcards: Corpus) -> list[Sample]:
    """Posts with one image, no image, two images, and one image with a long text and an aspect."""
    a, b, c, d = postcards.test[:4]
    long = replace(d, text=d.text * 5, aspect="the weather")
    return [a, replace(b, images=()), replace(c, images=c.images + a.images), long]
