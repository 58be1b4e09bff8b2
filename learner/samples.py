"""What a run keeps of its responses: a few groups a step, with their texts and all that training made of each token.

choose      which groups of a batch: half of them from those that are neither all right nor all wrong
observe     their tokens' streams, when the trainer has estimated them
thin out    steps that make room where RUN/samples would outgrow samples.max_mb
write       RUN/samples/step-000012.parquet (common/samples.py), and now and then a group to TensorBoard
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from common.config import Config
from common.metrics import RunLog
from common.samples import Sample, sample_file, sampled_steps, samples_folder, to_parquet, visible
from common.tasks.tokenizing import load_tokenizer
from common.types import Float32Array, TrajectoryGroup, Verdict
from learner.algorithm.experience import Experience
from learner.detokenizing import Decode, token_texts
from learner.files import replace_synced

logger = logging.getLogger(__name__)

MEGABYTE = 1_000_000
STREAMS = ("old_logprobs", "advantages", "values")  # of Sample; Experience has each as NAME_T, or None
SHOWN_EVERY = 10  # sampled steps between two of which TensorBoard gets a group
SHOWN_RESPONSES, SHOWN_CHARACTERS = 4, 2000  # of that group, and of each of its responses

Observe = Callable[[Experience], None]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A chosen group, and by name the streams of STREAMS that the step computed, (T,) of its tokens."""

    group: TrajectoryGroup
    streams: dict[str, Float32Array]


