"""The scores of an evaluation: over all prompts, by length of the response, by a column of the data; text and JSON.

A prompt that was not sampled counts as wrong, and so does a response on which the verifier failed: scores over what is
left would be of other prompts each time, and higher.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from actors.evaluation.plan import Plan, column_of
from actors.evaluation.transcripts import Response
from actors.evaluation.votes import answer_reader
from common.samples import visible
from common.scores import ABSTAINS, Estimate, clusters, estimate, majority, pass_at, powers_up_to, quantile_edges
from common.tasks import verifier_function
from common.tasks.rows import counts
from common.types import JSON, FinishReason, Prompt

NUM_BINS = 5  # of response length
LABEL = 12  # columns
MOST_OF_VALUE = 40  # characters of what a column has
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of P prompts with K responses each; every one with its interval over prompts."""

    num_prompts: int
    avg: Estimate  # avg@K
    passes: dict[int, Estimate]  # k -> pass@k
    maj: Estimate | None  # maj@K; None where the verifier does not say which answers it has read


@dataclass(frozen=True, kw_only=True)
class LengthBin:
    """The responses of `shortest` to `longest` tokens."""

    shortest: int
    longest: int
    num_responses: int
    accuracy: Estimate


@dataclass(frozen=True, kw_only=True)
class Report:
    plan: Plan
    scores: Scores
    by_length: tuple[LengthBin, ...]
    by_column: dict[str, dict[str, Scores]]  # column -> value -> of its prompts
    verdicts: dict[str, int]  # of the responses that were sampled
    length_mean: float | None  # tokens
    truncated_fraction: float | None
    refused: dict[str, str]  # uid of each prompt that was not sampled -> why


def report(plan: Plan, done: dict[str, list[Response]], refused: dict[str, str], columns: Sequence[str]) -> Report:
    """Raises KeyError for a prompt that is neither done nor refused."""
    responses = [response for prompt in plan.prompts if prompt.uid in done for response in done[prompt.uid]]
    by_column = {column: _by_value(plan, done, column) for column in columns}
    num_responses = len(responses)
    truncated = sum(response.reason is FinishReason.LENGTH for response in responses)
    return Report(
        plan=plan,
        scores=_scores(plan, done, plan.prompts),
        by_length=_by_length(plan, responses),
        by_column=by_column,
        verdicts={str(verdict): n for verdict, n in Counter(r.verdict for r in responses).most_common()},
        length_mean=sum(response.length for response in responses) / num_responses if responses else None,
        truncated_fraction=truncated / num_responses if responses else None,
        refused={prompt.uid: refused[prompt.uid] for prompt in plan.prompts if prompt.uid not in done},
    )


