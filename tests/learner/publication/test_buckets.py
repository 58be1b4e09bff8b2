"""What travels, and in which pieces."""

import os
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.broadcast import Buffers
from common.config import Config, Device
from common.launcher import rank_environment, reserve_port
from learner.networks.model import Policy, TensorSpec, load_policy
from learner.networks.parallel import full_tensor, make_mesh, process_group
from learner.publication.buckets import PolicySource, gather, plan
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import tiny_run, write_tiny_mixture, write_tiny_model

CPU = torch.device("cpu")

specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(max_size=3),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
    )
)


@settings(max_examples=50, deadline=None)
@given(specs, st.integers(1, 200))
def test_buckets_are_runs_of_one_type_and_full_but_never_too_full(specs: list[TensorSpec], limit: int) -> None:
    buckets = plan(specs, limit)
    assert [spec for bucket in buckets for spec in bucket] == specs
    sizes = [sum(spec.dtype.itemsize * prod(spec.shape) for spec in bucket) for bucket in buckets]
    for bucket, size in zip(buckets, sizes, strict=True):
        assert len({spec.dtype for spec in bucket}) == 1
        assert size <= limit or len(bucket) == 1
    for (left, right), size in zip(pairwise(buckets), sizes, strict=False):
        first = right[0].dtype.itemsize * prod(right[0].shape)
        assert left[0].dtype != right[0].dtype or size + first > limit, "it would have had room"


@torch.no_grad()
def train(policy: Policy) -> None:
    for parameter in policy.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)


def received(source: PolicySource, bucket_bytes: int) -> dict[str, torch.Tensor]:
    """What an actor makes of the buckets."""
    tensors = {}
    for bucket in gather(source, bucket_bytes, Buffers()):
        assert bucket is not None
        news = bucket.announcement
        dtype = getattr(torch, news["dtype_name"])
        pieces = bucket.data.split([dtype.itemsize * prod(shape) for shape in news["shapes"]])
        for name, shape, piece in zip(news["names"], news["shapes"], pieces, strict=True):
            tensors[name] = piece.view(dtype).view(shape)
    return tensors


@pytest.fixture(params=["dense", "mixture"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Policy:
    write = write_tiny_mixture if request.param == "mixture" else write_tiny_model
    return load_policy(tiny_run(write(tmp_path)), CPU, None)


@pytest.mark.parametrize("bucket_bytes", [1, 3000, 2**26])
def test_all_bytes_arrive_in_the_type_of_the_engine_whatever_the_buckets(policy: Policy, bucket_bytes: int) -> None:
    """Under the names of the checkpoint, also where transformers fuses the experts of a layer."""
    expected = dict(policy.named_hf_parameters(torch.bfloat16))
    found = received(PolicySource(policy, torch.bfloat16, keeps=False), bucket_bytes)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_bucket_is_a_copy_that_training_does_not_reach(policy: Policy) -> None:
    bucket = next(gather(PolicySource(policy, torch.float32, keeps=False), 1, Buffers()))
    assert bucket is not None
    before = bucket.data.clone()
    train(policy)
    assert bucket.data.equal(before)


def test_held_weights_are_those_of_the_last_hold(policy: Policy) -> None:
    source = PolicySource(policy, torch.bfloat16, keeps=True)
    before = dict(policy.named_hf_parameters(torch.bfloat16))
    source.hold()
    train(policy)
    found = received(source, 3000)
    assert found.keys() == before.keys()
    assert all(found[name].equal(tensor) for name, tensor in before.items())
    source.hold()
    now = dict(policy.named_hf_parameters(torch.bfloat16))
    assert all(tensor.equal(now[name]) for name, tensor in received(source, 3000).items())


def test_ranks_that_do_not_send_gather_the_same_buckets_and_keep_none(policy: Policy) -> None:
    source = PolicySource(policy, torch.float32, keeps=False)
    sent, others = list(gather(source, 3000, Buffers())), list(gather(source, 3000, None))
    assert len(sent) > 3
    assert others == [None] * len(sent)


def test_a_source_that_yields_other_than_it_announced_is_our_mistake(policy: Policy) -> None:
    class Cast(PolicySource):
        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor.half()) for name, tensor in super().tensors())

    with pytest.raises(AssertionError, match="announced TensorSpec"):
        list(gather(Cast(policy, torch.float32, keeps=False), 3000, Buffers()))


def _cast_before_gathering(rank: int, config: Config, port: int) -> None:
    """One of two ranks: shards are cast before they travel, held and live ones alike, and buckets are whole."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    with process_group(Device.cpu, timeout_s=60):
        policy = load_policy(config, CPU, make_mesh(config))
        expected = {
            name: full_tensor(parameter, parameter.to_local()).to(torch.bfloat16)  # gathered first, then cast
            for name, parameter in policy.model.named_parameters()
        }
        gathered: list[torch.dtype] = []
        gather_into = torch.distributed.tensor.DTensor.full_tensor

        def recording(tensor: torch.distributed.tensor.DTensor, **keywords: object) -> torch.Tensor:
            gathered.append(tensor.to_local().dtype)
            return gather_into(tensor, **keywords)

        torch.distributed.tensor.DTensor.full_tensor = recording  # type: ignore[method-assign,assignment]
        live, kept = (PolicySource(policy, torch.bfloat16, keeps=keeps) for keeps in (False, True))
        kept.hold()
        _check_pass(live, expected, rank)
        train(policy)
        _check_pass(kept, expected, rank)
        assert set(gathered) == {torch.bfloat16} and len(gathered) == 2 * len(expected)


def _check_pass(source: PolicySource, expected: dict[str, torch.Tensor], rank: int) -> None:
    if rank != 0:
        assert set(gather(source, 3000, None)) == {None}
        return
    found = received(source, 3000)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_ranks_cast_their_shards_before_they_gather_them(tmp_path: Path) -> None:
    """Half the traffic in bfloat16. Weights that are held come out as they were."""
    config = tiny_run(write_tiny_model(tmp_path), ranks=2)
    with reserve_port() as port:
        run_two_ranks(_cast_before_gathering, config, port)