class SampleWriter:
    """Keeps the samples of one run; the one writer is the learner's rank 0.

    The training loop only copies the chosen tokens' streams. A thread decodes and writes, one step at a time; what it
    fails with is raised at the next sampled step, or at the end: a full disk ends the run with one sentence.
    """

    def __init__(self, config: Config, log: RunLog) -> None:
        self._config = config
        self._log = log
        files = {step: sample_file(config.run_dir, step) for step in sampled_steps(config.run_dir)}
        self._sizes = {step: file.stat().st_size for step, file in files.items()}
        tokenizer = load_tokenizer(config.model)
        self._decode: Decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._thread = ThreadPoolExecutor(1, "samples")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def observer(self, step: int, version: int, groups: Sequence[TrajectoryGroup]) -> Observe | None:
        """What is to be shown the experience of these groups, in this order, if `step`, counted from 1, is sampled."""
        settings = self._config.samples
        if (step - 1) % settings.every:
            return None
        chosen = choose(groups, settings.groups, (self._config.seed, step))
        return partial(self._observe, step, version, groups, chosen)

    def wait(self) -> None:
        """Returns when no file is being written; raises what the last one raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _observe(
        self, step: int, version: int, groups: Sequence[TrajectoryGroup], chosen: Sequence[int], experience: Experience
    ) -> None:
        ends = list(accumulate((len(group.completed.token_ids) for group in groups), initial=0))
        streams_T = {name: getattr(experience, f"{name}_T") for name in STREAMS}
        observed = [
            Observed(
                group=groups[i],
                streams={
                    name: x_T[ends[i] : ends[i + 1]].cpu().numpy() for name, x_T in streams_T.items() if x_T is not None
                },
            )
            for i in chosen
        ]
        self.wait()
        self._pending = self._thread.submit(self._keep, step, version, observed)

    def _keep(self, step: int, version: int, observed: Sequence[Observed]) -> None:
        """In the thread."""
        groups = [as_samples(self._decode, step, version, one) for one in observed]
        content = to_parquet([sample for group in groups for sample in group])
        if (step - 1) // self._config.samples.every % SHOWN_EVERY == 0:
            self._log.text(step, "samples/group", as_markdown(groups[0]))
        limit = self._config.samples.max_mb * MEGABYTE
        if len(content) > limit:
            logger.warning(
                "step %d has %d bytes of samples, more than samples.max_mb=%d for all steps, and keeps none: raise it, "
                "or lower samples.groups=%d",
                step,
                len(content),
                self._config.samples.max_mb,
                self._config.samples.groups,
            )
            return
        self._make_room(step, len(content), limit)
        file = sample_file(self._config.run_dir, step)
        file.parent.mkdir(exist_ok=True)
        replace_synced(file, content)

    def _make_room(self, step: int, size: int, limit: int) -> None:
        """Before the new file is written, so that they are within the limit at all times."""
        self._sizes[step] = size
        for other in thin_out(self._sizes, limit):
            sample_file(self._config.run_dir, other).unlink(missing_ok=True)
            del self._sizes[other]


def forget_samples_after(run_dir: Path, step: int) -> None:
    """Removes the samples of steps after `step`, which are about to be done again, sampled or not, and half files."""
    for later in sampled_steps(run_dir):
        if later > step:
            sample_file(run_dir, later).unlink()
    for leftover in samples_folder(run_dir).glob("*.tmp"):
        leftover.unlink()


def choose(groups: Sequence[TrajectoryGroup], num: int, seed: Sequence[int]) -> list[int]:
    """Indices of `num` groups, or of all if there are fewer; random, and the same for the same seed.

    Half of them, rounded up, are of those with right and other responses, as far as there are, because what is
    learned from a group is the difference. They come first. The rest may be any, so that nothing is never seen.
    """
    order: list[int] = np.random.default_rng(seed).permutation(len(groups)).tolist()
    mixed = [i for i in order if len({verdict is Verdict.CORRECT for verdict in groups[i].completed.verdicts}) == 2]
    first = mixed[: (num + 1) // 2]
    rest = [i for i in order if i not in first]
    return [*first, *rest[: num - len(first)]]


def thin_out(sizes: Mapping[int, int], limit: int) -> list[int]:
    """Which of the steps have to go so that the sizes of the others add up to `limit` at most; in the order of going.

    One at a time the step goes whose two neighbours are closest to each other, of several the oldest; the first and
    the last go, in this order, when nothing else is left. So the whole run stays represented: with files of equal size
    no two neighbours are further apart than twice the mean, or than they were written.
    """
    kept, total = sorted(sizes), sum(sizes.values())
    removed = []
    while kept and total > limit:
        gaps = [after - before for before, after in zip(kept, kept[2:], strict=False)]
        step = kept.pop(gaps.index(min(gaps)) + 1 if gaps else 0)
        total -= sizes[step]
        removed.append(step)
    return removed


def as_samples(decode: Decode, step: int, version: int, observed: Observed) -> list[Sample]:
    """One for each response of a group, in order."""
    lease, done = observed.group.lease, observed.group.completed
    prompt = decode(lease.prompt_token_ids.tolist())
    spans = pairwise(accumulate(done.lengths.tolist(), initial=0))
    samples = []
    for index, (start, end) in enumerate(spans):
        token_ids = done.token_ids[start:end].tolist()
        tokens = token_texts(decode, token_ids)
        absent: dict[str, tuple[float, ...]] = dict.fromkeys(STREAMS, ())
        computed = {name: tuple(x_T[start:end].tolist()) for name, x_T in observed.streams.items()}
        samples.append(
            Sample(
                step=step,
                prompt_uid=lease.prompt_uid,
                lease_id=lease.lease_id,
                actor=observed.group.actor,
                index=index,
                prompt=prompt,
                reference=lease.reference,
                response="".join(tokens),
                verdict=done.verdicts[index],
                reason=done.finish_reasons[index],
                reward=done.rewards[index].item(),
                version=version,
                token_ids=tuple(token_ids),
                tokens=tuple(tokens),
                versions=tuple(done.versions[start:end].tolist()),
                behavior_logprobs=tuple(done.behavior_logprobs[start:end].tolist()),
                **absent | computed,
            )
        )
    return samples


def as_markdown(group: Sequence[Sample]) -> str:
    """The beginnings of some of the best and worst responses. Text is indented: code, and nothing else of Markdown."""
    parts = [f"`{_line(group[0].prompt_uid)}`, reference `{_line(group[0].reference)}`", _code(group[0].prompt)]
    by_reward = sorted(group, key=lambda sample: -sample.reward)
    num_best = min(len(group), SHOWN_RESPONSES) // 2
    num_worst = min(len(group), SHOWN_RESPONSES) - num_best
    for sample in [*by_reward[:num_best], *by_reward[-num_worst:]]:
        about = f"{sample.verdict}, {sample.reason}, reward {sample.reward:+.2f}, {len(sample.tokens)} tokens"
        parts += [f"**{about}**", _code(sample.response)]
    return "\n\n".join(parts)


def _line(text: str) -> str:
    return visible(text).replace("\n", " ").replace("`", "'")


def _code(text: str) -> str:
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
    return "\n".join(f"    {line}" for line in visible(cut).split("\n"))
