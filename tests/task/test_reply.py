"""Answers as teachers write them: thoughts, tags, fences, numbers, brackets and marks of other scripts."""

import pytest

from distill.task.labels import LabelSpace
from distill.task.rationale import InvalidRationale, check, parse
from distill.task.reply import answer_start, final_text

LABELS = LabelSpace()

FIELDS = (
    '"Text_analysis": The words praise the match.\n"Image_analysis": A crowd cheers in a stadium.\n'
    '"Conflict_resolution": Both agree.\n"Final_conclusion": The post is glad.\n"Prediction": '
)
PLAIN = FIELDS + "positive"
QUOTED = PLAIN.replace("The words praise", 'The post says the jar "is labeled as fresh", which praises')


def numbered(name: str) -> str:
    lines = PLAIN.replace('"', "").splitlines()
    return "\n".join(name.format(i, *line.split(": ")) for i, line in enumerate(lines, start=1))


RATIONALES: dict[str, tuple[str, str | None, bool]] = {
    "plain": (PLAIN, "positive", True),
    "thought first": (f'<think>\nUnclear. "Prediction": negative? Let me look.\n</think>\n\n{PLAIN}', "positive", True),
    "thought never closed": ("<think>\nThe words praise", None, False),
    "thought with a draft, never closed": (f"<think>\n{PLAIN}", None, False),
    "thought closed, never opened": (f"The words seem glad.\n</think>\n{PLAIN}", "positive", True),
    "draft in the thought": (f"<think>{FIELDS}negative</think>\n{PLAIN}", "positive", True),
    "thought of another family": (f"◁think▷hm◁/think▷{PLAIN}", "positive", True),
    "channels": (f"<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>{PLAIN}", "positive", True),
    "numbered": (numbered("{0}. {1}: {2}"), "positive", True),
    "numbered and bold": (numbered("{0}) **{1}**: {2}"), "positive", True),
    "numbered headings": (numbered("### {0}. {1}\n{2}"), "positive", True),
    "escaped underscores": (PLAIN.replace("_", "\\_"), "positive", True),
    "angle brackets of the prompt kept": (FIELDS + "<positive>", "positive", True),
    "full-width marks": (FIELDS + "“positive”。", "positive", True),
    "full-width colons and quotes": (PLAIN.replace('": ', "”：").replace('"', "“"), "positive", True),
    "answer tags round all": (f"<answer>\n{PLAIN}\n</answer>", "positive", True),
    "fenced": (f"```text\n{PLAIN}\n```", "positive", True),
    "leak": (
        PLAIN.replace("The post is glad", "As the sample is labeled as positive, it is glad"),
        "positive",
        False,
    ),
    "leak in a thought": (f"<think>The gold label is positive.</think>{PLAIN}", "positive", True),
    "quoted post says 'is labeled as'": (QUOTED, "positive", True),
    "quotation and leak": (QUOTED.replace("Both agree", "It is labeled as positive"), "positive", False),
    "two labels": (FIELDS + "positive or neutral", None, False),
    "negated": (FIELDS + "not positive", None, False),
}


@pytest.mark.parametrize("name", RATIONALES)
def test_rationales(name: str) -> None:
    answer, prediction, valid = RATIONALES[name]
    try:
        found = parse(answer, LABELS).prediction
    except InvalidRationale:
        found = None
    assert found == prediction
    if valid:
        rationale = check(answer, LABELS, "positive", post="My jar is labeled as fresh, love it")
        assert rationale.image_analysis == "A crowd cheers in a stadium."
    else:
        with pytest.raises(InvalidRationale):
            check(answer, LABELS, "positive", post="My jar is labeled as fresh, love it")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" positive", "positive"),
        ("Positive!", "positive"),
        ("<positive>", "positive"),
        ("(neutral)", "neutral"),
        ("“negative”", "negative"),
        ("positive。", "positive"),
        ("positive！", "positive"),
        ("**Positive**", "positive"),
        ("- positive", "positive"),
        ('"Prediction": positive', "positive"),
        ("1. Prediction： positive", "positive"),
        ("**Answer:** positive", "positive"),
        ('{"Prediction": "negative"}', "negative"),
        ('```json\n{"Prediction": "negative"}\n```', "negative"),
        ("<think>negative?</think>positive", "positive"),
        ("[THINK]negative[/THINK]positive", "positive"),
        ("<think>negative</think><answer>positive</answer>", "positive"),
        ("The words are glad. <answer>positive</answer>", "positive"),
        ("<|begin_of_box|>positive<|end_of_box|>", "positive"),
        ("\\boxed{positive}", "positive"),
        ("positive\n\nThe words are glad.", "positive"),
        ("", None),
        (None, None),
        ("<think>positive", None),
        ("I cannot judge this post.", None),
        ("not positive", None),
        ("positive or neutral", None),
        ("positive?", None),
        ("Prediction: not positive", None),
    ],
)
def test_labels(answer: str | None, label: str | None) -> None:
    assert LABELS.find(answer) == label


def test_signs_of_numbers_are_kept() -> None:
    scale = LabelSpace(("-1", "0", "1"), (-1, 0, 1))
    assert [scale.find(text) for text in ("-1", "(-1)", "1.", "- 1", "+1")] == ["-1", "-1", "1", None, None]


def test_offsets_and_texts_agree() -> None:
    for text in ("<think>a</think>positive", "a</think>positive", "positive"):
        assert text[answer_start(text) :] == final_text(text) == "positive"
    assert answer_start("<think>a") == len("<think>a") and final_text("<think>a") == ""
    assert final_text("<think>" * 2000 + "</think>positive") == "positive"
