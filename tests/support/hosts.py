"""Hosts of one network: namespaces with an address and a cable each, on a switch that is a namespace too.

They reach each other and nothing else, and the machine's host name is an address of none.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest

SUBNET = "10.213.7"


@dataclass(frozen=True)
class Hosts:
    """`addresses` by name; the namespace of a host is `namespace(name)`."""

    addresses: dict[str, str]

    def namespace(self, name: str) -> str:
        return f"{name}-{os.getpid()}"

    def start(self, name: str, command: Sequence[str], log: Path, cwd: Path) -> "Popen[bytes]":
        """`command` on that host, its output appended to `log`. Nothing in its environment speaks of addresses."""
        environment = {key: value for key, value in os.environ.items() if "IFNAME" not in key and "MASTER_" not in key}
        with log.open("ab") as output:
            return Popen(
                ["ip", "netns", "exec", self.namespace(name), *command],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def cut(self, name: str) -> None:
        """Takes the host's cable out of the switch."""
        _ip(f"-n {self.namespace('switch')} link set {name} down")

    def mend(self, name: str) -> None:
        _ip(f"-n {self.namespace('switch')} link set {name} up")


@contextmanager
def network(*names: str) -> Iterator[Hosts]:
    """So many hosts. Skips the test where namespaces cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no ip command")
    hosts = Hosts({name: f"{SUBNET}.{number}" for number, name in enumerate(names, start=1)})
    try:
        try:
            _connect(hosts)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield hosts
    finally:
        for name in ("switch", *names):
            subprocess.run(["ip", "netns", "delete", hosts.namespace(name)], capture_output=True, check=False)


def _connect(hosts: Hosts) -> None:
    switch = hosts.namespace("switch")
    _ip(f"netns add {switch}")
    _ip(f"-n {switch} link add bridge type bridge")
    _ip(f"-n {switch} link set bridge up")
    for name, address in hosts.addresses.items():
        host = hosts.namespace(name)
        _ip(f"netns add {host}")
        _ip(f"link add veth0 netns {host} type veth peer name {name} netns {switch}")
        _ip(f"-n {switch} link set {name} master bridge up")
        _ip(f"-n {host} address add {address}/24 dev veth0")
        _ip(f"-n {host} link set veth0 up")
        _ip(f"-n {host} link set lo up")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=True)
