"""The parser on real teacher texts, on every format, and on answers that quote a post which imitates an answer."""

import contextlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from distill.task.labels import LabelSpace, TaskSettings
from distill.task.rationale import InvalidRationale, Rationale, check, parse, render
from distill.task.wording import Wording

FIELDS = Wording().names

LABELS = LabelSpace()
TWITTER = Path(__file__).parents[2].parent / "shared" / "data" / "twitter15"
CHAIN = Rationale(("The words are glad.", "A sad face.", "The face prevails.", "It is sarcasm."), "negative")

BODY = CHAIN.as_dict()
FORMATS = {
    "canonical": render(CHAIN),
    "quoted": "\n\n".join(f'"{name}": "{text}"' for name, text in BODY.items()),
    "plain": "\n".join(f"{name}: {text}" for name, text in BODY.items()),
    "spaced names": "\n".join(f"{name.replace('_', ' ').lower()}: {text}" for name, text in BODY.items()),
    "headings": "\n\n".join(f"### {name}\n{text}" for name, text in BODY.items()),
    "headings with colons": "\n\n".join(f"## {name}:\n\n{text}" for name, text in BODY.items()),
    "bold": "\n".join(f"**{name}**: {text}" for name, text in BODY.items()),
    "bold with the colon inside": "\n".join(f"**{name}:** {text}" for name, text in BODY.items()),
    "bold label": "\n".join(f"**{name}**: {text}" for name, text in BODY.items()).replace("negative", "**Negative**."),
    "list": "\n".join(f"- {name}: {text}" for name, text in BODY.items()),
    "json": json.dumps(BODY, indent=2),
    "json on one line": json.dumps(BODY),
    "fenced json": f"```json\n{json.dumps(BODY, indent=2)}\n```",
    "fenced json on one line": f"```json\n{json.dumps(BODY)}\n```",
    "json in an object": json.dumps({"answer": BODY}),
    "json on one line after a sentence": f"Here you are: {json.dumps(BODY)} and that is all.",
    "json after a sentence": f"Here you are:\n\n```json\n{json.dumps(BODY, indent=2)}\n```",
    "json with a loose label": json.dumps(BODY, indent=2).replace('"negative"', "negative"),
    "fenced lines": f"```\n{render(CHAIN)}\n```",
    "windows lines": render(CHAIN).replace("\n", "\r\n"),
    "table": "| Field | Value |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in BODY.items()),
    "XML": "\n".join(f"<{name}>{text}</{name}>" for name, text in BODY.items()),
    "XML on own lines": "\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in BODY.items()),
    "brackets": "\n".join(f"【{name}】：{text}" for name, text in BODY.items()),
    "YAML": "\n".join(f"{name}: >-\n  {text}" for name, text in BODY.items()),
    "with a note": render(CHAIN) + "\n\n**Note:** the face decides.",
    "rules between": "\n\n---\n\n".join(f"## {name}\n{text}" for name, text in BODY.items()),
}


@pytest.mark.parametrize("layout", FORMATS)
def test_every_format_gives_the_same_rationale(layout: str) -> None:
    assert parse(FORMATS[layout], LABELS) == CHAIN


def test_render_writes_the_canonical_format() -> None:
    assert render(CHAIN).splitlines() == [
        '"Text_analysis": "The words are glad."',
        '"Image_analysis": "A sad face."',
        '"Conflict_resolution": "The face prevails."',
        '"Final_conclusion": "It is sarcasm."',
        '"Prediction": negative',
    ]


def test_parse_inverts_render() -> None:
    """Random texts of tokens that could confuse the parser; render may only change white space."""
    pieces = [
        *FIELDS, '"', "'", "`", "```", "```json", "**", "#", "{", "}", ",", ":", "\n", "\n\n", "\t",
        '"Prediction": positive', "Prediction:", "- ", "> ", "é", "😀", "x", "not", "neutral", " ", "null", "0",
        "\u2028", "\x0b", "\\", "[", "]",
    ]  # fmt: skip
    rng = random.Random(0)
    seen = 0
    while seen < 2000:
        texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(4)]
        if not all(text.split() for text in texts):
            continue
        chain = Rationale(tuple(texts), rng.choice(LABELS.names))
        expected = Rationale(tuple(" ".join(text.split()) for text in texts), chain.prediction)
        if any(not text.strip(' "') for text in texts):  # only quotes: counts as empty
            continue
        if any(render(chain).count(name) > 1 for name in FIELDS[:4]):
            with contextlib.suppress(InvalidRationale):  # a quoted rationale may be rejected, but not misread
                assert parse(render(chain), LABELS) == expected, render(chain)
        else:
            assert parse(render(chain), LABELS) == expected, render(chain)
            seen += 1


# ---- real answers ----


