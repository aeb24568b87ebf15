"""The wording of a task: where it is shown, and what it must contain."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.errors import SettingsError
from distill.task.labels import LabelSpace, Scale, TaskSettings
from distill.task.prompts import EarlierAnswers, Template, render
from distill.task.sample import Sample
from distill.task.wording import Wording
from tests import micro

EMOTIONS = TaskSettings(
    labels=["anger", "surprise", "joy"],
    question="Which emotion does {target} show: {labels}?",
    definitions={"anger": "the speaker is offended", "joy": "the speaker is glad"},
    language="Chinese",
).label_space
POST = Sample("s1", "What a day", label="joy", aspect="the {labels}")
TEMPLATES: tuple[Template, ...] = ("predict", "explain", "reason", "classify", "review")
EARLIER = EarlierAnswers("anger", 0.6, "joy", 0.5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_prompt_begins_with_the_question(template: Template) -> None:
    question, post, *_ = render(template, POST, EMOTIONS, EARLIER).splitlines()
    assert question == 'Which emotion does the post towards "the {labels}" show: anger, surprise or joy?'
    assert post == 'Post: "What a day"'
    assert "sentiment" not in render(template, POST, EMOTIONS, EARLIER)


def test_the_teacher_is_told_definitions_and_language() -> None:
    predict, explain = (render(template, POST, EMOTIONS) for template in TEMPLATES[:2])
    for text in (predict, explain):
        assert "\nanger: the speaker is offended.\njoy: the speaker is glad.\n" in text
        assert "Answer in Chinese with these five fields, one a line, and nothing else; keep the names" in text
    assert "The answer is joy. Explain it" in explain and "The answer" not in predict
    assert render("reason", POST, EMOTIONS).endswith("\nReason in five fields, in Chinese.")
    assert "Chinese" not in render("classify", POST, EMOTIONS)


def test_definitions_are_in_the_order_of_the_labels() -> None:
    """Also the default ones, whatever the order of the labels."""
    text = render("predict", POST, LabelSpace.from_names(["positive", "negative"]))
    assert text.index("positive: approval") < text.index("negative: disapproval")
    assert "neutral: " not in text


def test_a_scale_is_named_where_the_question_asks_for_it() -> None:
    settings = TaskSettings(scale=Scale(), question="How glad is {target}{scale}: {labels}?")
    assert " on a scale from -3 (negative) to 3 (positive): -3, -2" in render("classify", POST, settings.label_space)
    settings = replace(settings, question="How glad is {target}: {labels}?")
    assert "on a scale" not in render("classify", POST, settings.label_space)


def test_a_wording_survives_json() -> None:
    for wording in (Wording(), EMOTIONS.wording):
        assert Wording.from_json(json.loads(json.dumps(asdict(wording)))) == wording


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--task.question", "What is it: {labels}?"), r"task\.question does not contain \{target\}, which stands for"),
        (("--task.question", "Is {target} good?"), r"task\.question does not contain \{labels\}, which stands for the"),
        (("--task.question", ""), r"task\.question does not contain \{target\}"),
        (("--task.question", "{target}\n{labels}"), r"task\.question must be one line"),
        (("--task.language", "Chinese\nor not"), r"task\.language must be one line"),
        (("--task.definitions", '{"anger": "x"}'), r"task\.definitions has 'anger'; the labels are negative, neutral"),
        (("--task.definitions", '{"neutral": " "}'), r"task\.definitions\.neutral is empty"),
        (("--task.definitions", '{"neutral": "a\\nb"}'), r"task\.definitions\.neutral must be one line"),
    ],
)
def test_a_wording_that_cannot_be_used_is_refused(flags: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        micro.read(micro.write(tmp_path, micro.RECORDED), *flags)


def test_other_braces_are_text() -> None:
    wording = Wording("Rate {target} {0} {} {x!r}: {labels}", (("joy", "{labels}"),))
    labels = LabelSpace.from_names(["grief", "joy"])
    text = render("predict", replace(POST, text="{target}"), replace(labels, wording=wording))
    assert text.startswith('Rate the post towards "the {labels}" {0} {} {x!r}: grief or joy\nPost: "{target}"\n')
    assert "\njoy: {labels}.\n" in text
