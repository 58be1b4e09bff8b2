"""Learner ranks as processes of their own, forked from one server that has imported the learner.

The imports are most of what a rank costs. Ranks share nothing with the server or with each other but the imported code,
and they see the environment of the test that starts them.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing


def fork_server() -> ForkServerContext:
    """What makes such processes; the server starts with the first of them and ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["learner.main"])
    return context


def run_two_ranks(function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function(rank, *arguments)` in two processes. Raises what one of them raises."""
    run_ranks(2, function, *arguments)


def run_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """The same in so many."""
    fork_server()
    torch.multiprocessing.start_processes(
        _in_environment, (dict(os.environ), function, arguments), nprocs=num_ranks, start_method="forkserver"
    )


def _in_environment(
    rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    set_environment(environment)
    function(rank, *arguments)


def set_environment(environment: dict[str, str]) -> None:
    """Instead of the server's, which is as old as the server."""
    os.environ.clear()
    os.environ.update(environment)
