"""The recipes with a task of their own run whole, on a few dozen invented posts, with a server as teacher."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from distill import Student
from distill.chain import run
from distill.recipe import Recipe
from tests import micro
from tests.models.openai_server import ChatRequest, Server

RECIPES = Path(__file__).parents[1] / "recipes"

POSTS: dict[str, dict[str, list[str]]] = {
    "emotions": {
        "anger": ["Ann: I lost the {} again. Ben: Again? I told you twice!", "Cem: The {} is late. Dia: Stop it!"],
        "sadness": ["Ann: The {} is gone. Ben: I miss it so much."],
        "fear": ["Cem: Did you hear the {}? Dia: Do not open the door."],
        "neutral": ["Ann: Where is the {}? Ben: On the table."],
        "surprise": ["Cem: The {} is yours. Dia: Mine? Since when?"],
        "joy": ["Ann: We won the {}! Ben: Wonderful!"],
    },
    "sarcasm": {
        "sarcastic": ["Just what I needed, another {}", "Great, the {} broke. Best day ever"],
        "sincere": ["The {} made my day", "Thanks to all who brought the {}"],
    },
    "chinese": {
        "消极": ["{}又坏了，真棒", "等{}等了两个小时"],
        "中性": ["今天买了{}", "{}在三楼"],
        "积极": ["终于收到{}，太开心了", "这个{}真好用"],
    },
}
THINGS = {"chinese": ["手机", "雨伞", "车票", "相机"]}


def label_of(name: str, text: str) -> str:
    """The label of a post, from its words."""
    for label, texts in POSTS[name].items():
        if any(re.search(re.escape(one).replace(r"\{\}", ".+"), text) for one in texts):
            return label
    raise AssertionError(text)


def write_data(name: str, root: Path, *, pictures: bool) -> None:
    root.mkdir(parents=True)
    for split, things in (("train", [0, 1, 2, 3]), ("dev", [0]), ("test", [1])):
        rows = []
        for label, texts in POSTS[name].items():
            for number, text in enumerate(texts):
                for thing in things:
                    word = THINGS.get(name, ["kettle", "train", "cup", "dog"])[thing]
                    row = {"id": f"{split}-{label}-{number}-{thing}", "text": text.format(word), "label": label}
                    if pictures:
                        row["image"] = f"{split}-{len(rows)}.png"
                        Image.new("RGB", (40, 40), (20 * len(rows) % 255, 90, 200)).save(root / row["image"])
                    rows.append(row)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(name: str, tmp_path: Path, url: str) -> Recipe:
    """The recipe with tiny models and a short training."""
    learner: dict[str, Any] = {"model": micro.MODEL | {"path": None, "lora": None, "dtype": "float32"}, "workers": 0}
    learner |= {"batch_size": 8, "trainer": {"max_epochs": 1, "accumulate_grad_batches": 1}}
    settings = {
        "runs": str(tmp_path / "runs"),
        "data": {"root": str(tmp_path / "data")},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False},
        "tracking": {"mode": "disabled"},
        "annotate": {"endpoint": {"base_url": url, "model": "teacher"}},
        "assistant": learner,
        "augment": {"max_new_tokens": 20},
        "student": learner,
        "stop_after_invalid": 0,
        "evaluate": {"max_new_tokens": 20},
        "cascade": {"resamples": 20},
        "export": {"check_samples": 4},
    }
    overrides = tmp_path / "overrides.yaml"
    overrides.write_text(yaml.safe_dump(settings))
    return micro.read(RECIPES / f"{name}.yaml", "--config", str(overrides))


@pytest.mark.parametrize("name", POSTS)
def test_a_recipe_with_a_task_of_its_own_runs_whole(name: str, tmp_path: Path) -> None:
    write_data(name, tmp_path / "data", pictures=name != "emotions")

    def answer(request: ChatRequest) -> str:
        asked = request.text.rpartition("The post to answer:\n")[2]
        fields = [f'"{field}": "words about it"' for field in names[:-1]]
        return "\n".join([*fields, f'"{names[-1]}": {label_of(name, asked)}'])

    with Server(answer=answer) as server:
        recipe = load(name, tmp_path, server.url)
        names = recipe.labels.wording.names
        done = run(recipe)
    assert done == ["annotate", "assistant", "augment", "student", "evaluate", "calibrate", "cascade", "export"]

    lines = (recipe.folder / "annotate" / "rationales.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == sum(4 * len(texts) for texts in POSTS[name].values())
    assert all(re.findall('^"(.+?)":', row["rationale"], re.MULTILINE) == list(names) for row in rows)
    metrics = json.loads((recipe.folder / "evaluate" / "metrics.json").read_text())
    assert metrics["teacher"]["reasoned_accuracy"] == 1.0 and "student" in metrics
    assert not any("sentiment" in request.text for request in server.received)

    scoring = json.loads((recipe.folder / "export" / "scoring.json").read_text(encoding="utf-8"))
    assert scoring["prefix"] == f'"{names[-1]}":' and scoring["labels"] == list(POSTS[name])
    assert "examples" not in scoring["wording"] and scoring["prefix"] in scoring["prompt"]
    student = Student.from_pretrained(recipe.folder / "export")
    post = {"id": "new", "text": rows[0]["text"], "images": [str(tmp_path / "data" / i) for i in rows[0]["images"]]}
    (found,), (expected,) = student.classify([post]), Student.from_run(recipe.folder).classify([post])
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)


def test_the_examples_are_shown_to_the_teacher_only(tmp_path: Path) -> None:
    write_data("sarcasm", tmp_path / "data", pictures=True)
    asked: list[str] = []

    def answer(request: ChatRequest) -> str:
        asked.append(request.text)
        return f'"Verdict": {label_of("sarcasm", request.text.rpartition("The post to answer:")[2])}'

    with Server(answer=answer) as server:
        recipe = load("sarcasm", tmp_path, server.url)
        with pytest.raises(Exception, match="annotate: none of the 16 posts has a valid rationale"):
            run(recipe, until="annotate")
    for text in asked:
        shown, _, post = text.rpartition("The post to answer:\n")
        own = re.search(r'Post: "(.*)"', post)
        examples = re.findall(r'Post: "(.*)"\n"Verdict": (\w+)', shown)
        assert own and own[1] not in [example for example, _ in examples]
        assert len(examples) in (3, 4) and {label for _, label in examples} == {"sarcastic", "sincere"}
        assert all(label_of("sarcasm", example) == label for example, label in examples)
    assert {len(re.findall('"Verdict": s', text)) for text in asked} == {3, 4}
