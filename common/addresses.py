"""Addresses of this machine: the one that the learner advertises, and the one with which a peer is reached."""

import ipaddress
import os
import re
import socket

import psutil

from common.config import ConfigError, TransportConfig

# Reserved for documentation (RFC 5737, RFC 3849): asked only which way it would go, nothing is sent there.
_NAME = re.compile(r"[\w*][\w.*-]*")
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def advertised_host(transport: TransportConfig) -> str:
    """The address at which others reach the learner: transport.advertise_host, else what it binds; no wildcard.

    Of a wildcard (0.0.0.0, ::) it is the address of the interface with the default route; without one, that of the
    only interface that leads anywhere; without any, the loopback's. Raises ConfigError when that leaves a choice, and
    for a name that has no address or only one that nobody else reaches.
    """
    host = transport.advertise_host or transport.host
    if host in psutil.net_if_addrs():
        return _addresses(host)[0]
    return _of_wildcard(host) if is_wildcard(host) else _resolved(host)


def own_address(transport: TransportConfig) -> str:
    """The advertised host, for a socket that binds it. Raises ConfigError when it is somebody else's."""
    host = advertised_host(transport)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"weights cannot be sent from {host} ({error}): set transport.advertise_host to an address of this machine"
        ) from error
    return host


def _of_wildcard(host: str) -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return address_towards(_ELSEWHERE[family])
    except OSError:
        pass  # no default route, as on an isolated network
    found = [address for name in psutil.net_if_addrs() for address in _addresses(name, family)]
    reachable = [address for address in found if not ipaddress.ip_address(address).is_loopback]
    if len(reachable) > 1:
        raise ConfigError(
            f"transport.host={host} binds all of {', '.join(reachable)}, and there is no default route to choose by: "
            "set transport.advertise_host to the one that actors reach"
        )
    return (reachable or ["::1" if family is socket.AF_INET6 else "127.0.0.1"])[0]


def _resolved(host: str) -> str:
    """Many hosts give their own name a loopback address, at which nobody else would find them."""
    try:
        found = sorted(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    except OSError as error:
        raise ConfigError(f"{host!r} has no address ({error}): set transport.advertise_host to one") from error
    address = next((one for one in found if ":" not in one), found[0])
    if ipaddress.ip_address(address).is_loopback and host not in (address, "localhost"):
        raise ConfigError(
            f"{host!r} is {address} on this host, where no other reaches it: set transport.advertise_host to an "
            "address of this machine"
        )
    return address


def address_towards(host: str, port: int = 9) -> str:
    """This machine's address on the way to `host`. Nothing is sent. Raises OSError when there is no way."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface_of(host: str) -> str | None:
    """The name of the interface that has this address; None for no address of this machine and for loopback."""
    address = socket.getaddrinfo(host, None)[0][4][0]
    for name in map(str, psutil.net_if_addrs()):
        if address in _addresses(name) and not ipaddress.ip_address(address).is_loopback:
            return name
    return None


def prefer_interface_of(host: str) -> None:
    """NCCL of this process talks over the interface of its address `host`, if the user has not chosen one.

    To be called before NCCL starts. Loopback is left to NCCL, which knows hosts that it can reach faster.
    """
    if (interface := interface_of(host)) is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this one, not all that begin so


def prefer_way_to_rank_0(master: str) -> None:
    """gloo of this process talks over the interface on the way to `master`, if the user has not chosen one.

    To be called before the process group of ranks on several hosts is made: gloo would take the address of the host's
    name, which need not be one that others reach. Raises ConfigError when `master` is not reached, or is a name that
    means loopback on this host.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        address = address_towards(master)
    except OSError as error:
        sentence = f"there is no way to MASTER_ADDR={master} ({error}): correct torchrun's --master-addr"
        raise ConfigError(sentence) from error
    if ipaddress.ip_address(address).is_loopback and master not in (address, "localhost"):
        raise ConfigError(
            f"MASTER_ADDR={master} is {address} on this host, where ranks on other hosts do not reach it: give "
            "torchrun's --master-addr an address of rank 0's host, or set GLOO_SOCKET_IFNAME to its interface"
        )
    if (interface := interface_of(address)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def is_host(host: str) -> bool:
    """Whether it can be one: an address, or a name of a host or an interface."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return _NAME.fullmatch(host) is not None
    return True


def is_wildcard(host: str) -> bool:
    """Whether a socket that binds `host` listens on every interface."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == "*"


def is_loopback(host: str) -> bool:
    """Whether a socket that binds `host` is reached from this machine alone."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def in_url(host: str) -> str:
    """IPv6 addresses stand in brackets before a port."""
    return f"[{host}]" if ":" in host else host


def _addresses(interface: str, *families: int) -> list[str]:
    """The interface's addresses, link-local ones left out: they mean nothing elsewhere."""
    wanted = families or (socket.AF_INET, socket.AF_INET6)
    return [
        entry.address
        for entry in psutil.net_if_addrs()[interface]
        if entry.family in wanted and "%" not in entry.address
    ]
