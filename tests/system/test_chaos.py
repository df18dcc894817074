"""The faults of tools/chaos are real.

Silent network partitions, jumps of the wall clock, a NaN loss, and an audit of the journal up to
any event.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from journal_builders import journal_events
from needs import needs_network_namespaces
from paths import ROOT, TOOLS

from megatron_async_rl.cli import audit
from megatron_async_rl.controller.journal.events import GroupAdmitted, GroupDropped
from megatron_async_rl.controller.journal.journal import JOURNAL_FILE, Journal, last_seq


def run_in_namespaces(folder: Path, code: str) -> list[str]:
    """Runs the code inside namespaces of its own; returns the words it prints."""
    program = folder / "program.py"
    program.write_text(
        "import subprocess, sys, os, time\nfrom pathlib import Path\n"
        "from chaos_parts import namespaces\nnamespaces.enter()\n"
        f"job = namespaces.Namespaces(Path({str(folder / 'chaos')!r}))\n{code}"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOLS / "chaos"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


PARTITION = """
import socket
job.make_hosts()
server = socket.create_server((namespaces.HOST_A, 0))
sender = f'''
import socket, time
link = socket.create_connection(("{namespaces.HOST_A}", {server.getsockname()[1]}))
while True:
    link.send(b"x")
    time.sleep(0.02)
'''
host_b = subprocess.Popen(["ip", "netns", "exec", "b", sys.executable, "-c", sender])
link, _ = server.accept()

def count_received(seconds):
    end, count = time.monotonic() + seconds, 0
    link.settimeout(0.1)
    while time.monotonic() < end:
        try:
            count += len(link.recv(1000))
        except TimeoutError:
            pass
    return count

link.settimeout(20)
print(len(link.recv(1)) > 0)
job.partition(namespaces.HOST_A)
count_received(0.3)  # what was in flight
print(count_received(1.0), host_b.poll())
job.heal(namespaces.HOST_A)
print(count_received(5.0) >= 50)
host_b.kill()
host_b.wait()
"""


@needs_network_namespaces
def test_partition_is_silent_and_healed_connections_lose_nothing(
    tmp_path: Path,
) -> None:
    assert run_in_namespaces(tmp_path, PARTITION) == ["True", "0", "None", "True"]


CLOCKS = '''
look = """
import time
wall, monotonic = time.time(), time.monotonic()
print("ready", flush=True)
input()
print(time.time() - wall, time.monotonic() - monotonic)
"""
environment = {**os.environ, **job.environment()}
jumping, other = (
    subprocess.Popen(
        [sys.executable, "-c", look], env=environment, stdin=-1, stdout=-1, text=True
    )
    for _ in range(2)
)
for process in (jumping, other):
    process.stdout.readline()
job.move_clock(jumping.pid, -3600)
for process in (jumping, other):
    wall, monotonic = map(float, process.communicate("\\n")[0].split())
    print(round((wall - monotonic) / 60))
'''


@needs_network_namespaces
def test_clock_jump_affects_one_process_and_no_monotonic_time(tmp_path: Path) -> None:
    assert run_in_namespaces(tmp_path, CLOCKS) == ["-60", "0"]


def test_nan_flag_affects_exactly_one_loss(tmp_path: Path) -> None:
    """With a stand-in for the trainer's loss: the test is of the wrapper at its import."""
    package = tmp_path / "megatron_async_rl" / "trainer"
    (package / "algorithms").mkdir(parents=True)
    for folder in (package / "algorithms", package, package.parent):
        (folder / "__init__.py").touch()
    (package / "algorithms" / "loss.py").write_text(
        "def policy_loss(inputs, config):\n    return 1.0, {}\n"
    )
    (package / "__main__.py").write_text(
        "from megatron_async_rl.trainer.algorithms.loss import policy_loss\n"
        "print(*[policy_loss(None, None)[0] for _ in range(3)])\n"
    )
    (tmp_path / "nan").touch()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_async_rl.trainer"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(TOOLS / "chaos" / "chaos_parts" / "hooks"), str(tmp_path)]
            ),
        }
        | {"CHAOS_FOLDER": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["nan", "1.0", "1.0"]


def test_audit_balances_at_every_journal_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL_FILE)
    events = journal_events()
    journal.append(events)
    journal.close()
    assert last_seq(tmp_path / JOURNAL_FILE) == len(events)
    for until in range(len(events) + 1):
        result = audit.audit(tmp_path, 4, until=until)
        seen = events[:until]
        assert result.admitted == sum(isinstance(event, GroupAdmitted) for event in seen)
        assert result.dropped.total() == sum(isinstance(event, GroupDropped) for event in seen)
        assert result.lost == result.duplicated == 0 and not [
            b for b in result.breaches if "unaccounted" in b
        ]
