"""Every message quoted in docs/troubleshooting.md is one that the package can print.

The first cell of each table row on the page quotes one message in backticks; `…` stands for any text. In the source, a
message is a string literal, an f-string, a %-format or a sum of these, and the values it inserts are wildcards.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
WILDCARD = "…"


def quoted(page: str) -> list[str]:
    """The messages of the page."""
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


@cache
def printed() -> frozenset[str]:
    """All messages of the package, with wildcards for what they insert."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "distill").rglob("*.py"))]
    return frozenset(text for tree in trees for text in templates(tree))


def templates(tree: ast.AST) -> Iterator[str]:
    """Every string expression of a module, sums of strings as a whole; docstrings are none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if (text := template(node)) is not None:
            yield text
        yield from templates(node)


def template(node: ast.AST) -> str | None:
    """A string expression with a wildcard for each inserted value; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-+#0 ]*\d*(?:\.\d+)?[sdrfge]", WILDCARD, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else WILDCARD for part in node.values]
        return "".join(map(str, parts))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        if left is None and right is None:
            return None
        return (left or WILDCARD) + (right or WILDCARD)
    return None


def occurs(message: str, texts: frozenset[str]) -> bool:
    """Whether a whole text has the message's literal parts in order, starting and ending as the message does."""
    pattern = re.compile(".*".join(map(re.escape, message.split(WILDCARD))), re.DOTALL)
    return any(pattern.fullmatch(text) for text in texts)


@pytest.mark.parametrize("message", quoted(PAGE))
def test_the_package_prints_the_message(message: str) -> None:
    assert occurs(message, printed())


def test_the_page_quotes_messages_that_say_something() -> None:
    messages = quoted(PAGE)
    assert len(messages) >= 60
    assert len(set(messages)) == len(messages)
    assert not [message for message in messages if len(re.findall(r"\w", message)) < 7]


def test_every_row_of_a_table_has_a_cause_and_a_remedy() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(quoted(PAGE))
    for row in rows:
        assert len([cell for cell in row.strip("|").split(" | ") if cell.strip()]) == 3, row


@pytest.mark.parametrize(
    ("code", "message", "there"),
    [
        ('f"{path} is missing"', "… is missing", True),
        ('f"{path} is missing"', "… is gone", False),
        ('f"{path} is missing; run it"', "… is missing", False),
        ('"a %s of %.1f GB" % x', "a … of … GB", True),
        ('log.warning(start + " a post, not %g", n)', "… a post, not …", True),
        ('f"one "\nf"sentence {n}"', "one sentence …", False),
        ('(f"one "\n f"sentence {n}")', "one sentence …", True),
        ('"""a docstring"""', "a docstring", False),
    ],
)
def test_messages_are_found_in_source(code: str, message: str, there: bool) -> None:
    assert occurs(message, frozenset(templates(ast.parse(code)))) == there
