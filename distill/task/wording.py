"""The wording of a task: its question, the definitions of its labels, and the language of rationales."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

QUESTION = "Judge the sentiment of {target}{scale}: {labels}."
"""The default question."""

DEFINITIONS = {
    "negative": "disapproval, sadness or mockery",
    "neutral": "facts, or signals that cancel out",
    "positive": "approval, joy or affection",
}
"""The default definitions, of the labels with these names."""


@dataclass(frozen=True)
class Wording:
    """The wording of a task, which all prompts use.

    Attributes:
        question: about a post. `{target}` stands for the post, or the post towards its aspect, `{labels}` for the names
            of the labels, and `{scale}` for the ends of a scale.
        definitions: pairs of a label and what it means.
        language: of the rationales; empty: the prompts name none.

    Raises:
        ValueError: the question does not contain what it must, or a text is not one line.
    """

    question: str = QUESTION
    definitions: tuple[tuple[str, str], ...] = tuple(DEFINITIONS.items())
    language: str = ""

    def __post_init__(self) -> None:
        for place, purpose in {"{target}": "the post", "{labels}": "the names of the labels"}.items():
            if place not in self.question:
                raise ValueError(f"task.question does not contain {place}, which stands for {purpose}")
        texts = {"question": self.question, "language": self.language}
        texts |= {f"definitions.{label}": text for label, text in self.definitions}
        for field, text in texts.items():
            if len(text.splitlines()) > 1:
                raise ValueError(f"task.{field} must be one line")
        for label, text in self.definitions:
            if not text.strip():
                raise ValueError(f"task.definitions.{label} is empty")

    def ask(self, target: str, labels: str, scale: str) -> str:
        """The question about a post."""
        parts = {"{target}": target, "{labels}": labels, "{scale}": scale}
        return re.sub("|".join(map(re.escape, parts)), lambda place: parts[place[0]], self.question)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Wording":
        """The wording whose fields were written as JSON."""
        definitions = tuple((name, text) for name, text in content["definitions"])
        return cls(**dict(content) | {"definitions": definitions})

    @property
    def asks_for_sentiment(self) -> bool:
        """Whether the question is the default one."""
        return self.question == QUESTION
