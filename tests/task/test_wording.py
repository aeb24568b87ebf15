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
    fields = TaskSettings(fields=dict(FIELDS), templates={"classify": "{text}"}).label_space.wording
    for wording in (Wording(), EMOTIONS.wording, fields):
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


FIELDS = {"Cues": "words and tone", "Emotion": "of the speaker"}

TEMPLATE = "{text} {fields} {label}"


def flags_of(name: str, content: object) -> tuple[str, str]:
    return f"--task.{name}", json.dumps(content, ensure_ascii=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (flags_of("fields", {"Emotion": ""}), r"task\.fields takes at least two fields: one of reasoning, and the"),
        (flags_of("fields", {"Cues": "", "Emotion": ""}), r"task\.fields\.Cues is empty"),
        (flags_of("fields", {"Cues": "a\nb", "Emotion": ""}), r"task\.fields\.Cues must be one line"),
        (flags_of("fields", {"1": "a", "Emotion": ""}), r"task\.fields: '1' is no name of a field; it takes letters"),
        (flags_of("fields", {'Cu"es': "a", "Emotion": ""}), r"task\.fields: 'Cu\"es' is no name of a field"),
        (
            flags_of("fields", {"The_cues": "a", "the cues": ""}),
            r"task\.fields: 'The_cues' and 'the cues' have the same",
        ),
        (
            flags_of("templates", {"judge": "{text}"}),
            r"task\.templates has 'judge'; the templates are predict, explain",
        ),
        (flags_of("templates", {"classify": "Judge."}), r"task\.templates\.classify does not contain \{text\}$"),
        (
            flags_of("templates", {"classify": TEMPLATE}),
            r"task\.templates\.classify contains \{fields\}; it takes",
        ),
        (flags_of("templates", {"predict": TEMPLATE}), r"task\.templates\.predict contains \{label\}; it takes"),
        (flags_of("templates", {"predict": "{text}"}), r"task\.templates\.predict does not contain \{fields\} or the"),
        (flags_of("templates", {"explain": "{text} {fields}"}), r"task\.templates\.explain does not contain \{label\}"),
        (
            flags_of("templates", {"review": "{text} {student}"}),
            r"task\.templates\.review does not contain",
        ),
        (("--task.templates", "no/such.yaml"), r"task\.templates: cannot read no/such\.yaml: No such file"),
        (("--task.examples", "-1"), r"task\.examples is -1; it takes 0 or more"),
        (("--task.examples", "2"), r"task\.examples needs annotate\.endpoint or annotate\.model"),
    ],
)
def test_fields_and_templates_that_cannot_be_used_are_refused(
    flags: tuple[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        micro.read(micro.write(tmp_path, micro.RECORDED), *flags)


@pytest.mark.parametrize("content", ["- a", "classify: [1]", "{", "1"])
def test_a_file_of_templates_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (file := tmp_path / "templates.yaml").write_text(content)
    with pytest.raises(SettingsError, match=r"^task\.templates: .*templates\.yaml (is not valid|takes a text)"):
        micro.read(micro.write(tmp_path, micro.RECORDED), "--task.templates", str(file))


def test_fields_are_asked_for_in_their_order_and_the_last_is_the_prediction() -> None:
    labels = TaskSettings(labels=["anger", "joy"], fields=dict(FIELDS)).label_space
    text = render("predict", POST, labels)
    assert "Answer with these two fields, one a line" in text
    assert text.endswith('"Cues": "<words and tone>"\n"Emotion": <of the speaker: anger or joy>')
    assert render("classify", POST, labels).endswith('Answer: "Emotion": <label>')
    assert render("reason", POST, labels).endswith("Reason in two fields.")
    many = {f"Field {letter}": "x" for letter in "abcdefghijkl"} | {"Label": None}
    assert render("predict", POST, TaskSettings(fields=many).label_space).endswith(
        '"Label": <negative, neutral or positive>'
    )


def test_a_template_replaces_the_whole_prompt() -> None:
    templates: dict[str, str] = {
        "explain": "{text}|{aspect}|{label}|{labels}|{definitions}|{fields}|{examples}",
        "review": "{text}{student}{student_confidence}{teacher}{teacher_confidence}{}{0}\n",
    }
    space = TaskSettings(labels=["anger", "joy"], definitions={"joy": "glad"}, templates=templates).label_space
    post = replace(POST, text="What {label}\na day")
    text, _, fields = render("explain", post, space).partition('"Text_analysis"')
    assert text == "What {label} a day|the {labels}|joy|anger or joy|joy: glad.\n|"
    assert fields.endswith('"Prediction": <anger or joy>|')
    assert render("review", post, space, EARLIER) == "What {label} a dayanger60%joy50%{}{0}"
    assert render("classify", POST, space) == render("classify", POST, replace(space, wording=Wording()))


def test_other_braces_are_text() -> None:
    wording = Wording("Rate {target} {0} {} {x!r}: {labels}", (("joy", "{labels}"),))
    labels = LabelSpace.from_names(["grief", "joy"])
    text = render("predict", replace(POST, text="{target}"), replace(labels, wording=wording))
    assert text.startswith('Rate the post towards "the {labels}" {0} {} {x!r}: grief or joy\nPost: "{target}"\n')
    assert "\njoy: {labels}.\n" in text