@pytest.fixture(scope="module")
def real() -> list[dict[str, str]]:
    if not TWITTER.exists():
        pytest.skip(f"the real rationales are missing: {TWITTER}")
    files = [TWITTER / f"{split}.jsonl" for split in ("dev", "test")]
    rows = [json.loads(line) | {"split": file.stem} for file in files for line in file.read_text("utf-8").splitlines()]
    return [row for row in rows if row["rationale"]]


def test_real_rationales_are_parsed(real: list[dict[str, str]]) -> None:
    assert len(real) == 2159
    read = 0
    for row in real:
        try:
            chain = parse(row["rationale"], LABELS)
        except InvalidRationale:
            continue
        read += 1
        assert all(len(text) > 10 for text in chain.texts)
        assert parse(render(chain), LABELS) == chain
    assert read >= 0.995 * len(real)


def test_check_finds_every_real_rationale_that_predicts_another_label(real: list[dict[str, str]]) -> None:
    reasons: Counter[tuple[str, str]] = Counter()
    for row in real:
        try:
            assert check(row["rationale"], LABELS, row["label"]).prediction == row["label"]
        except InvalidRationale as invalid:
            reasons[row["split"], invalid.reason] += 1
    assert reasons["dev", "contradicts"] == 28
    assert reasons["test", "contradicts"] == 21
    assert sum(reasons.values()) == 28 + 21 + 2  # one has no fields, one leaks the label


# ---- a post that imitates an answer ----

TRAPS = ['"Prediction": positive', "**Prediction**: positive", "### Prediction\npositive", "Prediction: positive"]
TRAPS += ["<Prediction>positive</Prediction>", "| Prediction | positive |", "1、【Prediction】：positive (0.99)"]
TRAPS += [render(Rationale(("a", "b", "c", "d"), "positive")), json.dumps({"Prediction": "positive"})]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("trap", TRAPS)
def test_a_quoted_post_never_changes_the_label(layout: str, trap: str) -> None:
    """Quoted inline, on separate lines, in each field, after the end: the label is right or the answer is rejected."""
    answer = FORMATS[layout]
    for text in [*CHAIN.texts, None]:
        for quote in (
            f"The post says {trap}.",
            f"The post says:\n{trap}\n",
            f"{trap} it says",
            f"\n\n{trap}\n\nit says",
        ):
            attacked = f"{answer}\n{quote}" if text is None else answer.replace(text, f"{text[:-1]}. {quote}")
            assert attacked != answer
            try:
                assert parse(attacked, LABELS).prediction == "negative", attacked
            except InvalidRationale as invalid:
                assert invalid.reason == "malformed"


@pytest.mark.parametrize("trap", TRAPS[:4])
def test_an_answer_that_quotes_a_post_within_a_line_is_accepted(trap: str) -> None:
    quote = " ".join(f"The post says {trap}, mockingly.".split())
    for layout in ("canonical", "headings", "bold", "plain"):
        for text in CHAIN.texts:
            assert parse(FORMATS[layout].replace(text, quote), LABELS).prediction == "negative"
    escaped = json.dumps(BODY | {"Text_analysis": quote})
    assert parse(escaped, LABELS).texts[0] == quote


@pytest.mark.parametrize("layout", ["canonical", "quoted", "json", "json on one line", "fenced json"])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_truncated_answer_never_takes_its_label_from_the_quoted_post(layout: str, trap: str) -> None:
    """Truncated at any position, without a flag that says so: no label but the answer's own."""
    for text in CHAIN.texts:
        for quote in (f"It says {trap}.", f"It says:\n{trap}\n"):
            whole = FORMATS[layout].replace(text, f"{text} {quote}")
            for end in range(0, len(whole), 3):
                try:
                    assert parse(whole[:end], LABELS).prediction == "negative", whole[:end]
                except InvalidRationale as invalid:
                    assert invalid.reason == "malformed"


def test_nested_and_repeated_json_is_rejected() -> None:
    nested = dict(BODY)
    nested.pop("Prediction")
    for post in ({"Prediction": "positive"}, BODY | {"Prediction": "positive"}):
        with pytest.raises(InvalidRationale, match="malformed"):
            parse(json.dumps(nested | {"Image_analysis": post}), LABELS)
    with pytest.raises(InvalidRationale, match="given twice"):
        parse(json.dumps([BODY, BODY]), LABELS)
    twice = json.dumps(BODY)[:-1] + ', "prediction": "positive"}'
    with pytest.raises(InvalidRationale, match="not one label"):
        parse(twice, LABELS)
    with pytest.raises(InvalidRationale, match="malformed"):
        parse("[" * 5000, LABELS)


# ---- fields of another task ----

EMOTIONS = TaskSettings(labels=["anger", "joy"], fields={"Cue": "x", "Cause": "y", "Emotion": ""}).label_space
CHINESE = TaskSettings(labels=["消极", "积极"], fields={"文字分析": "x", "一致性": "y", "情感": ""}).label_space

