"""Sockets: this host's address and interface on the route to another host, free ports, limits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address
_WILDCARDS = ("0.0.0.0", "*")  # run.host of a controller that listens on all addresses
_NAME_BYTES = 256  # room for struct ifreq
MAX_DESCRIPTORS = 1 << 16


def own_address(controller: str) -> str:
    """Returns this host's address on the route to the controller (`tcp://HOST:PORT`)."""
    host, port = controller.removeprefix("tcp://").rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # routes, sends nothing
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """Returns the interface that has `address` as its first IPv4 address, or ""."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack(f"{_NAME_BYTES}s", name.encode()[:15])
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                # struct ifreq: 16 bytes of name, a sockaddr_in
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def collective_environment(host: str) -> dict[str, str]:
    """Returns variables that keep gloo and NCCL on the network of the controller at `host`.

    Without them gloo listens on the address of the host's name and NCCL on the first interface that
    is up. With a controller on loopback the whole run is on this host and nothing listens
    elsewhere. Variables that are set already are left out.
    """
    variables = {}
    if host not in _WILDCARDS and (interface := interface_of(own_address(f"tcp://{host}:1"))):
        variables["GLOO_SOCKET_IFNAME"] = interface
        if interface == "lo":
            variables["NCCL_SOCKET_IFNAME"] = interface
    return {name: value for name, value in variables.items() if name not in os.environ}


def reserve_port(address: str) -> socket.socket:
    """Returns a socket bound to a free port of `address`, not listening.

    While it is open no other process gets the port, except a server that asks for this port and
    sets SO_REUSEADDR, as torch's store does.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((address, 0))
    return reserved


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port that is free now; a server that loses the race for it is started again."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open files: each connection takes one, and 1024 is common."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