def _scores(plan: Plan, done: dict[str, list[Response]], prompts: Sequence[Prompt]) -> Scores:
    shape = (len(prompts), plan.num_samples)
    is_correct, votes = np.zeros(shape, dtype=bool), np.full(shape, ABSTAINS, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        for column, response in enumerate(done.get(prompt.uid, ())):
            is_correct[row, column] = response.is_correct
            votes[row, column] = ABSTAINS if response.vote is None else response.vote
    num_correct, num_samples = is_correct.sum(axis=1), plan.num_samples
    cluster = clusters(prompts)

    def over_prompts(scores: Array) -> Estimate:
        return estimate(np.bincount(cluster, scores * num_samples), np.bincount(cluster) * num_samples)

    return Scores(
        num_prompts=len(prompts),
        avg=over_prompts(num_correct / num_samples),
        passes={k: over_prompts(pass_at(num_correct, num_samples, k)) for k in powers_up_to(num_samples)},
        maj=over_prompts(majority(votes, is_correct)) if _has_votes(plan) else None,
    )


def _has_votes(plan: Plan) -> bool:
    return answer_reader(verifier_function(plan.config)) is not None


def _by_value(plan: Plan, done: dict[str, list[Response]], column: str) -> dict[str, Scores]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in plan.prompts:
        groups.setdefault(column_of(prompt, column), []).append(prompt)
    return {value: _scores(plan, done, groups[value]) for value in sorted(groups, key=_in_order)}


def _in_order(value: str) -> tuple[float, str]:
    """Numbers by size, then words."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _by_length(plan: Plan, responses: Sequence[Response]) -> tuple[LengthBin, ...]:
    if not responses:
        return ()
    lengths = np.array([response.length for response in responses])
    edges = quantile_edges(lengths.tolist(), NUM_BINS)
    places = np.searchsorted(edges, lengths)
    prompts = {prompt.uid: prompt for prompt in plan.prompts}
    cluster = clusters([prompts[response.prompt_uid] for response in responses])
    is_correct = np.array([response.is_correct for response in responses])
    return tuple(_bin(lengths, is_correct, cluster, places == place) for place in range(len(edges)))


def _bin(lengths: Array, is_correct: Array, cluster: Array, is_in: Array) -> LengthBin:
    total = np.bincount(cluster[is_in], weights=is_correct[is_in])
    count = np.bincount(cluster[is_in])
    return LengthBin(
        shortest=int(lengths[is_in].min()),
        longest=int(lengths[is_in].max()),
        num_responses=int(is_in.sum()),
        accuracy=estimate(total[count > 0], count[count > 0]),
    )


def as_json(found: Report) -> dict[str, JSON]:
    plan = found.plan
    return {
        "model": plan.source,
        "settings": plan.settings,
        "num_samples": plan.num_samples,
        **_scores_as_json(found.scores),
        "by_length": [asdict(one) for one in found.by_length],
        "by_column": {
            column: {value: _scores_as_json(scores) for value, scores in values.items()}
            for column, values in found.by_column.items()
        },
        "verdicts": found.verdicts,
        "length_mean": found.length_mean,
        "truncated_fraction": found.truncated_fraction,
        "refused": found.refused,
        "left_out": [asdict(problem) for problem in plan.data.task.problems],
    }


def _scores_as_json(scores: Scores) -> dict[str, JSON]:
    return {
        "num_prompts": scores.num_prompts,
        "avg": asdict(scores.avg),
        "pass": {str(k): asdict(found) for k, found in scores.passes.items()},
        "maj": None if scores.maj is None else asdict(scores.maj),
    }


def render(found: Report) -> str:
    """The table, one fact a line."""
    plan, scores, k = found.plan, found.scores, found.plan.num_samples
    lines = [
        ("model", plan.source),
        ("data", _data_text(plan)),
        ("sampling", _sampling_text(plan)),
        (f"avg@{k}", _text(scores.avg)),
        *((f"pass@{tries}", _text(value)) for tries, value in scores.passes.items()),
        (f"maj@{k}", _maj_text(plan, scores)),
        ("verdicts", ", ".join(f"{verdict} {number}" for verdict, number in found.verdicts.items()) or "none"),
        ("length", _length_text(found)),
    ]
    for title, rows in _tables(found):
        lines += [("", ""), (title, "")] + [("", row) for row in rows]
    if plan.data.task.problems:
        first = plan.data.task.problems[0]
        lines.append(("left out", f"{counts(plan.data.task.problems)}, first {first.place}: {first.text}"))
    return "\n".join(f"{label:<{LABEL}}{text}".rstrip() for label, text in lines)


def _tables(found: Report) -> list[tuple[str, list[str]]]:
    k = found.plan.num_samples
    lengths = [
        f"{f'{one.shortest:,} to {one.longest:,} tokens':<26}{one.num_responses:>9,} responses  {_text(one.accuracy)}"
        for one in found.by_length
    ]
    tables = [("accuracy by length of the response", lengths)]
    for column, values in found.by_column.items():
        rows = []
        for value, scores in values.items():
            parts = {f"avg@{k}": scores.avg, f"pass@{k}": scores.passes[k], f"maj@{k}": scores.maj}
            shown = "  ".join(f"{name} {_text(part)}" for name, part in parts.items() if part is not None)
            rows.append(f"{_cell(value):<20}{scores.num_prompts:>7,} prompts  {shown}")
        tables.append((f"by {column}", rows))
    return tables


def _cell(value: str) -> str:
    """What a column of the data has, as far as there is room, and nothing that a terminal would obey."""
    shown = visible(value).replace("\n", "\\n")
    return shown if len(shown) <= MOST_OF_VALUE else f"{shown[: MOST_OF_VALUE - 3]}..."


def _data_text(plan: Plan) -> str:
    name = ", ".join(str(file.path) for file in plan.data.task.files) or f"held-out set of {plan.data.task.name}"
    distinct = len(np.unique(clusters(plan.prompts)))
    repeated = f" ({distinct:,} different ones)" if distinct < len(plan.prompts) else ""
    return f"{name}: {len(plan.prompts):,} prompts{repeated} x {plan.num_samples} responses"


def _sampling_text(plan: Plan) -> str:
    evaluation, limit = plan.config.eval, plan.config.rollout.max_tokens
    parts = ["greedy" if evaluation.temperature == 0 else f"temperature {evaluation.temperature:g}"]
    parts += [f"top-p {evaluation.top_p:g}"] if evaluation.top_p < 1 else []
    parts += [f"top-k {evaluation.top_k}"] if evaluation.top_k else []
    return ", ".join([*parts, f"at most {limit:,} tokens", f"seed {plan.config.seed}"])


def _maj_text(plan: Plan, scores: Scores) -> str:
    if scores.maj is None:
        return f"not known: {verifier_function(plan.config)} does not say which answer it has read"
    return _text(scores.maj)


def _length_text(found: Report) -> str:
    if found.length_mean is None or found.truncated_fraction is None:
        return "no response"
    return f"mean {found.length_mean:,.0f} tokens, {found.truncated_fraction:.1%} truncated"


def _text(value: Estimate) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
