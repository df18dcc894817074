"""Agents for whole runs that know nothing of the project; faults of theirs and of the server."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import anthropic
import openai
import psutil
from framework_agent import calculator

NUM_TURNS = 3
MAX_STEPS = 2
KINDS = ("openai", "smolagents", "anthropic")  # by the number in the row
FAULTS = "AGENT_FAULTS"  # variable with a folder; an empty one is full of faults to come
KILL_SERVER_AT = 40  # episodes


def kind_of(row: dict[str, Any]) -> str:
    return KINDS[int(row["answer"]) // 2 % len(KINDS)]


def converses(row: dict[str, Any], client: Any) -> float:
    """Runs the row's kind of agent. The reward is the fraction of even digits in its answers."""
    misbehave()
    text = AGENTS[kind_of(row)](row)
    digits = [int(character) for character in text if character.isdigit()]
    return sum(digit % 2 == 0 for digit in digits) / len(digits) if digits else 0.0


def with_openai(row: dict[str, Any]) -> str:
    """Converses for three turns; every other row then asks from the start, which is a branch."""
    policy, answers = openai.OpenAI(max_retries=0), []

    def ask(messages: list[Any]) -> str:
        stream = policy.chat.completions.create(
            model="policy", messages=messages, max_completion_tokens=24, stream=True
        )
        parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        answers.append("".join(part or "" for part in parts))
        return answers[-1]

    messages = [{"role": "user", "content": row["prompt"]}]
    for _ in range(NUM_TURNS):
        messages.append({"role": "assistant", "content": ask(messages)})
        messages.append({"role": "user", "content": "no,1+1="})
    if int(row["answer"]) // 2 % 2:
        ask([{"role": "user", "content": "again:" + row["prompt"]}])
    return "".join(answers)


def with_anthropic(row: dict[str, Any]) -> str:
    policy, messages = anthropic.Anthropic(max_retries=0), [user(row["prompt"])]
    answers = []
    for _ in range(2):
        reply = policy.messages.create(model="policy", messages=messages, max_tokens=24)
        answers.append(reply.content[0].text)
        messages += [{"role": "assistant", "content": reply.content}, user("no,1+1=")]
    return "".join(answers)


def with_smolagents(row: dict[str, Any]) -> str:
    return str(calculator(MAX_STEPS, 24).run(row["prompt"]))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


AGENTS = {"openai": with_openai, "smolagents": with_smolagents, "anthropic": with_anthropic}


def misbehave() -> None:
    """Each fault is made by one episode of a run."""
    if FAULTS not in os.environ:
        return
    folder = Path(os.environ[FAULTS])
    if is_first(folder / "killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_first(folder / "raised"):
        raise RuntimeError("of the agent")
    with (folder / "episodes").open("ab") as file:
        file.write(b".")
        num_episodes = file.tell()
    if num_episodes > KILL_SERVER_AT and is_first(folder / "server"):
        kill_server(folder / "error")


def is_first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def kill_server(log: Path) -> None:
    """Kills the SGLang server while it streams; writes the client's result to `log`."""
    host = psutil.Process(os.getppid())
    worker = host.parent()
    assert worker
    [server] = [c for c in worker.children() if any("launch" in word for word in c.cmdline())]
    server.suspend()  # so the request is in flight for certain
    if not (child := os.fork()):
        os.setsid()  # else this client would end with the agent, before it can write
        try:
            with openai.OpenAI(max_retries=0, timeout=60).chat.completions.create(
                model="policy", messages=[user("1+1=")], stream=True
            ) as stream:
                error = f"{list(stream)}"
        except openai.OpenAIError as e:
            error = f"{type(e).__name__}: {e}"
        log.write_text(error)
        os._exit(0)
    while not psutil.Process(child).net_connections():
        time.sleep(0.01)
    time.sleep(2)  # until its worker has sent the request on
    server.kill()
    time.sleep(1000)  # this agent too ends with its worker
