"""Settings and keys of the sockets between controller and workers.

All sockets are CURVE-authenticated with key pairs that run.dir holds (mode 0600, new for each run):
one of the hub, one of the workers. The hub writes its address beside them once it listens; workers
wait for that file, so no port is chosen before it is bound.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.auth

from megatron_async_rl.errors import ConfigError
from megatron_async_rl.storage import files

ADDRESS_FILE = "controller.address"
MAX_FRAME_BYTES = 1 << 30  # a larger frame closes the connection that sent it
LINGER_MS = 2000  # for messages queued at close
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def connect(context: Any, run_dir: Path, timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    address = run_dir / ADDRESS_FILE
    while not address.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no controller wrote {address} within {timeout_s:.0f} s; start one with this "
                "run.dir"
            )
        time.sleep(0.05)
    keys = run_dir / "keys"
    sock = context.socket(zmq.DEALER)
    sock.curve_publickey, sock.curve_secretkey = zmq.auth.load_certificate(
        keys / "worker.key_secret"
    )
    sock.curve_serverkey, _ = zmq.auth.load_certificate(keys / "hub.key")
    sock.setsockopt(zmq.IDENTITY, secrets.token_bytes(8))
    configure(sock)
    sock.connect(address.read_text().strip())
    return sock


def configure(sock: zmq.Socket) -> None:
    """Sets limits; makes the kernel notice a lost host within a minute, so both ends reconnect."""
    for option, value in (
        (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
        (zmq.LINGER, LINGER_MS),
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, 30),
        (zmq.TCP_KEEPALIVE_INTVL, 10),
        (zmq.TCP_KEEPALIVE_CNT, 3),
    ):
        sock.setsockopt(option, value)


def make_keys(run_dir: Path) -> Path:
    """Makes the key pairs of hub and workers; only the workers' public key is allowed."""
    keys = run_dir / "keys"
    (keys / "allowed").mkdir(mode=0o700, parents=True, exist_ok=True)
    keys.chmod(0o700)
    previous_umask = os.umask(0o077)
    try:
        zmq.auth.create_certificates(keys, "hub")
        public, _ = zmq.auth.create_certificates(keys, "worker")
        files.write_atomic(keys / "allowed" / "worker.key", Path(public).read_bytes())
    finally:
        os.umask(previous_umask)
    return keys


def has_curve() -> bool:
    """Returns whether this build of libzmq can encrypt and authenticate."""
    return bool(zmq.has("curve"))
