"""This host's own address and network interface, as seen on the way to another host."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's IPv4 address
_WILDCARDS = ("0.0.0.0", "*")  # run.host of a controller that listens on all addresses
_NAME_BYTES = 256  # room for struct ifreq


def own_address(controller: str) -> str:
    """This host's address on the way to the controller (`tcp://HOST:PORT`): loopback where that is on this host."""
    host, port = controller.removeprefix("tcp://").rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # routes, sends nothing
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The interface that has this IPv4 address; empty where none has it as its first."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(
                    probe, _SIOCGIFADDR, struct.pack(f"{_NAME_BYTES}s", name.encode()[:15])
                )
                if (
                    socket.inet_ntoa(answer[20:24]) == address
                ):  # struct ifreq: a name of 16 bytes, a sockaddr_in
                    return name
    return ""


def collective_environment(host: str) -> dict[str, str]:
    """Variables that keep gloo and NCCL on the network that leads to the controller at `host`.

    Without them gloo listens where the host's name resolves to, and NCCL on the first interface that is up. With a
    controller on a loopback address the whole run is on this host, and nothing needs to listen elsewhere. A variable
    that is set already stays.
    """
    variables = {}
    if host not in _WILDCARDS and (interface := interface_of(own_address(f"tcp://{host}:1"))):
        variables["GLOO_SOCKET_IFNAME"] = interface
        if interface == "lo":
            variables["NCCL_SOCKET_IFNAME"] = interface
    return {name: value for name, value in variables.items() if name not in os.environ}


def reserve_port(address: str) -> socket.socket:
    """Returns a socket bound to a free port of `address`, not listening.

    The port is given to no other process while the socket is open, and a server that sets SO_REUSEADDR, as torch's store
    does, can still listen there.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((address, 0))
    return held