OTHERS = {
    "canonical": (EMOTIONS, '"Cue": "Loud."\n"Cause": "A guess, no cue: none."\n"Emotion": joy'),
    "markdown": (EMOTIONS, "**Cue:** Loud.\n**Cause:** A guess, no cue: none.\n**Emotion:** Joy."),
    "headings": (EMOTIONS, "### Cue\nLoud.\n\n### Cause\nA guess, no cue: none.\n\n### Emotion\njoy"),
    "json": (EMOTIONS, '```json\n{"cue": "Loud.", "CAUSE": "A guess, no cue: none.", "emotion": "joy"}\n```'),
    "chinese": (CHINESE, '"文字分析": "Loud."\n"一致性": "A guess, no cue: none."\n"情感": 积极'),
    "full-width colons": (CHINESE, "文字分析：Loud.\n一致性：A guess, no cue: none.\n情感：积极。"),
    "numbers": (CHINESE, "1. 文字分析：Loud.\n2. 一致性：A guess, no cue: none.\n3. 情感：积极"),
    "chinese json": (CHINESE, '{"文字分析": "Loud.", "一致性": "A guess, no cue: none.", "情感": "积极"}'),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_fields_of_another_task_are_read(layout: str) -> None:
    labels, answer = OTHERS[layout]
    found = parse(answer, labels)
    assert found.texts == ("Loud.", "A guess, no cue: none.") and found.prediction == labels.names[1]
    assert found.names == labels.wording.names and parse(render(found), labels) == found
    assert layout == "headings" or labels.find(answer) == labels.names[1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ('"Cue": "a"\n"Emotion": joy', "Cause is missing"),
        ('"Cue": "a"\n"Cause": "b"\n"Prediction": joy', "Cause is not closed"),
        ('"Cue": "a"\n"Cause": "b"\n"Emotion": negative', "Emotion is 'negative', not one label"),
        ('"Cue": "a"\n"Cue": "c"\n"Cause": "b"\n"Emotion": joy', "Cue is given twice"),
        ('"Cause": "b"\n"Cue": "a"\n"Emotion": joy', "is missing"),
        (render(CHAIN), "Cue is missing"),
    ],
)
def test_other_fields_than_the_tasks_are_refused(answer: str, problem: str) -> None:
    with pytest.raises(InvalidRationale, match=f"malformed: .*{problem}"):
        parse(answer, EMOTIONS)


# ---- invalid rationales ----


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("layout", ["canonical", "headings", "json"])
def test_a_missing_or_empty_field_is_named(name: str, layout: str) -> None:
    fewer = {field: text for field, text in BODY.items() if field != name}
    empty = BODY | {name: ""}
    for fields in (fewer, empty):
        answer = {
            "canonical": "\n".join(f'"{field}": "{text}"' for field, text in fields.items()),
            "headings": "\n".join(f"## {field}\n{text}" for field, text in fields.items()),
            "json": json.dumps(fields),
        }[layout]
        with pytest.raises(InvalidRationale, match=f"malformed: {name} is missing"):
            parse(answer, LABELS)


@pytest.mark.parametrize("answer", ["", "I cannot help with that.", "positive", '"Prediction": positive', "{}", "null"])
def test_text_without_the_fields_is_malformed(answer: str) -> None:
    with pytest.raises(InvalidRationale, match="malformed"):
        parse(answer, LABELS)


@pytest.mark.parametrize(
    "label", ["mixed", "negative or neutral", "<negative, neutral or positive>", "somewhat negative"]
)
def test_a_prediction_that_is_not_one_label_is_malformed(label: str) -> None:
    with pytest.raises(InvalidRationale, match="not one label"):
        parse(render(CHAIN).replace("negative", label), LABELS)


def test_two_predictions_must_agree() -> None:
    assert parse(render(CHAIN) + '\n"Prediction": "Negative"', LABELS) == CHAIN
    with pytest.raises(InvalidRationale, match="not one label"):
        parse(render(CHAIN) + '\n"Prediction": neutral', LABELS)


def test_check_applies_every_rule() -> None:
    assert check(render(CHAIN), LABELS, "negative") == check(render(CHAIN), LABELS) == CHAIN
    reasons = []
    for answer, expected, finished in (
        (render(CHAIN), "negative", False),
        ("no", "negative", True),
        (render(CHAIN), "positive", True),
        (render(CHAIN).replace("It is sarcasm", "The post Is Labeled As negative"), "negative", True),
    ):
        with pytest.raises(InvalidRationale) as invalid:
            check(answer, LABELS, expected, finished=finished)
        reasons.append(invalid.value.reason)
    assert reasons == ["unfinished", "malformed", "contradicts", "leaks"]
