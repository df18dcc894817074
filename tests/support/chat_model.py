"""A tokenizer with a chat template, and a policy with an engine that answers from a script."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config_builders import config_tree
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron_async_rl.config import load
from megatron_async_rl.data.tokenizer import Tokenizer
from megatron_async_rl.protocol.messages import Generate, Message, ScoreRequest, ScoreResult
from megatron_async_rl.protocol.types import Prompt, Sample, Segment
from megatron_async_rl.rollout.engine_client import RequestOutput, Sampling
from megatron_async_rl.rollout.gate import Gate
from megatron_async_rl.rollout.generation import Generator
from megatron_async_rl.rollout.policy import PolicyServices, SamplePolicy, ScoreClient
from megatron_async_rl.rollout.samples.partials import PartialStore
from megatron_async_rl.rollout.workflow import Workflow

START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def make_chat_tokenizer(folder: Path) -> Tokenizer:
    """Writes a tokenizer of characters and the two chat tokens; END ends a response."""
    words = [END, START, "<|unk|>", "\n", *map(chr, range(32, 127))]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.add_special_tokens([END, START])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


@dataclass
class Script:
    """Runs a workflow; its engine answers each call with the next text, cut at max_new_tokens."""

    tokenizer: Tokenizer
    texts: list[str]
    rewards: dict[str, float] = field(default_factory=dict)  # of a text; others have 0
    settings: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)  # beside `prompt`
    inputs: list[list[int]] = field(default_factory=list)  # of the calls
    scored: list[str] = field(default_factory=list)

    def run(self, workflow: Workflow, prompt: str, max_new_tokens: int = 200) -> Sample:
        """Returns the sample of `prompt`, which is a chat if data.chat_template is set."""
        room = {"model.context_tokens": 4096, "trainer.max_tokens_per_microbatch": 4096}
        config = load.from_tree(config_tree(**(room | self.settings)))
        text = prompt
        if config.data.chat_template:
            text = self.tokenizer.render_chat([{"role": "user", "content": prompt}])
        row = Prompt("0", self.tokenizer.encode(text), self.row | {"prompt": prompt})
        sampling = Sampling(
            max_new_tokens, 1.0, sorted(self.tokenizer.eos_ids), stop=config.rollout.stop
        )
        gate = Gate()
        gate.open()
        decode = self.tokenizer.decode_all
        generator = Generator(self, gate, lambda: None, config.model.context_tokens, 200, decode)  # type: ignore[arg-type]
        scores = ScoreClient(self._send, 1.0)
        services = PolicyServices(
            config, self.tokenizer, generator, PartialStore(), scores, self._send
        )
        self._scores = scores
        lease = Generate(1, 0, 1, [0], "train", row, max_new_tokens, 1.0)
        policy = SamplePolicy(services, lease, 0, None)
        return asyncio.run(workflow.run(row, policy, sampling))

    async def generate(
        self, ids: list[int], sampling: Sampling, cache_key: str | None, experts_from: None
    ) -> RequestOutput:
        """Answers like EngineClient.generate."""
        self.inputs.append(list(ids))
        answer = self.tokenizer.encode(self.texts.pop(0)).tolist()
        sampled = answer[: sampling.max_new_tokens]
        segment = Segment(len(self.inputs), sampled, [-0.5] * len(sampled))
        return RequestOutput([segment], "stop" if sampled == answer else "length")

    async def _send(self, message: Message) -> None:
        if isinstance(message, ScoreRequest):
            self.scored.append(message.response)
            reward = self.rewards.get(message.response, 0.0)
            self._scores.deliver(ScoreResult(message.key, reward, call=message.call))
