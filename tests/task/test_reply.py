"""Answers as teachers write them: thoughts, tags, fences, numbers, brackets and marks of other scripts."""

import json

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


CONTENT = dict(line.replace('"', "").split(": ") for line in PLAIN.splitlines())
MARKS = {"chinese": "一二三四五", "circled": "①②③④⑤"}


def numbered(name: str, marks: str = "12345") -> str:
    return "\n".join(name.format(mark, *field) for mark, field in zip(marks, CONTENT.items(), strict=True))


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
    "numbered as in Chinese": (numbered("{0}、{1}：{2}"), "positive", True),
    "numbered in Chinese": (numbered("（{0}）{1}：{2}", MARKS["chinese"]), "positive", True),
    "circled numbers": (numbered("{0} {1}: {2}", MARKS["circled"]), "positive", True),
    "bullets": (numbered("• {1}: {2}"), "positive", True),
    "brackets": (numbered("[{1}]: {2}"), "positive", True),
    "lenticular brackets": (numbered("【{1}】：{2}"), "positive", True),
    "underlined": (numbered("__{1}__: {2}"), "positive", True),
    "a table": ("| Field | Value |\n|---|---|\n" + numbered("| **{1}** | {2} |"), "positive", True),
    "XML": (numbered("<{1}>{2}</{1}>"), "positive", True),
    "HTML": (numbered("<li><b>{1}</b>: {2}<br></li>"), "positive", True),
    "YAML with blocks": (numbered("{1}: >\n  {2}"), "positive", True),
    "YAML in a fence": ("~~~yaml\n" + numbered("{1}: |-\n  {2}") + "\n~~~", "positive", True),
    "JSON in another order": (json.dumps(dict(reversed(CONTENT.items()))), "positive", True),
    "JSON with trailing commas": ("{\n" + numbered('  "{1}": "{2}",') + "\n}", "positive", True),
    "carriage returns": (PLAIN.replace("\n", "\r"), "positive", True),
    "a byte order mark": ("\ufeff" + PLAIN, "positive", True),
    "marks without width": (FIELDS.replace('"Text', '\u200b"Text') + "\u200fpositive\u200e", "positive", True),
    "no-break spaces": (PLAIN.replace('":', '"\u00a0:'), "positive", True),
    "end tokens": (FIELDS + "positive</s><end_of_turn><｜end▁of▁sentence｜>", "positive", True),
    "a confidence": (FIELDS + "positive (0.92)", "positive", True),
    "a bold confidence": (FIELDS + "**positive** (90%).", "positive", True),
    "full-width letters": (FIELDS + "ｐｏｓｉｔｉｖｅ", "positive", True),
    "nested thoughts": (f"<think>a <think>b</think> {FIELDS}negative</think>\n{PLAIN}", "positive", True),
    "nested thoughts, one not closed": (f"<think>a <think>b</think>\n{PLAIN}", "positive", True),
    "a turn of channels": (
        "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{PLAIN}<|return|>",
        "positive",
        True,
    ),
    "fields in another order": ("\n".join(reversed(PLAIN.splitlines())), None, False),
    "fields twice": (f"{PLAIN}\n\n{PLAIN}", None, False),
    "another language": (FIELDS + "正面", None, False),
    "a count": (FIELDS + "3/3 positive", None, False),
    "a slash": (FIELDS + "positive/negative", None, False),
    "two confidences": (FIELDS + "positive (0.5), negative (0.5)", None, False),
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
        assert rationale.texts[1] == "A crowd cheers in a stadium."
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
        ("POSITIVE!!", "positive"),
        ("neutral (0.7)", "neutral"),
        ("positive [95.5 %]", "positive"),
        ('{"Prediction": "positive", "confidence": 0.9}', "positive"),
        ('{"label": "positive", "reason": "negative?"}', "positive"),
        ("{'Prediction': 'positive'}", "positive"),
        ("['positive']", "positive"),
        ("| positive |", "positive"),
        ("<b>positive</b>", "positive"),
        ("$\\boxed{\\text{positive}}$", "positive"),
        ("\ufeffpositive\u200b", "positive"),
        ("<s> positive</s>", "positive"),
        ("positive<end_of_turn>", "positive"),
        ("~~~\npositive\n~~~", "positive"),
        ("ｐｏｓｉｔｉｖｅ", "positive"),
        ("", None),
        (None, None),
        ("<think>positive", None),
        ("I cannot judge this post.", None),
        ("not positive", None),
        ("positive or neutral", None),
        ("positive?", None),
        ("1", None),
        ("positive/negative", None),
        ("positive | negative", None),
        ("not positive (0.9)", None),
        ("non-positive", None),
        ("正面", None),
        ('"Prediction": "positive", "negative"', None),
        ('{"Prediction": "not positive", "confidence": 0.9}', None),
        ("Prediction: not positive", None),
    ],
)
def test_labels(answer: str | None, label: str | None) -> None:
    assert LABELS.find(answer) == label


def test_signs_of_numbers_are_kept() -> None:
    scale = LabelSpace(("-1", "0", "1"), (-1, 0, 1))
    assert [scale.find(text) for text in ("-1", "(-1)", "1.", "- 1", "+1")] == ["-1", "-1", "1", None, None]


def test_numbers_in_parentheses_after_a_number_are_no_confidence() -> None:
    scale = LabelSpace(("0", "0.5", "1"), (-1, 0, 1))
    assert [scale.find(text) for text in ("1", "1 (0.5)", "0.5 (90%)")] == ["1", None, None]


def test_letters_may_be_composed_or_not() -> None:
    labels = LabelSpace(("n\u00e9gatif", "positif"), (-1, 1))
    assert labels.find("Ne\u0301gatif.") == "n\u00e9gatif"


def test_offsets_and_texts_agree() -> None:
    for text in ("<think>a</think>positive", "a</think>positive", "positive"):
        assert text[answer_start(text) :] == final_text(text) == "positive"
    assert answer_start("<think>a") == len("<think>a") and final_text("<think>a") == ""
    assert final_text("<think>" * 2000 + "</think>positive") == "positive"
