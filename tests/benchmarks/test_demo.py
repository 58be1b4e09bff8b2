"""How the demo's runs are judged: the fall below the best evaluation so far, in the last third only."""

import pytest

from benchmarks.demo import largest_fall

CURVES = (
    ([(0, 0.25), (16, 0.6), (32, 0.9), (48, 0.88)], 0.02),
    ([(0, 0.45), (16, 0.4), (32, 0.855), (48, 0.744)], 0.111),  # a run that sags
    ([(0, 0.9), (10, 0.2), (20, 0.95), (30, 0.95)], 0.0),  # a fall before the last third does not count
    ([(0, 0.9), (30, 0.5)], 0.4),
)


@pytest.mark.parametrize(("points", "fall"), CURVES)
def test_a_fall_is_counted_from_the_best_evaluation_so_far(points: list[tuple[int, float]], fall: float) -> None:
    assert largest_fall(points) == pytest.approx(fall)
