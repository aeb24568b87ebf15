"""Which posts are the examples of the teacher's prompts, and with which answers."""

import pytest

from distill.annotation.examples import with_examples
from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.prompts import render
from distill.task.rationale import Rationale
from distill.task.rationale import render as render_rationale
from distill.task.sample import Sample

LABELS = LabelSpace()
TEXTS = ("It praises.", "A smile.", "They agree.", "Glad.")
VALID = render_rationale(Rationale(TEXTS, "positive"))
AS_MARKDOWN = "\n".join(f"**{name}:** {text}" for name, text in Rationale(TEXTS, "positive").as_dict().items())


def posts(*labels: str | None) -> list[Sample]:
    return [Sample(str(number), f"text {number}", label=label) for number, label in enumerate(labels)]


def test_the_labels_take_turns_in_the_order_of_the_data() -> None:
    rows = posts("positive", "positive", None, "negative", "positive", "negative", "neutral")
    for count, ids in ((1, "3"), (3, "360"), (5, "36051")):
        assert "".join(example.id for example in with_examples(LABELS, rows, count).examples) == ids
    assert with_examples(LABELS, rows, 0) == LABELS


def test_posts_with_a_valid_rationale_come_first_and_show_it_in_the_canonical_format() -> None:
    rows = posts("positive", "positive", "positive")
    rows[0] = Sample("0", "text 0", label="positive", rationale="not a rationale")
    rows[1] = Sample("1", "text 1", label="positive", rationale=VALID.replace(": positive", ": negative"))
    rows[2] = Sample("2", "two\nlines", label="positive", aspect="the mayor", rationale=AS_MARKDOWN)
    labels = with_examples(LABELS, rows, 2)
    assert [example.id for example in labels.examples] == ["2", "0"]
    text = render("predict", Sample("new", "the post"), labels)
    question, rest = text.split("\n", 1)
    assert question == "Judge the sentiment of the post: negative, neutral or positive."
    assert rest.startswith(
        "Examples of other posts and their answers:\n\n"
        f'Post towards "the mayor": "two lines"\n{VALID}\n\nPost: "text 0"\n"Prediction": positive\n\n'
        'The post to answer:\nPost: "the post"\n'
    )


def test_a_post_is_no_example_of_itself_and_only_the_teachers_prompts_show_any() -> None:
    labels = with_examples(LABELS, rows := posts("positive", "negative"), 2)
    assert "text 0" in render("explain", rows[1], labels) and "text 1" not in render("classify", rows[0], labels)
    for template in ("reason", "classify"):
        assert render(template, rows[0], labels) == render(template, rows[0], LABELS)  # type: ignore[arg-type]
    alone = with_examples(LABELS, rows[:1], 1)
    assert render("predict", rows[0], alone) == render("predict", rows[0], LABELS)


def test_too_few_labelled_posts_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"^task\.examples is 3; 2 posts of the training split have a label$"):
        with_examples(LABELS, posts("positive", None, "negative"), 3)
