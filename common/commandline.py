"""The words of the command line: commands, their options, and what each is for. run.py has what they do."""

import argparse
from collections.abc import Sequence

from common.config import DType
from common.types import AnswerForm

EVAL_OPTIONS = (  # of `eval`: the setting that each stands for
    ("--samples", "eval.samples_per_prompt", "responses to each prompt: K of avg@K"),
    ("--temperature", "eval.temperature", "0 is greedy, one response a prompt"),
    ("--top-p", "eval.top_p", "sample from the smallest set of tokens with this much probability"),
    ("--max-tokens", "rollout.max_tokens", "length limit of a response"),
    ("--seed", "seed", "of the sampling"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """`command` is the name of one, the rest its options.

    Settings may stand on both sides of an option; argparse takes the first lot of them and leaves the rest over.
    """
    parser = _parser()
    arguments, left_over = parser.parse_known_args(argv)
    if left_over and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in left_over)):
        parser.error(f"unrecognized arguments: {' '.join(left_over)}")
    if left_over:
        arguments.overrides += left_over
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="async-vapo", description="Train a language model to reason, with asynchronous actors and VAPO."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_roles(commands)
    _add_plan(commands)
    _add_views(commands)
    _add_tools(commands)
    _add_eval(commands)
    _add_signal(commands)
    return parser


