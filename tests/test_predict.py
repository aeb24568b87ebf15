"""`distill predict`: one row for each usable post, whatever happens in between."""

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import yaml

import distill
from distill import cli, predict
from distill.api import Cascade, Student
from distill.data import jsonl
from distill.errors import SettingsError
from tests.commands import Command
from tests.forks import processes


@pytest.fixture(scope="module")
def posts(folder: Path) -> list[dict]:
    """The test posts, with names of their images in the folder of the data."""
    names = ("id", "text", "images")
    return [{name: row.fields[name] for name in names} for row in jsonl.read(folder / "evaluate" / "predictions.jsonl")]


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    return Path(distill.Run(folder).recipe.data.root)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an output, with values of the types of JSON."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return [
            {name: value if name in ("id", "label") else json.loads(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


@contextmanager
def ended_by(error: BaseException) -> Iterator[None]:
    """Within the context, a prediction ends with this error when all posts have results, before the output."""
    with patch("distill.data.streams.write", side_effect=error):
        yield


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_every_format_gives_the_students_answers(
    folder: Path,
    posts: list[dict],
    root: Path,
    tmp_path: Path,
    distill: Command,
) -> None:
    paths = [{**post, "images": [str(root / name) for name in post["images"]]} for post in posts]
    expected = [
        {"row": number, "id": answer["id"], "label": answer["label"]}
        | {f"probability_{name}": pytest.approx(value, abs=1e-5) for name, value in answer["probabilities"].items()}
        | {"uncertainty": pytest.approx(answer["uncertainty"], abs=1e-4)}
        for number, answer in enumerate(Student.from_run(folder).classify(paths), start=1)
    ]
    source = write_jsonl(tmp_path / "new.jsonl", posts)
    with (tmp_path / "new.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["text", "image", "other", "id"])
        table.writeheader()
        table.writerows(
            {"id": post["id"], "text": post["text"], "image": "".join(post["images"]), "other": "x"} for post in posts
        )
    import pyarrow as pa

    cells = [
        {"bytes": (root / post["images"][0]).read_bytes(), "path": None} if post["images"] else None for post in posts
    ]
    columns = {"id": [post["id"] for post in posts], "text": [post["text"] for post in posts], "image": cells}
    pq.write_table(pa.table(columns), tmp_path / "new.parquet")
    for given, suffix in (("new.jsonl", "parquet"), ("new.csv", "jsonl"), ("new.parquet", "csv")):
        output = tmp_path / f"out-{suffix}" / f"labels.{suffix}"
        result = distill(
            "predict", "--run", folder, "--input", tmp_path / given, "--output", output, "--images", root
        )  # fmt: skip
        assert result.status == 0, result.stderr
        assert result.stdout == f"wrote 9 rows to {output}\n"
        found = read(output)
        offset = 1 if given == "new.csv" else 0  # its header is a row
        assert without_time(found) == [{**row, "row": row["row"] + offset} for row in expected], given
        assert all(row["seconds"] > 0 for row in found)
        assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert source.exists()


def test_a_folder_of_pictures_is_labelled(folder: Path, root: Path, tmp_path: Path) -> None:
    pictures = sorted(root.rglob("*.png"))[:3]
    (tmp_path / "pictures").mkdir()
    for picture in pictures:
        shutil.copy(picture, tmp_path / "pictures")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    written = predict.predict(folder, tmp_path / "pictures", tmp_path / "out.jsonl")
    assert (written.rows, written.dropped) == (3, 1)
    assert [row["id"] for row in read(written.output)] == [picture.name for picture in pictures]
    (dropped,) = read(written.quarantine)
    assert dropped["row"] == 1 and "notes.txt" in dropped["problem"]
    student = Student.from_run(folder)
    expected = [answer["label"] for answer in student.classify([{"image": picture} for picture in pictures])]
    assert [row["label"] for row in read(written.output)] == expected


def test_rows_that_cannot_be_used_are_listed_and_the_others_answered(
    folder: Path,
    posts: list[dict],
    root: Path,
    tmp_path: Path,
    distill: Command,
) -> None:
    lines = [
        json.dumps(posts[0]), "", "{", "[]", '{"text": " "}', '{"text": "a", "image": "gone.png"}',
        '{"text": "a", "image": "../secret.png"}', '{"text": 3}', '{"text": "fine"}', '{"id": "7", "text": "\\u0000b"}',
    ]  # fmt: skip
    (tmp_path / "new.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}')
    output = tmp_path / "out.jsonl"
    result = distill(
        "predict", "--run", folder, "--input", tmp_path / "new.jsonl", "--output", output, "--images", root
    )
    assert result.status == 0
    quarantine = tmp_path / "out.quarantine.jsonl"
    assert result.stdout == (
        f"wrote 4 rows to {output}\n6 rows cannot be used; the reasons are in {quarantine}\n"
    )  # fmt: skip
    assert [(row["row"], row["id"]) for row in read(output)] == [(1, posts[0]["id"]), (9, "9"), (10, "7"), (11, "11")]
    problems = {row["row"]: row["problem"] for row in read(quarantine)}
    assert list(problems) == [3, 4, 5, 6, 7, 8]
    assert problems[3].startswith("is not valid JSON") and problems[4] == "is not a JSON object"
    assert problems[5] == "there is no text, image, video or audio" and problems[6] == "image gone.png is missing"
    assert "lies outside" in problems[7] and problems[8].startswith("text must be text")


@pytest.mark.parametrize("explain", ["none", "student"])
def test_a_rationale_is_written_if_it_argues_for_the_label(
    explain: predict.Explain,
    folder: Path,
    posts: list[dict],
    root: Path,
    tmp_path: Path,
) -> None:
    source = write_jsonl(tmp_path / "new.jsonl", posts)
    options = {"rationales": True, "explain": explain, "max_new_tokens": 100}
    rows = read(predict.predict(folder, source, tmp_path / "out.jsonl", images=root, **options).output)  # type: ignore[arg-type]
    reference = {row.fields["id"]: row.fields for row in jsonl.read(folder / "evaluate" / "predictions.jsonl")}
    student = Student.from_run(folder)
    paths = [{**post, "images": [str(root / name) for name in post["images"]]} for post in posts]
    reasons = student.reason(paths, max_new_tokens=100)
    explained = student.reason(paths, [row["label"] for row in rows], max_new_tokens=100)
    for row, reason, second in zip(rows, reasons, explained, strict=True):
        assert reason["text"] == reference[row["id"]]["roles"]["student"]["rationale"]
        assert second["label"] in (None, row["label"])
        found = reason["rationale"] if reason["label"] == row["label"] else None
        if found is None and explain == "student":
            found = second["rationale"]
        assert (row["rationale"] is None) == (found is None) == (row["rationale_problem"] is not None)
        assert row["rationale_by"] == (None if found is None else "student")
        if found is not None:
            assert json.loads(row["rationale"]) == found and found["Prediction"] == row["label"]


@pytest.mark.parametrize("explain", ["teacher", "none"])
def test_the_recipe_says_who_explains_by_default(
    explain: predict.Explain, folder: Path, posts: list[dict], root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["serve"]["explain"] = explain
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = write_jsonl(tmp_path / "new.jsonl", posts[:6])
    options = {"images": root, "rationales": True, "max_new_tokens": 100}
    default, explicit = (
        read(predict.predict(run, source, tmp_path / f"{name}.jsonl", cascade=True, **options, **chosen).output)
        for name, chosen in (("default", {}), ("explicit", {"explain": explain}))
    )
    assert [row | {"seconds": 0} for row in default] == [row | {"seconds": 0} for row in explicit]
    alone = read(predict.predict(run, source, tmp_path / "alone.jsonl", **options).output)
    assert {row["rationale_by"] for row in alone} <= {"student", None}


def test_the_teacher_explains_what_the_student_does_not(
    folder: Path, posts: list[dict], root: Path, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "new.jsonl", posts)
    options = {"cascade": True, "rationales": True, "max_new_tokens": 100}
    found, without = (
        read(
            predict.predict(
                folder, source, tmp_path / f"{explain}.jsonl", images=root, explain=explain, **options
            ).output
        )
        for explain in ("teacher", "none")
    )
    assert any(row["rationale"] is None for row in without)
    for row, other in zip(found, without, strict=True):
        asked = other["rationale"] is None
        assert row["teacher_calls"] == other["teacher_calls"] + asked
        assert row["label"] == other["label"]
        if not asked:
            assert (row["rationale"], row["rationale_by"]) == (other["rationale"], "student")
        elif row["rationale"] is not None:
            assert row["rationale_by"] == "teacher" and json.loads(row["rationale"])["Prediction"] == row["label"]
    with pytest.raises(SettingsError, match="--explain teacher needs --cascade"):
        predict.predict(folder, source, tmp_path / "x.jsonl", images=root, rationales=True, explain="teacher")


def test_a_cascade_decides_as_its_stage_and_asks_for_nothing_twice(
    folder: Path,
    posts: list[dict],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_jsonl(tmp_path / "new.jsonl", posts)
    full = OSError(28, "No space left on device")
    with ended_by(full), pytest.raises(distill.RunError, match=r"out\.parquet: No space left on device"):
        predict.predict(folder, source, tmp_path / "out.parquet", images=root, cascade=True)
    assert not (tmp_path / "out.parquet").exists()
    assert (tmp_path / ".out.parquet.parts" / "ledger.jsonl").stat().st_size > 0

    def asked(*_: object) -> None:
        raise AssertionError("everything has been answered")

    monkeypatch.setattr(Cascade, "label", asked)
    written = predict.predict(folder, source, tmp_path / "out.parquet", images=root, cascade=True)
    decided = [row.fields for row in jsonl.read(folder / "cascade" / "decisions.jsonl")]
    for found, row in zip(read(written.output), decided, strict=True):
        assert all(found[name] == row[name] for name in ("id", "label", "stage", "reason", "degraded", "teacher_calls"))
        assert found["price"] is None and found["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", "out.parquet"]


# ---- a kill in the middle ----


def command(arguments: list[str], chunk: int) -> None:
    predict._CHUNK = chunk
    raise SystemExit(cli.main(["predict", *arguments]))


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_twice_it_gives_the_same_as_at_once(
    folder: Path,
    posts: list[dict],
    root: Path,
    tmp_path: Path,
) -> None:
    many = [{**post, "id": f"{post['id']}-{copy}"} for copy in range(100) for post in posts]
    source = write_jsonl(tmp_path / "new.jsonl", many)
    arguments = ["--run", folder, "--input", source, "--output", tmp_path / "out.jsonl", "--images", root]
    results = tmp_path / ".out.jsonl.parts" / "results.jsonl"
    lines = 0
    for _ in range(2):
        process = processes.Process(target=command, args=([str(part) for part in arguments], 16))
        process.start()
        wait_for(lambda known=lines: results.exists() and results.read_bytes().count(b"\n") > known, process)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lines = results.read_bytes().count(b"\n")
        assert 0 < lines < len(many) and not (tmp_path / "out.jsonl").exists()
        with results.open("ab") as file:
            file.write(b'{"row": 99')  # cut by the kill
    written = predict.predict(folder, source, tmp_path / "out.jsonl", images=root)
    found = read(written.output)
    assert [row["id"] for row in found] == [post["id"] for post in many]
    assert [row["row"] for row in found] == list(range(1, 901))
    at_once = predict.predict(folder, source, tmp_path / "again.jsonl", images=root)
    for one, other in zip(found, read(at_once.output), strict=True):
        assert one["label"] == other["label"] and one["uncertainty"] == pytest.approx(other["uncertainty"], abs=1e-4)


def test_results_of_other_posts_are_not_continued(folder: Path, posts: list[dict], root: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "new.jsonl", posts)
    with ended_by(KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        predict.predict(folder, source, tmp_path / "out.csv", images=root)
    with pytest.raises(distill.SettingsError, match=r"parts was begun with other options; delete it, or name another"):
        predict.predict(folder, source, tmp_path / "out.csv", images=root, rationales=True)
    write_jsonl(source, posts[1:])
    with pytest.raises(distill.SettingsError, match=r"parts was begun with another input; delete it, or name another"):
        predict.predict(folder, source, tmp_path / "out.csv", images=root)
    write_jsonl(source, posts)
    assert predict.predict(folder, source, tmp_path / "out.csv", images=root).rows == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--output": "out.xlsx"}, "--output: out.xlsx must end in .jsonl, .csv or .parquet"),
        ({"--output": "new.jsonl"}, "exists; delete it or name another file"),
        ({"--input": "gone.jsonl"}, "--input: gone.jsonl does not exist"),
        ({"--input": "new.txt"}, "new.txt is none of JSONL, CSV, Parquet (by its suffix) and a folder of pictures"),
        ({"--input": "broken.parquet"}, "broken.parquet is not a Parquet file: "),
        ({"--input": "other.csv"}, "other.csv has no column text, image, images, video or audio; its columns are a, b"),
        ({"--run": "nowhere"}, "nowhere is no run: it has no recipe.yaml"),
        ({"--max_new_tokens": "many"}, "predict: argument --max_new_tokens: invalid int value: 'many'"),
        ({"--run": None}, "predict: the following arguments are required: --run"),
    ],
)
def test_what_cannot_work_is_refused_and_writes_nothing(
    changes: dict[str, str | None],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    distill: Command,
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"new.jsonl": '{"text": "a"}', "new.txt": "a", "broken.parquet": "PAR1", "other.csv": "a,b\n1,2"}
    for name, content in files.items():
        Path(name).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    options = {"--run": str(folder), "--input": "new.jsonl", "--output": "out.csv"} | changes
    arguments = [part for name, value in options.items() if value is not None for part in (name, value)]
    result = distill("predict", *arguments)
    assert result.status == 2 and message in result.error
    assert sorted(tmp_path.rglob("*")) == before
