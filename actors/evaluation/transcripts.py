"""What an evaluation has sampled, in its folder, so that a second call of the same one goes on where the first ended.

    OUT/settings.json        what all its parts have in common
    OUT/transcripts.jsonl    one line a response, all responses to a prompt at once, flushed

Names of columns are those of RUN/samples, where they mean the same.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import ConfigError
from common.metrics import read_jsonl
from common.runlock import held
from common.types import JSON, FinishReason, Verdict

SETTINGS, TRANSCRIPTS, LOCK = "settings.json", "transcripts.jsonl", ".lock"


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response. `vote` is common/scores.py's: equal for equal answers to one prompt."""

    prompt_uid: str
    index: int  # among the responses to its prompt
    prompt: str  # as the model got it
    reference: str  # what the verifier compared with
    response: str  # as the verifier saw it
    verdict: Verdict
    reason: FinishReason
    reward: float
    length: int  # tokens
    answer: str | None  # that the verifier read; None: none, or it does not say
    vote: int | None  # None: it does not say

    @property
    def is_correct(self) -> bool:
        return self.verdict is Verdict.CORRECT


class Transcripts:
    """The transcripts of one evaluation, open for appending by one process.

    `done` maps the uid of each prompt that needs nothing more to its responses in order.
    """

    def __init__(self, folder: Path, uids: Collection[str], num_samples: int) -> None:
        self.path = folder / TRANSCRIPTS
        self.done = _complete(self.path, uids, num_samples)
        # Only whole prompts stay: a line that was cut off would spoil the next one.
        replacement = self.path.with_suffix(".tmp")
        replacement.write_text("".join(map(_lines, self.done.values())), encoding="utf-8")
        replacement.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, responses: Sequence[Response]) -> None:
        """All responses to one prompt, in order. Where the verifier failed on one, a second call samples them again."""
        self.done[responses[0].prompt_uid] = list(responses)
        self._file.write(_lines(responses))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def transcripts(
    folder: Path, settings: dict[str, JSON], uids: Collection[str], num_samples: int
) -> Iterator[Transcripts]:
    """Those in `folder`, which is made. Raises ConfigError when it is not that of an evaluation with `settings`, or
    when another process writes there."""
    _refuse_others(folder, settings)
    with held(folder / LOCK, folder, use="is being written now by", way_out="choose another --out"):
        if not (folder / SETTINGS).is_file():
            temporary = folder / f"{SETTINGS}.tmp"
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
            temporary.replace(folder / SETTINGS)
        opened = Transcripts(folder, uids, num_samples)
        try:
            yield opened
        finally:
            opened.close()


def _refuse_others(folder: Path, settings: dict[str, JSON]) -> None:
    if not (folder / SETTINGS).is_file():
        if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {LOCK}):
            raise ConfigError(f"{folder} is not empty and holds no evaluation: choose another --out")
        return
    try:
        there: dict[str, JSON] = json.loads((folder / SETTINGS).read_text())
    except ValueError as error:
        raise ConfigError(f"{folder / SETTINGS} is not readable ({error}): choose another --out") from None
    for name, value in settings.items():
        if there.get(name) != value:
            raise ConfigError(
                f"{folder} holds an evaluation with {name}={there.get(name)}, not {value}: choose another --out"
            )


def _complete(path: Path, uids: Collection[str], num_samples: int) -> dict[str, list[Response]]:
    found: defaultdict[str, list[Response]] = defaultdict(list)
    try:
        for row in read_jsonl(path) if path.is_file() else ():
            response = _response(row)
            found[response.prompt_uid].append(response)
    except (ValueError, TypeError, KeyError) as error:  # a line that we have not written
        raise ConfigError(f"{path} is damaged ({error}): choose another --out, or remove that line") from error
    return {
        uid: responses
        for uid, responses in found.items()
        if uid in uids
        and [response.index for response in responses] == list(range(num_samples))
        and not any(response.verdict is Verdict.ERROR for response in responses)
    }


def _response(row: dict[str, JSON]) -> Response:
    return Response(**row | {"verdict": Verdict(row["verdict"]), "reason": FinishReason(row["reason"])})


def _lines(responses: Iterable[Response]) -> str:
    return "".join(json.dumps(asdict(response)) + "\n" for response in responses)
