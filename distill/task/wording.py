"""The wording of a task: question, definitions, fields and language of rationales, and templates of one's own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.task.reply import letters_of

QUESTION = "Judge the sentiment of {target}{scale}: {labels}."
"""The default question."""

DEFINITIONS = {
    "negative": "disapproval, sadness or mockery",
    "neutral": "facts, or signals that cancel out",
    "positive": "approval, joy or affection",
}
"""The default definitions, of the labels with these names."""

FIELDS = {
    "Text_analysis": "what the words say and how they sound",
    "Image_analysis": "what the image shows and the mood it sets",
    "Conflict_resolution": "whether they agree, and which prevails",
    "Final_conclusion": "what follows from both",
    "Prediction": "",
}
"""The default fields of a rationale, with what belongs in them (MulCoT-RD, arXiv 2508.05234)."""

_GIVEN = ("text", "target", "aspect", "labels", "scale", "definitions", "prefix", "language")
PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "predict": (*_GIVEN, "fields", "examples"),
    "explain": (*_GIVEN, "fields", "examples", "label"),
    "reason": (*_GIVEN, "fields"),
    "classify": _GIVEN,
    "review": (*_GIVEN, "student", "student_confidence", "teacher", "teacher_confidence"),
}
"""What each template may contain, in braces."""

_REQUIRED: dict[str, tuple[str, ...]] = {
    "predict": ("text", "fields"),
    "explain": ("text", "fields", "label"),
    "reason": ("text",),
    "classify": ("text",),
    "review": ("text", "student", "teacher"),
}


@dataclass(frozen=True)
class Wording:
    """The wording of a task, which all prompts use.

    Attributes:
        question: about a post. `{target}` stands for the post, or the post towards its aspect, `{labels}` for the names
            of the labels, and `{scale}` for the ends of a scale.
        definitions: pairs of a label and what it means.
        language: of the rationales; empty: the prompts name none.
        fields: pairs of a field of a rationale and what belongs in it, in order; the last is the prediction.
        templates: pairs of a template and its whole text, instead of the one that the other attributes make.

    Raises:
        ValueError: a text does not contain what it must, or contains what it must not.
    """

    question: str = QUESTION
    definitions: tuple[tuple[str, str], ...] = tuple(DEFINITIONS.items())
    language: str = ""
    fields: tuple[tuple[str, str], ...] = tuple(FIELDS.items())
    templates: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for place, purpose in {"{target}": "the post", "{labels}": "the names of the labels"}.items():
            if place not in self.question:
                raise ValueError(f"task.question does not contain {place}, which stands for {purpose}")
        texts = {"question": self.question, "language": self.language}
        texts |= {f"definitions.{label}": text for label, text in self.definitions}
        texts |= {f"fields.{name}": text for name, text in self.fields}
        for field, text in texts.items():
            if len(text.splitlines()) > 1:
                raise ValueError(f"task.{field} must be one line")
        for field, text in (*self.definitions, *self.fields[:-1]):
            if not text.strip():
                section = "definitions" if (field, text) in self.definitions else "fields"
                raise ValueError(f"task.{section}.{field} is empty")
        self._check_fields()
        for template, text in self.templates:
            self._check_template(template, text)

    def _check_fields(self) -> None:
        if len(self.fields) < 2:
            raise ValueError("task.fields takes at least two fields: one of reasoning, and the prediction as the last")
        seen: dict[str, str] = {}
        for name in self.names:
            if not re.fullmatch(r"[^\W\d][\w -]*", name) or name != name.strip() or not (letters := letters_of(name)):
                raise ValueError(f"task.fields: {name!r} is no name of a field; it takes letters, digits, '_' and '-'")
            if letters in seen:
                raise ValueError(f"task.fields: {seen[letters]!r} and {name!r} have the same letters; rename one")
            seen[letters] = name

    def _check_template(self, template: str, text: str) -> None:
        if template not in PLACEHOLDERS:
            raise ValueError(f"task.templates has {template!r}; the templates are {', '.join(PLACEHOLDERS)}")
        found = placeholders(text)
        for name in _REQUIRED[template]:
            if name not in found and not (name == "fields" and all(field in text for field in self.names)):
                instead = " or the names of all fields" if name == "fields" else ""
                raise ValueError(f"task.templates.{template} does not contain {{{name}}}{instead}")
        for name in found:
            if name not in PLACEHOLDERS[template]:
                takes = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS[template])
                raise ValueError(f"task.templates.{template} contains {{{name}}}; it takes {takes}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the fields; the last is the prediction's."""
        return tuple(name for name, _ in self.fields)

    @property
    def prefix(self) -> str:
        """The forced prefix of a label: label probabilities are read from the tokens that follow."""
        return f'"{self.names[-1]}":'

    def template(self, name: str) -> str | None:
        """The whole text of a template; None if it has none of its own."""
        text = dict(self.templates).get(name)
        return None if text is None else text.strip("\n")

    def ask(self, **parts: str) -> str:
        """The question about a post, from `target`, `labels` and `scale`."""
        return fill(self.question, parts)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Wording":
        """The wording whose fields were written as JSON."""
        pairs = ("definitions", "fields", "templates")
        texts: dict[str, Any] = dict(content)
        return cls(**texts | {name: tuple(map(tuple, texts[name])) for name in pairs if name in texts})

    @property
    def asks_for_sentiment(self) -> bool:
        """Whether the question is the default one."""
        return self.question == QUESTION


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace `{name}` by its part in one pass, so that a part may contain braces; other braces stay."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in parts), lambda place: parts[place[0][1:-1]], text)


def placeholders(text: str) -> list[str]:
    """The names in braces in a template."""
    return re.findall(r"\{([a-z_]+)\}", text)
