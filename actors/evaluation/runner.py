"""Samples and judges the prompts of an evaluation, so many at once that the engine is never short of work.

One engine, in this process, and not several that share a queue: an engine fills its GPUs by itself, as many as
actors.tensor_parallel_size says; its death is then the end of the call, which the next one makes good; and whoever has
more GPUs gives each a part of the prompts and a folder.
"""

import asyncio
import math
from collections.abc import Iterator

from actors.engine import Engine
from actors.evaluation.plan import Plan
from actors.evaluation.transcripts import Response, Transcripts
from actors.evaluation.votes import Equal, answer_reader, votes_of
from actors.rollout import Judged, sample_and_judge
from actors.sampling import EngineError, RequestRefused
from actors.verifier.pool import VerifierPool
from actors.verifier.rewards import reward
from common.config import ConfigError
from common.memory import num_sequences
from common.progress import Progress
from common.seeds import eval_seed
from common.tasks import verifier_function
from common.types import Lease, Prompt, Purpose, Verdict

LOOK_S = 1.0  # between two looks at whether the engine draws tokens


class Runner:
    """Call `run` once. Afterwards `refused` has the prompts that the engine did not sample, with its reasons."""

    def __init__(
        self, plan: Plan, engine: Engine, verifier: VerifierPool, is_equal: Equal, transcripts: Transcripts
    ) -> None:
        self._plan, self._config = plan, plan.config
        self._engine, self._verifier, self._is_equal = engine, verifier, is_equal
        self._transcripts = transcripts
        self._read_answer = answer_reader(verifier_function(plan.config))
        self._num_errors = 0
        self.refused: dict[str, str] = {}

    async def run(self, progress: Progress | None) -> None:
        """Everything that is not done yet.

        Raises EngineError when the engine dies or stands still, ConfigError when the verifier fails on more responses
        than verifier.max_error_share allows.
        """
        waiting = iter([p for p in enumerate(self._plan.prompts) if p[1].uid not in self._transcripts.done])
        width = 1 + math.ceil(num_sequences(self._config) / self._plan.num_samples)
        working = {asyncio.create_task(self._work(waiting, progress)) for _ in range(width)}
        watching = asyncio.create_task(self._watch())
        tasks = [*working, watching]
        try:
            while working:
                ended, _ = await asyncio.wait({*working, watching}, return_when=asyncio.FIRST_COMPLETED)
                for finished in ended:
                    finished.result()
                working -= ended
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, waiting: Iterator[tuple[int, Prompt]], progress: Progress | None) -> None:
        """One prompt after another from the queue that all share."""
        for number, prompt in waiting:
            try:
                judged = await sample_and_judge(self._lease(number, prompt), self._engine, self._verifier)
            except RequestRefused as error:
                self.refused[prompt.uid] = str(error)
            else:
                self._check_verifier(judged)
                self._transcripts.append(await self._responses(prompt, judged))
            if progress is not None:
                progress.update(len(self._transcripts.done) + len(self.refused))

    async def _watch(self) -> None:
        """Raises EngineError when the engine has requests and draws no token for twice transport.lease_timeout_s, after
        which a learner dismisses it."""
        limit_s = 2 * self._config.transport.lease_timeout_s
        num_tokens, busy_s = -1, 0.0
        while True:
            if (drawn := self._engine.generated_tokens) != num_tokens:
                num_tokens, busy_s = drawn, self._engine.busy_s
            elif self._engine.busy_s - busy_s > limit_s:
                raise EngineError(f"the engine has drawn no token for {limit_s:g} s (transport.lease_timeout_s)")
            await asyncio.sleep(LOOK_S)

    def _lease(self, number: int, prompt: Prompt) -> Lease:
        """As the learner leases an evaluation, so that both draw the same responses from the same weights."""
        config = self._config
        return Lease(
            lease_id=number,
            purpose=Purpose.EVAL,
            prompt_uid=prompt.uid,
            prompt_token_ids=self._plan.data.token_ids(prompt),
            reference=prompt.reference,
            row=prompt.row,
            num_samples=self._plan.num_samples,
            seed=eval_seed(config.seed, prompt.uid),
            temperature=config.eval.temperature,
            max_tokens=config.rollout.max_tokens,
            stop=tuple(config.rollout.stop),
            top_p=config.eval.top_p,
            top_k=config.eval.top_k,
        )

    async def _responses(self, prompt: Prompt, judged: Judged) -> list[Response]:
        answers = [None if self._read_answer is None else self._read_answer(text) for text in judged.texts]
        verdicts = [judgement.verdict for judgement in judged.judgements]
        votes = await votes_of(answers, verdicts, self._is_equal)
        text = self._engine.decode(self._plan.data.token_ids(prompt))
        config = self._config
        return [
            Response(
                prompt_uid=prompt.uid,
                index=index,
                prompt=text,
                response=judged.texts[index],
                reference=prompt.reference,
                verdict=judgement.verdict,
                reason=completion.finish_reason,
                reward=reward(judgement, len(completion), config.rollout.max_tokens, config.reward),
                length=len(completion),
                answer=answers[index],
                vote=None if self._read_answer is None else votes[index],
            )
            for index, (completion, judgement) in enumerate(zip(judged.completions, judged.judgements, strict=True))
        ]

    def _check_verifier(self, judged: Judged) -> None:
        errors = [judgement.error for judgement in judged.judgements if judgement.verdict is Verdict.ERROR]
        self._num_errors += len(errors)
        share, of = self._config.verifier.max_error_share, len(self._plan.prompts) * self._plan.num_samples
        if self._num_errors > share * of:
            raise ConfigError(
                f"verifier.function={verifier_function(self._config)} failed on {self._num_errors} responses (it "
                f"{errors[-1]}), more than verifier.max_error_share={share:g} of {of}: correct the function"
            )
