"""Reader of MVSA-Single and MVSA-Multiple (Niu et al., MMM 2016), with the published rule for one label per post.

`labelResultAll.txt` has an id and one `text,image` pair of labels per annotator; the posts are `data/<id>.txt` and
`data/<id>.jpg` in the same folder. Each annotator labelled text and image separately. The rule that merges the two into
one label is from MultiSentiNet (Xu and Mao, CIKM 2017, table 1).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.data.images import ImageError, resolve
from distill.data.jsonl import Row, lines
from distill.data.text import decode

LABELS = ("negative", "neutral", "positive")


def read(path: Path, root: Path) -> Iterator[Row]:
    """Yield the posts of one label file. A post whose annotations do not determine a label has a `problem`."""
    folder = path.parent / "data"
    for number, line, _ in lines(path):
        cells = [cell.strip() for cell in line.split("\t")]
        if number == 1 and cells[0].casefold() == "id":
            continue
        fields = {"id": cells[0]}
        try:
            name = (folder / cells[0]).relative_to(root).as_posix()
            label = ground_truth([_pair(cell) for cell in cells[1:] if cell])
            raw = resolve(root, f"{name}.txt").read_bytes()
        except OSError:
            yield Row(number, fields, f"text {cells[0]}.txt is missing")
        except ImageError as error:
            yield Row(number, fields, f"text {error}")
        except ValueError as error:
            yield Row(number, fields, str(error))
        else:
            text, encoding = decode(raw)
            row = {**fields, "text": text.strip(), "label": label, "images": [f"{name}.jpg"]}
            yield Row(number, row, encoding=encoding)


def ground_truth(pairs: Sequence[tuple[str, str]]) -> str:
    """Merge the (text, image) labels of all annotators into one label.

    First, the majority of the annotators is taken for each modality. If the two labels are equal, that is the result;
    if one is neutral, the other is.

    Raises:
        ValueError: there are no pairs, there is no majority, or the two labels are positive and negative.
    """
    text, image = (_majority([pair[i] for pair in pairs], ("text", "image")[i]) for i in (0, 1))
    if {text, image} == {"positive", "negative"}:
        raise ValueError(f"text is {text} and image is {image}")
    return image if text == "neutral" else text


def _majority(labels: Sequence[str], modality: str) -> str:
    if not labels:
        raise ValueError("has no labels")
    label, count = Counter(labels).most_common(1)[0]
    if 2 * count <= len(labels):
        raise ValueError(f"annotators do not agree on the {modality}: {', '.join(labels)}")
    return label


def _pair(cell: str) -> tuple[str, str]:
    """The labels of one annotator, written `text,image`."""
    text, _, image = (part.strip().casefold() for part in cell.partition(","))
    if text not in LABELS or image not in LABELS:
        raise ValueError(f"label {cell[:40]!r} is not a text,image pair of {', '.join(LABELS)}")
    return text, image
