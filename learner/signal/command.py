"""The `signal` command: does the critic help here, and with which lambda?

    python run.py signal MODEL_OR_RUN [--pretrain-steps K]

The batches are sampled by a run of its own that trains no policy: the value pretraining of `train`, recorded. Its first
K steps make the critic, when one is asked for; of the others nothing but the responses is used.

    OUT/policy        the policy, as a model folder
    OUT/sampling      that run; OUT/sampling/record has the batches
    OUT/asked.yaml    its configuration as it was asked for
    OUT/signal.json   the table
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from common.config import AdvantageEstimator, Config, ConfigError, Device, DType, SamplesConfig
from common.launcher import EarlierRun, train
from common.loading import config_of_run, load_config, read_config, save_config
from common.processes import Outcome
from common.progress import Progress
from common.validation import validate
from learner.algorithm.packing import Batch
from learner.checkpoint import complete_steps, load_parameters, step_folder
from learner.export import checkpoint_of, with_tying
from learner.export import main as export
from learner.networks.model import Networks, load_networks
from learner.rollouts.record import Record
from learner.signal.estimators import CRITIC, usual
from learner.signal.gradients import gram
from learner.signal.moments import MIN_BATCHES
from learner.signal.table import as_json, render, sentence, table

SEED_OFFSET = 7_919  # other prompts and other random numbers than those that the run's own critic has seen


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line. `files` and `overrides` are those of `train`."""

    model: str  # a run directory, or a model folder
    step: int | None  # of a run's checkpoint; None: the newest
    num_batches: int
    pretrain_steps: int | None  # of a new critic; None: that of the checkpoint, or of model.critic_path
    lambdas: tuple[float, ...]
    out: str | None
    files: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`sampling` is the configuration of the run that samples."""

    config: Config  # its algorithm is the one that is looked at
    sampling: Config
    source: str  # what is looked at, in words
    run: Path | None
    step: int | None  # of the run's checkpoint; None without a run
    num_batches: int
    num_pretrained: int  # steps of value pretraining that come first; 0: none
    lambdas: tuple[float, ...]
    out: Path

    @property
    def num_steps(self) -> int:
        """Of the sampling run."""
        return self.num_pretrained + self.num_batches

    @property
    def has_critic(self) -> bool:
        if self.num_pretrained:
            return True
        has_own = self.run is not None or self.config.model.critic_path is not None
        return has_own and self.config.algorithm.advantage is AdvantageEstimator.gae


def main(request: Request) -> int:
    """Returns the exit code, that of the sampling run if it has failed. Raises ConfigError for a mistake."""
    plan = planned(request)
    outcome = _sample(plan)
    if outcome is not None and outcome.exit_code != 0:
        if outcome.message is not None:
            print(f"error: {outcome.message}", file=sys.stderr)
        return outcome.exit_code
    _measure(plan)
    return 0


def planned(request: Request) -> Plan:
    """Nothing is started or written here. Raises ConfigError for what cannot be measured."""
    _check(request)
    run = Path(request.model) if (Path(request.model) / "config.yaml").is_file() else None
    if run is None and request.step is not None:
        raise ConfigError(f"--step {request.step} is of a run, but {request.model} is no run directory: leave it out")
    own = [str(config_of_run(run))] if run is not None else []
    place = [] if run is not None else [f"model.path={request.model}"]
    free = [*place, "learner.replay=null"]
    config = load_config([*own, *request.files], [*free, *request.overrides])
    if config.actors.count == 0:
        raise ConfigError("actors.count=0: responses are sampled here, so set actors.count=1 or more")
    step = None if run is None else checkpoint_of(run, request.step)[1]
    num_pretrained = request.pretrain_steps or 0
    sampling = _sampling(config, num_pretrained, request.num_batches)
    out = Path(request.out) if request.out is not None else _usual_folder(request, run, step, sampling)
    sampling = replace(sampling, name="sampling", runs_dir=str(out))
    if run is not None:
        sampling = replace(sampling, model=replace(sampling.model, path=str(out / "policy")))
    return Plan(
        config=config,
        sampling=sampling,
        source=request.model if step is None else f"{request.model}, step {step}",
        run=run,
        step=step,
        num_batches=request.num_batches,
        num_pretrained=num_pretrained,
        lambdas=request.lambdas,
        out=out,
    )


def _check(request: Request) -> None:
    if request.num_batches < MIN_BATCHES:
        raise ConfigError(f"--batches {request.num_batches} are too few for an error: give at least {MIN_BATCHES}")
    if request.pretrain_steps is not None and request.pretrain_steps < 1:
        raise ConfigError(f"--pretrain-steps {request.pretrain_steps} must be at least 1")
    for gae_lambda in request.lambdas:
        if not 0.0 <= gae_lambda <= 1.0:
            raise ConfigError(f"--lambda {gae_lambda:g} must be between 0 and 1")


def _sampling(config: Config, num_pretrained: int, num_batches: int) -> Config:
    """Value pretraining alone, every batch recorded as it comes, with nothing that a policy step would need."""
    is_pretraining = num_pretrained > 0
    algorithm = replace(
        config.algorithm,
        advantage=AdvantageEstimator.gae,
        critic_warmup_steps=num_pretrained + num_batches,
        critic_warmup_epochs=config.algorithm.critic_warmup_epochs if is_pretraining else 1,
        critic_warmup_gate=None,
        dynamic_sampling=False,  # groups that are all right or all wrong are a part of the gradient
        max_uninformative=1000,
        kl_weight=0.0,
    )
    num_saved = math.ceil((num_pretrained + num_batches) / num_pretrained) + 1 if is_pretraining else 1
    sampling = replace(
        config,
        seed=config.seed + SEED_OFFSET,
        algorithm=algorithm,
        learner=replace(config.learner, steps=0, record=True, replay=None),
        staleness=replace(config.staleness, exact=False),
        weights=replace(config.weights, publish_every=1),
        eval=replace(config.eval, every=0, num_prompts=1, samples_per_prompt=1),
        samples=SamplesConfig(groups=0),
        logging=replace(config.logging, trackers=[]),
        checkpoint=replace(config.checkpoint, every=num_pretrained, keep=num_saved),
    )
    validate(sampling)
    return sampling


def _usual_folder(request: Request, run: Path | None, step: int | None, sampling: Config) -> Path:
    """RUN/signal/step-N-DIGEST or runs_dir/signal/MODEL-DIGEST: another one for other settings."""
    digest = hashlib.sha256(json.dumps(asdict(sampling), sort_keys=True).encode()).hexdigest()[:8]
    if run is not None:
        return run / "signal" / f"step-{step}-{digest}"
    return Path(sampling.runs_dir) / "signal" / f"{Path(request.model).name}-{digest}"


def _sample(plan: Plan) -> Outcome | None:
    """Samples what is missing; None when nothing is. The outcome of the run that does it."""
    asked, is_resumed = plan.out / "asked.yaml", False
    if asked.is_file():
        if read_config(asked) != plan.sampling:
            raise ConfigError(f"{plan.out} has batches of other settings: choose another --out")
        if _is_sampled(plan):
            return None
        is_resumed = (plan.sampling.run_dir / "config.yaml").is_file()
    elif plan.out.exists() and any(plan.out.iterdir()):
        raise ConfigError(f"{plan.out} is not an empty folder: choose another --out")
    plan.out.mkdir(parents=True, exist_ok=True)
    if plan.run is not None and not (plan.out / "policy" / "config.json").is_file():
        export(str(plan.run), plan.step, str(plan.out / "policy"), False, None)
    save_config(plan.sampling, asked)
    rollout = plan.sampling.rollout
    first = f"{plan.num_pretrained} steps of value pretraining, then " if plan.num_pretrained else ""
    print(
        f"{plan.source}: {first}{plan.num_batches} batches of {rollout.prompts_per_step} x {rollout.group_size} "
        "responses are sampled; the policy stays as it is",
        flush=True,
    )
    return train(plan.sampling, EarlierRun.RESUME if is_resumed else EarlierRun.REFUSE, _settled)


def _settled(config: Config) -> Config:
    return config if config.model.tie_word_embeddings is None else with_tying(config)


def _is_sampled(plan: Plan) -> bool:
    """A run that was interrupted in its last step may lack its last checkpoint, which is not needed here."""
    folder = plan.sampling.run_dir
    if not (folder / "record").is_dir() or not any((folder / "record").glob("step_*")):
        return False
    has_critic = not plan.num_pretrained or plan.num_pretrained in complete_steps(folder / "checkpoints")
    return has_critic and Record(folder).last_step >= plan.num_steps


def _measure(plan: Plan) -> None:
    """Prints the table, and leaves it in OUT/signal.json."""
    config, networks = _networks(plan)
    algorithm, rollout = plan.config.algorithm, plan.sampling.rollout
    critic = CRITIC if plan.has_critic else None
    critics = {CRITIC: networks.critic} if critic is not None and networks.critic is not None else {}
    estimators = usual(algorithm, critic, rollout.group_size, plan.lambdas)
    with Progress("gradients", plan.num_batches, "batches") as progress:
        found = gram(config, networks.policy, critics, _batches(plan), plan.num_batches, estimators, progress.update)
    result = table(estimators, found)
    values = as_json(result) | {"source": plan.source, "prompts": rollout.prompts_per_step, "n": rollout.group_size}
    (plan.out / "signal.json").write_text(json.dumps(values, indent=2) + "\n")
    shape = f"{plan.num_batches} batches of {rollout.prompts_per_step} x {rollout.group_size}"
    title = f"{plan.source}: the gradient of one batch, from {shape} responses"
    print(f"\n{title}\n\n{render(result)}\n\n{sentence(result)}")


def _networks(plan: Plan) -> tuple[Config, Networks]:
    """Plain modules in float32 on one device, and the configuration that they are run with.

    A pretrained critic comes with the policy of its own run, which is the same one: with LoRA under new adapters.
    """
    config, checkpoint = plan.sampling, None
    if plan.num_pretrained:
        checkpoint = step_folder(config.run_dir / "checkpoints", plan.num_pretrained)
    elif plan.run is not None:
        config, checkpoint = plan.config, checkpoint_of(plan.run, plan.step)[0]
    else:
        config = replace(config, algorithm=replace(config.algorithm, advantage=plan.config.algorithm.advantage))
    config = replace(
        config,
        algorithm=replace(config.algorithm, kl_weight=0.0),
        model=replace(config.model, dtype=DType.float32),
        learner=replace(config.learner, compile=False),
    )
    networks = load_networks(config, torch.device("cuda" if config.device is Device.cuda else "cpu"), None)
    if checkpoint is not None:
        load_parameters(checkpoint, "policy", networks.policy)
        if networks.critic is not None:
            load_parameters(checkpoint, "critic", networks.critic)
    return config, networks


def _batches(plan: Plan) -> Iterator[Batch]:
    """The newest of the record: what the critic was pretrained on comes before them."""
    record = Record(plan.sampling.run_dir)
    for step in range(plan.num_pretrained + 1, plan.num_steps + 1):
        yield Batch.from_groups(record.groups(step))
