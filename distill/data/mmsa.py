"""Reader of MMSA's layout of CMU-MOSI, CMU-MOSEI, CH-SIMS and CH-SIMS v2 (Mao et al., ACL 2022): clips with numbers.

A CSV file, `label.csv`, has one row per clip with `video_id`, `clip_id`, `text`, `label` (a number) and `mode` (the
split); CH-SIMS has `label_T`, `label_A` and `label_V`, too, the labels of one modality alone. The clips are
`Raw/<video_id>/<clip_id>.mp4` beside it. The same file serves all splits: each split uses its own rows.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.data.jsonl import Row
from distill.data.tables import csv_rows, number, require, split_name

LABEL = "label"


def read(path: Path, root: Path, split: str, label: str = LABEL) -> Iterator[Row]:
    """Yield the rows of one file that belong to `split`. An id is `<video_id>/<clip_id>`.

    Args:
        root: the data root, to which the names of the clips are relative.
        label: the column with the label.

    Raises:
        SettingsError: two columns have the same name.
    """
    for row in csv_rows(path):
        found = row.fields
        identity = "/".join(str(found.get(name) or "").strip() for name in ("video_id", "clip_id"))
        fields: dict[str, Any] = {"id": identity}
        problem = row.problem
        try:
            if problem is None:
                require(found, "video_id", "clip_id", "mode", label)
                if split_name(found["mode"] or "") != split:
                    continue
                if not all(identity.split("/", 1)):
                    raise ValueError("video_id or clip_id is missing")
                clip = path.parent / "Raw" / f"{identity}.mp4"
                fields |= {"text": found.get("text"), "label": number(found[label])}
                fields |= {"video": os.path.relpath(clip, root)}
        except ValueError as error:
            problem = str(error)
        yield Row(row.number, fields, problem, row.encoding)