def _add_roles(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What starts processes of a run, checks it, or changes it while it lives."""
    train = commands.add_parser("train", help="start learner and actors here and train to the end")
    _add_config(train)
    train.add_argument("--resume", metavar="RUN", help="continue an interrupted run from its newest checkpoint")
    train.add_argument("--replay", metavar="RUN", help="train on what a run with learner.record=true consumed")
    train.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name")

    check = commands.add_parser("check", help="look for mistakes in configuration and data; starts nothing")
    check.add_argument("--data", metavar="FOLDER", help="keep token ids and the list of bad rows there")
    _add_config(check)

    learner = commands.add_parser("learner", help="start one learner rank alone (or all of them with torchrun)")
    learner.add_argument("--config", required=True, help="RUN/config.yaml")
    _add_overrides(learner)

    actor = commands.add_parser("actor", help="start one actor alone and connect it to a learner")
    actor.add_argument("--connect", required=True, help="tcp://HOST:PORT of the learner, or file:RUN/endpoint")
    actor.add_argument("--keys", metavar="FOLDER", help="its keys (default: transport.keys, or RUN/keys)")
    actor.add_argument("--name", required=True, help="unique among the actors of a run")
    _add_config(actor)

    actors = commands.add_parser("actors", help="add local actors to a live run, or remove some")
    actors.add_argument("run", help="run directory of a `train` that runs on this machine")
    actors.add_argument("--count", type=int, help="how many there shall be (default: only say how many there are)")


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Options of speed are None where they are not given: learner/planning/command.py has what is assumed then."""
    plan = commands.add_parser("plan", help="memory, speed and the number of actors of a run, without starting it")
    _add_config(plan)
    plan.add_argument(
        "--from",
        dest="runs",
        action="append",
        default=[],
        metavar="RUN",
        help="take the speeds of this run; repeatable",
    )
    plan.add_argument("--actor-tokens-per-s", type=float, help="of one actor, with all the sequences that it may run")
    plan.add_argument("--learner-tokens-per-s", type=float, help="response tokens, without waiting and publishing")
    plan.add_argument("--publish-s", type=float, help="seconds of a publication, for which actors pause")
    plan.add_argument("--length-mean", type=float, help="tokens of a response")
    plan.add_argument("--length-sigma", type=float, help="standard deviation of the logarithm of a response's length")
    plan.add_argument("--uninformative", type=float, help="share of groups that algorithm.dynamic_sampling replaces")
    plan.add_argument("--gpus", type=int, help="plan for so many GPUs instead of those of this machine")
    plan.add_argument("--gpu-gib", type=float, help="memory of each of them")
    plan.add_argument("--idle", type=float, default=0.05, help="share of its time that a busy learner may wait")
    plan.add_argument("--steps", type=int, help="policy steps that each simulation counts")
    plan.add_argument("--json", action="store_true", help="the same as JSON")


def _add_views(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What looks at a run."""
    inspect = commands.add_parser("inspect", help="the summary of a run, its page, or several runs beside each other")
    inspect.add_argument("runs", nargs="+", metavar="RUN", help="run directory; several are compared")
    shown = inspect.add_mutually_exclusive_group()
    shown.add_argument("--html", metavar="FILE", help="write one page with all views of staleness, for a browser")
    shown.add_argument("--json", action="store_true", help="print it for other programs")

    top = commands.add_parser("top", help="how a live run stands, renewed every second; from any host")
    top.add_argument("run", nargs="?", help="run directory (or --connect)")
    top.add_argument("--connect", metavar="tcp://HOST:PORT", help="the learner (default: as RUN/endpoint says)")
    top.add_argument("--keys", metavar="FOLDER", help="its keys (default: transport.keys, or RUN/keys)")
    top.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="of a learner that is silent (default: 60)"
    )
    form = top.add_mutually_exclusive_group()
    form.add_argument("--once", dest="form", action="store_const", const="once", default="live", help="print it once")
    form.add_argument("--json", dest="form", action="store_const", const="json", help="once, for other programs")

    show = commands.add_parser("show", help="page through responses of a run, each token coloured by what became of it")
    show.add_argument("run", help="run directory, of a live run too")
    show.add_argument("--step", type=int, help="a sampled step (default: the newest)")
    show.add_argument("--color", choices=["advantage", "value", "version"], default="advantage", help="of the tokens")
    choice = show.add_mutually_exclusive_group()
    for name, what in (
        ("wrong", "only those that are not right"),
        ("right", "only the right ones"),
        ("longest", "the longest first"),
        ("stale", "those with the oldest tokens first"),
    ):
        choice.add_argument(f"--{name}", dest="choice", action="store_const", const=name, default="all", help=what)


def _add_tools(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What makes or judges files."""
    keygen = commands.add_parser("keygen", help="make the keys of a learner and its actors")
    keygen.add_argument("folder", help="for transport.keys and --keys; what it holds already is kept")
    keygen.add_argument(
        "--actor",
        action="append",
        metavar="NAME",
        help="a pair for this actor; repeatable (default: one for all)",
    )

    prepare = commands.add_parser("prepare", help="make a small base model of a built-in task")
    prepare.add_argument("model", help="chain_sum, number_walk or contrary_walk")
    prepare.add_argument("--out", help="folder to write (default: configs/models/MODEL)")
    prepare.add_argument("--seed", type=int, default=0)

    export = commands.add_parser("export", help="write a checkpoint's policy or critic as a Hugging Face folder")
    export.add_argument("run", help="run directory")
    export.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    export.add_argument("--critic", action="store_true", help="the critic, for model.critic_path of other runs")
    export.add_argument("--adapter", action="store_true", help="with LoRA: only what was trained, in PEFT's format")
    export.add_argument(
        "--dtype", choices=[str(dtype) for dtype in DType], help="type of the weights (default: the base model's own)"
    )
    export.add_argument("--out", required=True, help="folder to write")

    grade = commands.add_parser("grade", help="grade a file of answers with the mathematical verifier")
    grade.add_argument("cases", help='.jsonl with {"gold": ..., "pred": ..., "input": "answer"|"response"} a line')
    grade.add_argument(
        "--answer-form",
        choices=[form.value for form in AnswerForm],
        default=AnswerForm.ANY.value,
        help="verifier.answer_form: any spelling of the right value (the default here), or exact, as in training",
    )


def _add_eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("eval", help="sample a file of prompts from a model or a run, and score the responses")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="model folder, OWNER/NAME on the Hub, or run directory")
    parser.add_argument("--data", metavar="FILE", help=".jsonl or .parquet (default: the configuration's held-out set)")
    parser.add_argument("--step", type=int, help="of a run: step of a checkpoint (default: the final export)")
    parser.add_argument("--prompts", type=int, dest="num_prompts", metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--by", action="append", default=[], metavar="COLUMN", help="scores for each value of a column; repeatable"
    )
    parser.add_argument("--out", metavar="FOLDER", help="of transcripts (default: in RUN/eval, or runs/eval)")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print JSON instead of a table")
    for option, setting, meaning in EVAL_OPTIONS:
        parser.add_argument(
            option,
            dest="options",
            action="append",
            default=[],
            metavar="X",
            type=f"{setting}={{}}".format,
            help=meaning,
        )
    _add_config(parser)


def _add_signal(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    does = "how much of one batch's gradient is signal, with and without the critic, by lambda; trains no policy"
    parser = commands.add_parser("signal", help=does, description=f"Says {does}.")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="run directory, or model folder (with -c)")
    parser.add_argument("--step", type=int, help="of a run: step of a checkpoint (default: the newest)")
    parser.add_argument(
        "--batches", type=int, dest="num_batches", default=36, metavar="N", help="to sample (default: 36)"
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        metavar="K",
        help="pretrain a new critic on K batches first (default: the checkpoint's critic, or model.critic_path)",
    )
    parser.add_argument(
        "--lambda",
        type=float,
        dest="lambdas",
        action="append",
        metavar="X",
        help="a lambda to try with the critic; repeatable (default: seven from 0.8 to 1)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="of the batches and the table (default: in RUN/signal)")
    _add_config(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file or shipped recipe; repeatable",
    )
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings on top, e.g. learner.steps=10")
