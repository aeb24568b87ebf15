"""Rewards of generated rationales, on cases written by hand."""

import pytest

from distill.errors import SettingsError
from distill.task.labels import LabelSpace
from distill.task.rationale import Rationale, render
from distill.training.rewards import Answered, RewardSettings, rewards

LABELS = LabelSpace()
SUNNY = Answered("What a day.", "positive", "positive", {"tone": "cheerful", "face": "smiling"})


def rationale(prediction: str, words: str = "cheerful", picture: str = "A smiling face.") -> str:
    return render(Rationale((f"The words sound {words}.", picture, "They agree.", f"It is {prediction}."), prediction))


def reward(answer: str, post: Answered = SUNNY, *, finished: bool = True) -> list[float | None]:
    found = rewards([answer], [finished], [post], LABELS)
    return [found[name][0] for name in ("format", "label", "consistency", "grounded")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (rationale("positive"), [1, 1, 1, 1]),
        (rationale("negative"), [1, 0, 0, 1]),
        (rationale("positive", words="gloomy"), [1, 1, 1, 0.5]),
        (rationale("positive", words="gloomy", picture="A frowning face."), [1, 1, 1, 0]),
        (rationale("positive", words="cheerfully", picture="Unsmiling."), [1, 1, 1, 0]),  # other words
        (rationale("positive").replace("Prediction", "Sentiment"), [0, 0, 0, 0]),
        (rationale("positive").replace("positive", "splendid"), [0, 0, 0, 0]),
        ('"Prediction": positive', [0, 0, 0, 0]),
        ("", [0, 0, 0, 0]),
        (rationale("positive", words="cheerful; the given label is right"), [0, 0, 0, 0]),
    ],
)
def test_each_reward_is_that_of_the_evaluation(answer: str, expected: list[float]) -> None:
    assert reward(answer) == expected


def test_an_answer_that_the_token_limit_cut_has_no_reward() -> None:
    assert reward(rationale("positive"), finished=False) == [0, 0, 0, 0]


def test_consistency_compares_with_the_label_of_label_scoring_not_with_the_right_one() -> None:
    unsure = SUNNY._replace(classified="negative")
    assert reward(rationale("positive"), unsure) == [1, 1, 0, 1]
    assert reward(rationale("negative"), unsure) == [1, 0, 1, 1]


def test_what_is_not_known_of_a_post_is_no_reward() -> None:
    bare = SUNNY._replace(label=None, attributes={})
    assert reward(rationale("positive"), bare) == [1, None, 1, None]
    assert reward("nonsense", bare) == [0, None, 0, None]


def test_answers_keep_their_order() -> None:
    found = rewards(["no", rationale("positive")], [True, True], [SUNNY, SUNNY], LABELS)
    assert found["format"] == [0, 1]


def test_the_weights() -> None:
    assert RewardSettings().weights == {"format": 1.0, "label": 1.0, "consistency": 1.0, "grounded": 0.0}
    with pytest.raises(SettingsError, match="are all 0"):
        RewardSettings(0, 0, 0, 0)
    with pytest.raises(SettingsError, match="label is -1"):
        RewardSettings(label=-1)
