"""The views of one run, in the order of the questions that they answer."""

from dataclasses import dataclass

from common.report.reading import Run
from common.report.views.accuracy import accuracy
from common.report.views.age import age_budget, age_map, lr_gauge, nats
from common.report.views.correction import distance, lost_advantage, mismatch, ratio_band, sequence_ess, token_ess
from common.report.views.critic import critic
from common.report.views.flow import pace, selection, waste
from common.report.views.view import View


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    views: tuple[View, ...]


def questions(run: Run) -> tuple[Question, ...]:
    return (
        Question(text="Does it learn?", views=(accuracy([("", run)]),)),
        Question(text="Who waits, and what is lost?", views=(pace(run), waste(run), selection(run))),
        Question(text="How old is what it trains on?", views=(age_map(run), age_budget(run), nats(run), lr_gauge(run))),
        Question(
            text="What does age cost?",
            views=(
                mismatch(run),
                ratio_band(run),
                token_ess(run),
                sequence_ess(run),
                distance(run),
                lost_advantage(run),
            ),
        ),
        Question(text="Does the critic help?", views=(critic(run),)),
    )
