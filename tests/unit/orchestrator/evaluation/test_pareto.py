from bim.orchestrator.evaluation.pareto import pareto_front


def test_a_point_that_another_beats_in_cost_and_value_is_not_on_the_front() -> None:
    assert pareto_front([3.0, 1.0, 2.0, 2.0], [0.9, 0.5, 0.4, 0.8]) == [1, 3, 0]


def test_of_points_with_the_same_value_the_cheapest_is_on_the_front() -> None:
    assert pareto_front([2.0, 1.0], [0.5, 0.5]) == [1]


def test_of_points_with_the_same_cost_the_better_and_of_equal_points_the_first_is_on_the_front() -> None:
    assert pareto_front([1.0, 1.0, 1.0], [0.5, 0.7, 0.7]) == [1]


def test_without_points_the_front_is_empty() -> None:
    assert pareto_front([], []) == []
