"""A student gives the same label probabilities in this process and through a gateway."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from distill.data.corpus import Corpus
from distill.data.images import decode
from distill.models.backbone import Backbone, load
from distill.models.endpoint import Endpoint, EndpointSettings
from distill.models.local import Local
from distill.task.labels import LabelSpace
from distill.task.sample import Sample
from tests.serving.conftest import running


def reencoded(sample: Sample, folder: Path) -> Sample:
    """The sample with its images as the JPEG files that an endpoint sends, because JPEG is lossy."""
    paths = tuple(folder / f"{sample.id}.jpg" for _ in sample.images)
    for path, image in zip(paths, sample.images, strict=True):
        decode(image).save(path, "JPEG", quality=95)
    return replace(sample, images=paths)


def test_local_and_remote_label_probabilities_are_equal(fluent: Backbone, postcards: Corpus, tmp_path: Path) -> None:
    fluent.save(tmp_path / "student")
    student = Local(load(fluent.settings, LabelSpace(), tmp_path / "student"), "saved")
    cards = [*postcards.test, *postcards.validation, *postcards.train]
    samples = [reencoded(sample, tmp_path) for sample in cards[:150]]
    unusual = ('It says "Prediction": negative.', "braces {} and <|im_end|> too", "naïve 🙂 words")
    samples += [replace(sample, id=f"bare-{n}", images=()) for n, sample in enumerate(cards[:44])]
    samples += [Sample(f"odd-{n}", text, aspect=aspect) for n, text in enumerate(unusual) for aspect in ("a", None)]
    assert len(samples) == 200
    originals = {sample.id: sample for sample in cards}

    with running(student, rationale=False, queue=200) as client:
        settings = EndpointSettings(f"{client.base_url}/v1", "cascade-student", concurrency=16, max_attempts=1)
        endpoint = Endpoint(settings, LabelSpace())
        remote = endpoint.classify([originals.get(sample.id, sample) for sample in samples])
        endpoint.close()
        forced = Endpoint(settings, LabelSpace(), forced_prefix=True)
        continued = forced.classify([originals.get(sample.id, sample) for sample in samples])
        assert not forced.given_up
        forced.close()
    local = student.classify(samples)
    for scores in (remote, continued):
        assert scores.answered.all()
        np.testing.assert_allclose(scores.probabilities, local.probabilities, atol=1e-4, rtol=0)
        assert (scores.probabilities.argmax(1) == local.probabilities.argmax(1)).all()


def test_the_forced_prefix_scores_a_student_that_does_not_write_it(backbone: Backbone) -> None:
    student = Local(backbone, "untrained")
    samples = [Sample(f"s{n}", f"post number {n}") for n in range(12)]
    with running(student, rationale=False) as client:
        settings = EndpointSettings(f"{client.base_url}/v1", "cascade-student", max_attempts=1)
        whole, forced = Endpoint(settings, LabelSpace()), Endpoint(settings, LabelSpace(), forced_prefix=True)
        read, continued = whole.classify(samples), forced.classify(samples)
        whole.close(), forced.close()
    local = student.classify(samples)
    np.testing.assert_allclose(continued.probabilities, local.probabilities, atol=1e-4, rtol=0)
    np.testing.assert_allclose(continued.label_mass, local.label_mass, atol=1e-4, rtol=0)
    assert not np.allclose(read.probabilities, local.probabilities, atol=1e-2)
