"""One host's part of the trainer: takes part in each of its lives, with a torchrun of its own that it starts and stops.

All ranks of a life meet at the address that trainer-0's host publishes. A rank that dies on any host, a host that is
silent, or one that comes (back) begins the next life on all of them: from the checkpoint and the recorded batches.
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
from megatron_async_rl.errors import DataError, Error
from megatron_async_rl.launcher import roles
from megatron_async_rl.launcher.claims import Claims, run_key
from megatron_async_rl.launcher.supervisor import MAX_BACKOFF_S
from megatron_async_rl.node.generations import GenerationFiles, TrainerGeneration
from megatron_async_rl.observability.run_log import Status, read_status

logger = logging.getLogger(__name__)
POLL_S = 0.3
BEATS = 8  # signs of life in faults.heartbeat_timeout_s


class _NewLife(Exception):
    """The trainer has begun a life after ours."""


class Node:
    def __init__(self, config: Config, run_dir: Path, name: str) -> None:
        self._config = config
        self._run_dir = run_dir
        self._name = name
        self._index = config.trainer_names.index(name)
        self._lives = GenerationFiles(run_dir, name, config.trainer_names)
        self._claims = Claims(run_dir)
        self._owner = self._claims.owner(name)
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None  # trainer-0's, kept for as long as the life lasts
        self._run_key = b""
        self._began = False  # the run has been seen training
        self._over_since: float | None = None
        self._beat_at = 0.0

    def run(self) -> None:
        """To the end of the training. Raises Error when the run cannot go on."""
        controller = self._wait_for_the_controller()
        self._run_key = run_key(self._run_dir)
        try:
            self._take_part()
            while True:
                try:
                    address, port = self._meet(controller)
                    if port:
                        self._train(controller, address, port)
                    with contextlib.suppress(OSError):
                        self._lives.say(replace(self._lives.own, done=True))
                    return
                except _NewLife:
                    self._stop()
                    self._adopt(self._lives.look())
        finally:
            self._stop()

    # ---- which life

    def _take_part(self) -> None:
        """In the trainer's life if it waits for us; else ours is the death of it, and the next one begins."""
        newest = self._lives.look()
        if self._lives.of(self._name).life < newest.life and not newest.failed:
            self._adopt(newest)
        else:
            self._say(TrainerGeneration(newest.life + 1, why=f"{self._name} was started"))

    def _adopt(self, life: TrainerGeneration) -> None:
        logger.warning("life %d of the trainer: %s", life.life, life.why)
        self._say(TrainerGeneration(life.life, life.restarts, life.why))

    def _say(self, life: TrainerGeneration) -> None:
        """Again and again while it cannot be written: a full disk ends no run."""
        deadline = time.monotonic() + self._config.trainer.start_timeout_s
        while True:
            try:
                self._lives.say(life)
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    raise Error(
                        f"{self._name} cannot write below {self._run_dir}: {e}; make room there"
                    ) from None
                time.sleep(POLL_S)

    def _tick(self) -> None:
        """Raises _NewLife when there is one, Error when the run has failed or the name is another's."""
        owner = self._claims.owner(self._name)
        if owner != self._owner:
            raise Error(f"{self._name} was taken over: {owner} has it")
        if (
            run_key(self._run_dir) != self._run_key
        ):  # `run` was called again: our launcher starts us anew
            self._over_since = -math.inf
            return
        newest = self._lives.look()
        if newest.life >= self._lives.own.life and newest.failed:
            raise Error(newest.why)
        if newest.life > self._lives.own.life:
            raise _NewLife
        now = time.monotonic()
        if (
            self._lives.of(self._name) != self._lives.own
        ):  # by an earlier process that was stopped in the midst of it
            self._say(self._lives.own)
        elif now - self._beat_at > self._config.faults.heartbeat_timeout_s / BEATS:
            self._lives.beat()
            self._beat_at = now
        status = self._status()
        self._began = self._began or status.state == "training"
        if status.state not in ("failed", "stopped"):
            self._over_since = None
        elif self._over_since is None:
            self._over_since = now

    def _status(self) -> Status:
        try:
            return read_status(self._run_dir)
        except DataError:
            return Status()

    # ---- the way into a life

    def _wait_for_the_controller(self) -> str:
        """Its address. A status.json of an earlier start is gone when there is one."""
        limit_s = self._config.trainer.start_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            with contextlib.suppress(FileNotFoundError):
                if text := (self._run_dir / "controller.address").read_text().strip():
                    return text
            if time.monotonic() > deadline:
                raise Error(
                    f"{self._name} has waited for the controller for trainer.start_timeout_s = {limit_s:g} s"
                )
            time.sleep(POLL_S)

    def _meet(self, controller: str) -> tuple[str, int]:
        """Where the ranks of this life meet, once all nodes take part in it; port 0: the run is over."""
        life, limit_s = self._lives.own, self._config.trainer.start_timeout_s
        faults, began = self._config.faults, time.monotonic()
        pause_s = (
            min(faults.restart_backoff_s * 2 ** (life.restarts - 1), MAX_BACKOFF_S)
            if life.restarts
            else 0.0
        )
        first, said = self._config.trainer_names[0], ""
        while True:
            self._tick()
            if self._over_since is not None:
                return "", 0
            waited_s = time.monotonic() - began
            meeting = self._lives.of(first)
            absent = ", ".join(self._lives.absent())
            if not absent and meeting.port:
                return meeting.address, meeting.port
            if not absent and self._index == 0 and waited_s >= pause_s:
                self._publish(controller)
                continue
            awaited = f"{absent} to take part" if absent else f"{first} to say where the ranks meet"
            if awaited != said:
                logger.info(
                    "life %d of the trainer: %s waits for %s", life.life, self._name, awaited
                )
                said = awaited
            if waited_s > limit_s:
                remedy = f"start it with `join {self._run_dir} {absent or first}`, on its host or another"
                self._fail(
                    f"{self._name} has waited for {awaited} in life {life.life} of the trainer for "
                    f"trainer.start_timeout_s = {limit_s:g} s; {remedy}"
                )
            time.sleep(POLL_S)

    def _publish(self, controller: str) -> None:
        address = addresses.own_address(controller)
        self._port = addresses.reserve_port(address)
        self._say(replace(self._lives.own, address=address, port=self._port.getsockname()[1]))

    # ---- the life

    def _train(self, controller: str, address: str, port: int) -> None:
        """Until our ranks have ended well, or the run is over. Raises _NewLife."""
        life, faults = self._lives.own, self._config.faults
        logger.info(
            "life %d of the trainer: the ranks meet at %s, port %d", life.life, address, port
        )
        timeout_s = max(1, round(self._config.trainer.start_timeout_s))
        command = roles.torchrun(
            self._config,
            str(self._run_dir),
            *(
                f"--nnodes={len(self._config.trainer_names)}",
                "--rdzv-backend=bound",
                f"--rdzv-endpoint={address}:{port}",
            ),
            *(f"--rdzv-id=life-{life.life}", f"--rdzv-conf=rank={self._index},timeout={timeout_s}"),
        )
        log = self._run_dir / "logs" / f"{self._name}.log"
        network = addresses.collective_environment(
            controller.removeprefix("tcp://").rsplit(":", 1)[0]
        )
        self._torchrun = processes.start(command, log, network, sigterm_blocked=True)
        started = time.monotonic()
        while (code := self._torchrun.poll()) is None:
            self._tick()
            if (
                self._over_since is not None
                and time.monotonic() - self._over_since > faults.shutdown_grace_s
            ):
                return
            if silent := self._lives.silent(faults.heartbeat_timeout_s):
                self._died(
                    f"nothing heard of {silent[0]} for faults.heartbeat_timeout_s = {faults.heartbeat_timeout_s:g} s",
                    started,
                )
            time.sleep(POLL_S)
        self._tick()
        if code and self._over_since is None:
            self._died(f"{self._name} ended with exit code {code}", started)

    def _died(self, why: str, started: float) -> NoReturn:
        """Begins the next life, or ends the run where there may be none."""
        rules, life = self._config.faults, self._lives.own
        restarts = 0 if time.monotonic() - started > rules.restart_reset_s else life.restarts
        if not self._began:
            log = self._run_dir / "logs" / f"{self._name}.log"
            self._fail(
                f"{why} before the first training step: {processes.error_text(log) or f'its log is {log}'}"
            )
        if restarts >= rules.max_restarts:
            self._fail(
                f"the trainer died {restarts + 1} times (faults.max_restarts = {rules.max_restarts}); {why}"
            )
        self._say(TrainerGeneration(life.life + 1, restarts + 1, why))
        raise _NewLife

    def _fail(self, why: str) -> NoReturn:
        """Ends the run on all hosts."""
        with contextlib.suppress(OSError):
            self._lives.say(
                TrainerGeneration(self._lives.own.life, self._lives.own.restarts, why, failed=True)
            )
        raise Error(why)

    def _stop(self) -> None:
        if self._torchrun:
            processes.stop([self._torchrun], 0.0)
            self._torchrun = None
        if self._port:
            self._port.close()
            self._port = None
