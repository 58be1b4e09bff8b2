"""Which address the learner advertises. The machine's interfaces are made up."""

import os
import socket
from collections import namedtuple

import pytest

from common import addresses
from common.addresses import advertised_host, interface_of, own_address, prefer_interface_of, prefer_way_to_rank_0
from common.config import ConfigError, TransportConfig

Entry = namedtuple("Entry", ["family", "address"])

LOOPBACK = {"lo": [Entry(socket.AF_INET, "127.0.0.1"), Entry(socket.AF_INET6, "::1")]}
ETHERNET = {"eth0": [Entry(socket.AF_INET, "10.1.0.5"), Entry(socket.AF_INET6, "fe80::1%eth0")]}
INFINIBAND = {"ib0": [Entry(socket.AF_INET, "192.168.7.5")]}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One network beside the loopback, no way out of it."""

    def no_route(host: str, port: int = 9) -> str:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("psutil.net_if_addrs", lambda: LOOPBACK | ETHERNET)
    monkeypatch.setattr(addresses, "address_towards", no_route)
    return monkeypatch


@pytest.mark.parametrize(
    ("host", "advertised", "expected"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("10.1.0.5", None, "10.1.0.5"),
        ("0.0.0.0", None, "10.1.0.5"),
        ("0.0.0.0", "10.9.9.9", "10.9.9.9"),
        ("::", None, "::1"),
        ("eth0", None, "10.1.0.5"),
        ("0.0.0.0", "eth0", "10.1.0.5"),
        ("localhost", None, "127.0.0.1"),
    ],
)
def test_what_is_advertised(machine: pytest.MonkeyPatch, host: str, advertised: str | None, expected: str) -> None:
    assert advertised_host(TransportConfig(host=host, advertise_host=advertised)) == expected


def test_a_wildcard_goes_by_the_default_route(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("psutil.net_if_addrs", lambda: LOOPBACK | ETHERNET | INFINIBAND)
    machine.setattr(addresses, "address_towards", lambda host, port=9: "192.168.7.5")
    assert advertised_host(TransportConfig(host="0.0.0.0")) == "192.168.7.5"


def test_a_wildcard_over_several_networks_without_a_route_asks_the_user(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("psutil.net_if_addrs", lambda: LOOPBACK | ETHERNET | INFINIBAND)
    with pytest.raises(ConfigError, match=r"binds all of 10\.1\.0\.5, 192\.168\.7\.5.*set transport\.advertise_host"):
        advertised_host(TransportConfig(host="0.0.0.0"))


def test_a_machine_alone_advertises_its_loopback(machine: pytest.MonkeyPatch) -> None:
    machine.setattr("psutil.net_if_addrs", lambda: LOOPBACK)
    assert advertised_host(TransportConfig(host="0.0.0.0")) == "127.0.0.1"


def test_a_name_that_means_loopback_only_here_is_refused(machine: pytest.MonkeyPatch) -> None:
    """As most hosts have it of their own name."""
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    machine.setattr("socket.getaddrinfo", lambda *_, **__: [entry])
    with pytest.raises(ConfigError, match=r"'learner' is 127\.0\.1\.1 on this host"):
        advertised_host(TransportConfig(host="learner"))


def test_weights_are_sent_from_an_address_of_this_machine() -> None:
    assert own_address(TransportConfig()) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"weights cannot be sent from 192\.0\.2\.9"):  # of no machine (RFC 5737)
        own_address(TransportConfig(host="0.0.0.0", advertise_host="192.0.2.9"))


def test_nccl_takes_the_interface_of_the_address_unless_the_user_chose_one(machine: pytest.MonkeyPatch) -> None:
    assert (interface_of("10.1.0.5"), interface_of("127.0.0.1"), interface_of("10.9.9.9")) == ("eth0", None, None)
    machine.setenv("NCCL_SOCKET_IFNAME", "")
    machine.delenv("NCCL_SOCKET_IFNAME")
    prefer_interface_of("127.0.0.1")
    assert "NCCL_SOCKET_IFNAME" not in os.environ
    prefer_interface_of("10.1.0.5")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"
    machine.setenv("NCCL_SOCKET_IFNAME", "ib0")
    prefer_interface_of("10.1.0.5")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("way", "chosen", "interface"), [("10.1.0.5", None, "eth0"), ("127.0.0.1", None, None), ("10.1.0.5", "ib0", "ib0")]
)
def test_gloo_takes_the_interface_on_the_way_to_rank_0_unless_the_user_chose_one(
    machine: pytest.MonkeyPatch, way: str, chosen: str | None, interface: str | None
) -> None:
    machine.setenv("GLOO_SOCKET_IFNAME", chosen or "")
    if chosen is None:
        machine.delenv("GLOO_SOCKET_IFNAME")
    machine.setattr(addresses, "address_towards", lambda host, port=9: way)
    prefer_way_to_rank_0(way)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface


def test_rank_0_is_not_looked_for_where_only_its_own_host_finds_it(machine: pytest.MonkeyPatch) -> None:
    machine.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(ConfigError, match=r"no way to MASTER_ADDR=node7 .*: correct torchrun's --master-addr"):
        prefer_way_to_rank_0("node7")
    machine.setattr(addresses, "address_towards", lambda host, port=9: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=node7 is 127\.0\.1\.1 on this host"):
        prefer_way_to_rank_0("node7")
