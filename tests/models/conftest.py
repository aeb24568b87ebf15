"""What the tests of models share: posts of every shape."""

from dataclasses import replace

import pytest

from distill.data.corpus import Corpus
from distill.task.sample import Sample


@pytest.fixture(scope="module")
def mixed(postcards: Corpus) -> list[Sample]:
    """One picture, none, two, and one under a long text with an aspect."""
    a, b, c, d = postcards.test[:4]
    long = replace(d, text=d.text * 5, aspect="the weather")
    return [a, replace(b, images=()), replace(c, images=c.images + a.images), long]
