"""One call of a run's verifier function on the first row of its task, before anything expensive starts."""

from actors.verifier.pool import VerifierError, pool_of
from common.config import Config, ConfigError
from common.tasks import default_verifier, verifier_function
from common.types import AnswerForm, Prompt, Verdict


def needs_trial(config: Config) -> bool:
    """Whether the verifier is not as the task brings it: it may not suit the task's rows."""
    settings = config.verifier
    is_other = verifier_function(config) != default_verifier(config.task)
    return is_other or settings.answer_form is not AnswerForm.EXACT


async def try_verifier(config: Config, prompt: Prompt) -> None:
    """Judges the row's reference as a response to it. Whatever the verdict is: that there is one is what counts.

    Raises ConfigError when the function cannot be loaded, raises, returns what is no judgement, or takes too long.
    """
    settings = config.verifier
    try:
        async with pool_of(config, num_workers=1, is_quiet=True) as pool:
            judgement = await pool.judge(prompt.reference, prompt.reference, prompt.row)
    except VerifierError as error:
        raise ConfigError(str(error)) from error
    problem = None
    if judgement.verdict is Verdict.ERROR:
        problem = f"{judgement.error}"
    elif judgement.verdict is Verdict.TIMED_OUT:
        problem = (
            f"came to no end within verifier.timeout_s={settings.timeout_s:g} s and "
            f"verifier.memory_mb={settings.memory_mb} of address space"
        )
    if problem is not None:
        raise ConfigError(f"verifier.function={pool.function} {problem}, on the first row ({prompt.uid})")
