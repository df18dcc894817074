"""A trainer node: runs one host's ranks in each incarnation of a trainer that spans several hosts.

The ranks of an incarnation meet at the address that trainer-0's node publishes. When a rank dies on
any host, or a node is silent or starts again, all nodes begin the next incarnation: they kill their
ranks and start new ones, which resume from the checkpoint and the recorded batches.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import subprocess
import time
from pathlib import Path
from typing import NoReturn

from msgspec.structs import replace

from megatron_async_rl import addresses, processes
from megatron_async_rl.config.config import Config
from megatron_async_rl.errors import Error
from megatron_async_rl.launcher import torchrun
from megatron_async_rl.launcher.claims import Claims, controller_key
from megatron_async_rl.node.incarnations import IncarnationFiles, TrainerIncarnation
from megatron_async_rl.observability.status import RunStatus, find_status

logger = logging.getLogger(__name__)
POLL_S = 0.3
HEARTBEATS_PER_TIMEOUT = 8
CAUSE_S = 5.0  # for the node of the rank that failed first to report its error


class _Superseded(Exception):
    """A newer incarnation of the trainer has begun."""


class Node:
    def __init__(self, config: Config, run_dir: Path, name: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._name = name
        self._index = config.trainer_names.index(name)
        self._files = IncarnationFiles(run_dir, name, config.trainer_names)
        self._claims = Claims(run_dir)
        self._owner = self._claims.owner(name)
        self._log = run_dir / "logs" / f"{name}.log"
        self._log_begin = 0  # where that of the newest ranks begins
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None  # trainer-0: reserved while the incarnation lasts
        self._controller_key = b""
        self._has_trained = False  # the run was seen in the state `training`
        self._over_since: float | None = None  # when the run was first seen to be over
        self._last_heartbeat = 0.0

    def run(self) -> None:
        """Runs until the training has ended. Raises Error if the run cannot continue."""
        controller = self._wait_for_controller()
        self._controller_key = controller_key(self._run_dir)
        try:
            self._join_or_begin()
            while True:
                try:
                    address, port = self._rendezvous(controller)
                    if port:
                        self._run_ranks(controller, address, port)
                    with contextlib.suppress(OSError):
                        self._files.write(replace(self._files.own, done=True))
                    return
                except _Superseded:
                    self._stop_ranks()
                    self._join(self._files.read())
        finally:
            self._stop_ranks()

    # ---- which incarnation

    def _join_or_begin(self) -> None:
        """Joins the current incarnation if it waits for this node, or begins the next one."""
        newest = self._files.read()
        if self._files.of(self._name).number < newest.number and not newest.failed:
            self._join(newest)
        else:
            reason = f"{self._name} was started"
            self._write(TrainerIncarnation(newest.number + 1, reason=reason))

    def _join(self, newest: TrainerIncarnation) -> None:
        logger.warning("trainer incarnation %d: %s", newest.number, newest.reason)
        self._write(TrainerIncarnation(newest.number, newest.restarts, newest.reason))

    def _write(self, content: TrainerIncarnation) -> None:
        """Retries while the file cannot be written: a full disk must not end the run."""
        deadline = time.monotonic() + self._config.trainer.start_timeout_s
        while True:
            try:
                self._files.write(content)
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    raise Error(
                        f"{self._name} cannot write below {self._run_dir}: {e}; free disk space"
                    ) from None
                time.sleep(POLL_S)

    def _poll(self) -> None:
        """Reads the other nodes' files and the run's status, and sends a heartbeat.

        Raises _Superseded, or Error if the run has failed or another launcher has taken the name.
        """
        owner, key = self._owner, self._controller_key
        with contextlib.suppress(OSError):  # of a network file system, which may pass
            owner, key = self._claims.owner(self._name), controller_key(self._run_dir)
        if owner != self._owner:
            raise Error(
                f"{self._name} was taken over by {owner}", "to have it back, join here again"
            )
        if key != self._controller_key:
            self._over_since = -math.inf  # the controller restarted: our launcher restarts us
            return
        newest = self._files.read()
        if newest.number >= self._files.own.number and newest.failed:
            raise Error(newest.reason)
        if newest.number > self._files.own.number:
            raise _Superseded
        now = time.monotonic()
        heartbeat_s = self._config.faults.heartbeat_timeout_s / HEARTBEATS_PER_TIMEOUT
        if self._files.of(self._name) != self._files.own:
            self._write(self._files.own)  # an earlier process of this name wrote it as it ended
        elif now - self._last_heartbeat > heartbeat_s:
            self._files.heartbeat()
            self._last_heartbeat = now
        status = find_status(self._run_dir) or RunStatus()
        self._has_trained = self._has_trained or status.state == "training"
        if status.state not in ("failed", "stopped"):
            self._over_since = None
        elif self._over_since is None:
            self._over_since = now

    # ---- start of an incarnation

    def _wait_for_controller(self) -> str:
        """Returns the controller's address; by then an earlier start's status.json is gone."""
        limit_s = self._config.trainer.start_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                if text := (self._run_dir / "controller.address").read_text().strip():
                    return text
            if time.monotonic() > deadline:
                raise Error(
                    f"{self._name} waited trainer.start_timeout_s = {limit_s:g} s for a controller",
                    "start it with `run` on the first host",
                )
            time.sleep(POLL_S)

    def _rendezvous(self, controller: str) -> tuple[str, int]:
        """Waits for all nodes. Returns where the ranks meet; port 0 if the run is over."""
        own, limit_s = self._files.own, self._config.trainer.start_timeout_s
        pause_s = self._config.faults.restart_pause_s(own.restarts)
        first, started, logged = self._config.trainer_names[0], time.monotonic(), ""
        while True:
            self._poll()
            if self._over_since is not None:
                return "", 0
            waited_s = time.monotonic() - started
            published = self._files.of(first)
            missing = ", ".join(self._files.missing())
            if not missing and published.port:
                return published.address, published.port
            if not missing and self._index == 0 and waited_s >= pause_s:
                self._publish_address(controller)
                continue
            awaited = f"{missing} to join" if missing else f"the address that {first} publishes"
            if awaited != logged:
                logger.info(
                    "trainer incarnation %d: %s waits for %s", own.number, self._name, awaited
                )
                logged = awaited
            if waited_s > limit_s:
                self._fail(
                    f"{self._name} waited trainer.start_timeout_s = {limit_s:g} s for {awaited} "
                    f"(trainer incarnation {own.number}); start it with `join {self._run_dir} "
                    f"{missing or first}`, on its host or another"
                )
            time.sleep(POLL_S)

    def _publish_address(self, controller: str) -> None:
        address = addresses.own_address(controller)
        self._port = addresses.reserve_port(address)
        self._write(replace(self._files.own, address=address, port=self._port.getsockname()[1]))

    # ---- the ranks

    def _run_ranks(self, controller: str, address: str, port: int) -> None:
        """Returns when this node's ranks have ended successfully, or the run is over."""
        number, faults = self._files.own.number, self._config.faults
        logger.info("trainer incarnation %d: ranks meet at %s, port %d", number, address, port)
        timeout_s = max(1, round(self._config.trainer.start_timeout_s))
        rendezvous = [
            f"--nnodes={len(self._config.trainer_names)}",
            "--rdzv-backend=bound",
            f"--rdzv-endpoint={address}:{port}",
            f"--rdzv-id=incarnation-{number}",
            f"--rdzv-conf=rank={self._index},timeout={timeout_s}",
        ]
        command = torchrun.command(
            self._config.ranks_per_host, rendezvous, "megatron_async_rl.trainer", str(self._run_dir)
        )
        host = controller.removeprefix("tcp://").rsplit(":", 1)[0]
        network = addresses.collective_environment(host)
        self._log_begin = processes.log_size(self._log)
        self._torchrun = processes.start(command, self._log, network, sigterm_blocked=True)
        started = time.monotonic()
        while (code := self._torchrun.poll()) is None:
            self._poll()
            over_since = self._over_since
            if over_since is not None and time.monotonic() - over_since > faults.shutdown_grace_s:
                return
            if silent := self._files.silent(faults.heartbeat_timeout_s):
                self._begin_next(
                    f"no heartbeat of {silent[0]} for faults.heartbeat_timeout_s = "
                    f"{faults.heartbeat_timeout_s:g} s",
                    started,
                )
            time.sleep(POLL_S)
        self._poll()
        if code and self._over_since is None:
            self._begin_next(f"{self._name} ended with exit code {code}", started)

    def _begin_next(self, reason: str, started: float) -> NoReturn:
        """Begins the next incarnation after a failure, or ends the run if no restart is allowed."""
        faults, own = self._config.faults, self._files.own
        restarts = 0 if time.monotonic() - started > faults.restart_reset_s else own.restarts
        if not self._has_trained:
            text = processes.error_text(self._log, self._log_begin)
            if text is None:
                self._await_cause()
            cause = text or f"its log is {self._log}"
            self._fail(f"{reason} before the first training step: {cause}")
        if restarts >= faults.max_restarts:
            self._fail(
                f"the trainer died {restarts + 1} times (faults.max_restarts = "
                f"{faults.max_restarts}); {reason}"
            )
        self._write(TrainerIncarnation(own.number + 1, restarts + 1, reason))
        raise _Superseded

    def _await_cause(self) -> None:
        """Waits for another node's error: ranks whose peer on another host failed have none.

        Raises that error.
        """
        deadline = time.monotonic() + CAUSE_S
        while time.monotonic() < deadline:
            self._poll()
            time.sleep(POLL_S)

    def _fail(self, reason: str) -> NoReturn:
        """Ends the run on all hosts."""
        own = self._files.own
        with contextlib.suppress(OSError):
            self._files.write(TrainerIncarnation(own.number, own.restarts, reason, failed=True))
        raise Error(reason)

    def _stop_ranks(self) -> None:
        if self._torchrun:
            processes.stop([self._torchrun], 0.0)
            self._torchrun = None
        if self._port:
            self._port.close()
            self._port = None
