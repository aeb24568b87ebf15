"""Costs, answers, and selecting and concatenating label scores."""

import numpy as np

from distill.models.reasoner import Answer, ClassScores, Cost


def test_costs_add_up_and_the_default_cost_is_zero() -> None:
    costs = [Cost(1, 100, 10, 0.5), Cost(2, 30, 4, 0.25)]
    assert sum(costs, Cost()) == Cost(3, 130, 14, 0.75)
    assert costs[0] + Cost() == costs[0]


def test_an_answer_has_a_cost_and_its_seconds_do_not_affect_equality() -> None:
    answer = Answer("words", True, 100, 10, calls=5, seconds=0.5)
    assert answer.cost == Cost(5, 100, 10, 0.5)
    slower = Answer("words", True, 100, 10, calls=5, seconds=3.0)
    assert slower == answer and slower.cost != answer.cost
    assert Answer("words", False, 100, 10, calls=5) != answer


def test_select_keeps_rows_masses_and_costs_aligned() -> None:
    probabilities = np.array([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])
    costs = (Cost(1, 10), Cost(1, 20), Cost(1, 30))
    scores = ClassScores(probabilities, np.array([0.9, 0.8, 0.7]), costs)
    kept = scores.select(np.array([True, False, True]))
    assert kept.probabilities.tolist() == [[0.7, 0.3], [0.5, 0.5]]
    assert kept.label_mass.tolist() == [0.9, 0.7]
    assert kept.costs == (Cost(1, 10), Cost(1, 30))
    none = scores.select(np.zeros(3, dtype=bool))
    assert none.probabilities.shape == (0, 2) and none.costs == ()
    uncounted = ClassScores(probabilities, scores.label_mass)
    assert uncounted.select(np.array([False, True, True])).costs == ()


def test_concatenating_single_rows_restores_the_scores() -> None:
    scores = ClassScores(np.eye(3), np.array([0.9, 0.8, 0.7]), (Cost(1, 10), Cost(1, 20), Cost(1, 30)))
    again = ClassScores.concatenate([scores.row(index) for index in (0, 1, 2)])
    assert again.probabilities.tolist() == scores.probabilities.tolist() and again.costs == scores.costs
    assert again.label_mass.tolist() == scores.label_mass.tolist()
    uncounted = ClassScores(np.eye(2), np.ones(2))
    assert uncounted.row(1).probabilities.tolist() == [[0.0, 1.0]] and uncounted.row(1).costs == ()


def test_a_sample_is_unanswered_only_if_its_mass_is_exactly_zero() -> None:
    mass = np.array([0.0, 1e-30, 1.0, np.nan])  # NaN: the model does not return its mass
    scores = ClassScores(np.full((4, 2), 0.5), mass)
    assert scores.answered.tolist() == [False, True, True, True]
