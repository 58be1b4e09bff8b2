"""Which answer is tried again first."""

from hypothesis import given
from hypothesis import strategies as st

from actors.verifier.handle import Answer
from actors.verifier.retries import Retries

spent = st.lists(st.sampled_from([0.001, 0.002, 0.004]), max_size=30)


def answers(spent_s: list[float]) -> list[Answer]:
    return [Answer(b"%d" % k, b"", started_s=float(k), spent_s=s) for k, s in enumerate(spent_s)]


@given(spent)
def test_those_that_have_had_least_come_first_and_of_equals_the_one_that_waited_longest(spent_s: list[float]) -> None:
    retries, given_back = Retries(), answers(spent_s)
    for answer in given_back:
        retries.push(answer)
    popped = [retries.pop() for _ in range(len(retries))]
    assert popped == sorted(given_back, key=lambda answer: answer.spent_s)  # sorted keeps the order of equals


@given(spent, st.integers(min_value=0, max_value=30))
def test_each_answer_is_either_expired_or_tried_again(spent_s: list[float], moment: int) -> None:
    retries = Retries()
    for answer in answers(spent_s):
        retries.push(answer)
    expired = retries.started_before(float(moment))
    rest = [retries.pop() for _ in range(len(retries))]
    assert sorted(int(answer.id) for answer in expired) == list(range(min(moment, len(spent_s))))
    assert [answer.spent_s for answer in rest] == sorted(answer.spent_s for answer in rest)
    assert len(expired) + len(rest) == len(spent_s)
