"""Reader of MELD (Poria et al., ACL 2019): utterances of dialogues with their clips, sentiment and emotion.

A CSV file, `train_sent_emo.csv`, `dev_sent_emo.csv` or `test_sent_emo.csv`, has one row per utterance with `Utterance`,
`Dialogue_ID`, `Utterance_ID`, `Sentiment` and `Emotion`. Its clips are `dia<D>_utt<U>.mp4` in the folder that MELD.Raw
has for this file, beside it or in `train`, `dev` or `test` beside it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.data.jsonl import Row
from distill.data.tables import csv_rows, require
from distill.errors import SettingsError

LABEL = "Sentiment"
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
"""Folders of the clips, by the first part of the name of the CSV file."""


def read(path: Path, root: Path, label: str = LABEL) -> Iterator[Row]:
    """Yield the rows of one file. An id is `<part>_dia<D>_utt<U>`, since every file numbers its dialogues from 0.

    Args:
        root: the data root, to which the names of the clips are relative.
        label: the column with the label.

    Raises:
        SettingsError: the name of the file is none of MELD's, or two columns have the same name.
    """
    part = path.name.split("_")[0]
    if part not in FOLDERS:
        raise SettingsError(f"{path.name} is none of MELD's files, train_, dev_ and test_sent_emo.csv")
    folders = [path.parent / FOLDERS[part], path.parent / part / FOLDERS[part]]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    for row in csv_rows(path):
        found, problem = row.fields, row.problem
        dialogue, utterance = (str(found.get(f"{kind}_ID") or "").strip() for kind in ("Dialogue", "Utterance"))
        clip = f"dia{dialogue}_utt{utterance}"
        fields: dict[str, Any] = {"id": f"{part}_{clip}"}
        try:
            if problem is None:
                require(found, "Utterance", "Dialogue_ID", "Utterance_ID", label)
                if not (dialogue.isdecimal() and utterance.isdecimal()):
                    raise ValueError("Dialogue_ID or Utterance_ID is no number")
                fields |= {"text": found["Utterance"], "label": found[label]}
                fields |= {"video": os.path.relpath(folder / f"{clip}.mp4", root)}
        except ValueError as error:
            problem = str(error)
        yield Row(row.number, fields, problem, row.encoding)
