"""One call of a run's verifier function on the first row of its task, before anything expensive starts.

    python -m actors.verifier.trial CONFIG.yaml

Exit code 0, or 2 with one sentence on stderr. `run.py train` runs this in a process of its own, because that loads the
data and, below itself, a user's code.
"""

import asyncio
import sys

from actors.verifier.pool import VerifierError, pool_of
from common.config import Config, ConfigError
from common.loading import read_config
from common.tasks import load_task
from common.types import Prompt, Verdict


async def try_verifier(config: Config, prompt: Prompt) -> None:
    """Judges the row's reference as a response to it. Whatever the verdict is: that there is one is what counts.

    Raises ConfigError when the function cannot be loaded, raises, returns what is no judgement, or takes too long.
    """
    settings = config.verifier
    async with pool_of(config, num_workers=1) as pool:
        judgement = await pool.judge(prompt.reference, prompt.reference, prompt.row)
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


def main(path: str) -> int:
    try:
        config = read_config(path)
        asyncio.run(try_verifier(config, load_task(config.task).train[0]))
    except (ConfigError, VerifierError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
