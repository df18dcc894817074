"""SGLang's HTTP API, versions 0.5.16 to 0.5.23: the one place that knows what changed between them.

| from   | what                                                                                         |
|--------|----------------------------------------------------------------------------------------------|
| 0.5.18 | a reply lists the weight versions of its tokens as spans; before, it names one version       |
| 0.5.21 | a weight update stands between /begin_weight_update and /end_weight_update                   |
| 0.5.21 | the prefix cache can be dropped while retracted requests are queued                          |

Every call has a deadline and carries a key: the admin key where the server asks for it, else the API key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from megatron_async_rl.errors import EngineError, EngineSilent
from megatron_async_rl.protocol.messages import Bucket, JoinGroup
from megatron_async_rl.protocol.types import Segment

OLDEST, NEWEST = (0, 5, 16), (0, 5, 23)
PROBE_S = 30.0  # SGLang itself gives up a probe after 20 s
KEEP_ALIVE_S = 2.0  # SGLang closes a connection that was idle for 5 s: what is sent over it at that moment is lost
_HAS_SPANS, _HAS_SESSIONS = (0, 5, 18), (0, 5, 21)


@dataclass(frozen=True)
class Part:
    """What one request came to: to its end, or as far as it was when an update aborted it."""

    segments: list[Segment]
    stop: Literal["stop", "length", "abort"]
    num_cached: int = 0  # tokens of the input that came out of the prefix cache


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_token_ids: list[int]


class EngineClient:
    def __init__(
        self,
        base_url: str,
        api_key: str,
        admin_key: str,
        timeout_s: float,
        generate_timeout_s: float,
    ) -> None:
        self._base_url = base_url
        self._timeout_s = timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._api = {"Authorization": f"Bearer {api_key}"}
        self._admin = {"Authorization": f"Bearer {admin_key}"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        )
        self.version: tuple[int, ...] = ()

    async def connect(self) -> None:
        """Learns which SGLang this is. Raises EngineError for one that this client does not speak."""
        info = await self._call("GET", "/server_info", None, self._api)
        self.version = tuple(int(part) for part in info["version"].split(".")[:3] if part.isdigit())
        if not OLDEST <= self.version <= NEWEST:
            raise EngineError(
                f"SGLang {info['version']} is outside the supported {_dotted(OLDEST)} to {_dotted(NEWEST)}; "
                f"install a supported one in the engine's environment (tools/setup_env.sh)"
            )

    async def healthy(self) -> bool:
        try:
            async with self._session.get(
                self._base_url + "/health", timeout=aiohttp.ClientTimeout(total=5)
            ) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def generates(self) -> bool:
        """Whether a token comes out of it: its scheduler may hang while its HTTP side answers everything else."""
        try:
            await self._call("GET", "/health_generate", None, self._api, PROBE_S)
        except EngineError:
            return False
        return True

    # ---- generation

    async def generate(
        self, ids: list[int], sampling: Sampling, cache_key: str | None = None
    ) -> Part:
        """Token ids and their logprobs under softmax(logits / temperature), by the weight version of each.

        A cached prefix is shared only with requests of the same `cache_key`.
        """
        request: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "stop_token_ids": sampling.stop_token_ids,
            },
            "return_logprob": True,
            "logprob_start_len": -1,  # of the response only
        }
        if cache_key is not None:
            request["extra_key"] = cache_key
        reply = await self._call("POST", "/generate", request, self._api, self._generate_timeout_s)
        return self._part(reply)

    def _part(self, reply: dict[str, Any]) -> Part:
        meta = reply["meta_info"]
        finish = meta["finish_reason"]["type"]
        ids = reply.get("output_ids") or []
        scored = meta.get("output_token_logprobs") or []
        if [token for _, token, *_ in scored] != ids:
            raise EngineError(
                f"the engine returned {len(ids)} tokens and logprobs of {len(scored)} others"
            )
        if finish not in ("stop", "length", "abort"):
            raise EngineError(f"the engine ended a request with {meta['finish_reason']}")
        if finish == "abort" and meta["finish_reason"].get("status_code"):
            raise EngineError(
                f"the engine refused a request: {meta['finish_reason'].get('message')}"
            )
        logprobs = [logprob for logprob, *_ in scored]
        segments = [
            Segment(version, ids[start:end], logprobs[start:end])
            for version, start, end in self._spans(meta, len(ids))
        ]
        return Part(segments, finish, meta.get("cached_tokens", 0))

    def _spans(self, meta: dict[str, Any], num_tokens: int) -> list[tuple[int, int, int]]:
        """(version, start, end) over the output tokens, from the reply and nowhere else."""
        if not num_tokens:
            return []
        if self.version >= _HAS_SPANS:
            spans = [(int(s["version"]), s["start"], s["end"]) for s in meta["weight_versions"]]
        else:
            spans = [(int(meta["weight_version"]), 0, num_tokens)]
        ends = [0, *(end for _, _, end in spans)]
        if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != num_tokens:
            raise EngineError(
                f"the engine's version spans {spans} do not cover its {num_tokens} tokens"
            )
        return spans

    async def abort_all(self) -> None:
        await self._call("POST", "/abort_request", {"abort_all": True}, self._admin)

    async def pause(self, mode: Literal["retract", "in_place"]) -> None:
        """Nothing is generated until `resume`. retract: running requests are queued again without their KV cache;
        in_place: they freeze as they are. Clients see nothing of it; a weight update waits for nobody."""
        await self._call("POST", "/pause_generation", {"mode": mode}, self._admin)

    async def resume(self) -> None:
        # giving the allocator's memory back takes 10 to 30 ms, and the next update would ask for it again
        await self._call("POST", "/continue_generation", {"torch_empty_cache": False}, self._admin)

    async def flush_cache(self, patience_s: float = 0.0) -> None:
        """Drops every cached prefix. Raises EngineError when requests still run after `patience_s`."""
        await self._call(
            "POST", f"/flush_cache?timeout={max(patience_s, 0.0):.3f}", None, self._admin
        )

    # ---- weights

    async def join_group(self, join: JoinGroup) -> None:
        request = {
            "master_address": join.address,
            "master_port": join.port,
            "rank_offset": join.rank_offset,
            "world_size": join.world_size,
            "group_name": join.group,
            "backend": join.backend,
        }
        await self._call("POST", "/init_weights_update_group", request, self._admin)

    async def leave_group(self, group: str) -> None:
        await self._call(
            "POST", "/destroy_weights_update_group", {"group_name": group}, self._admin
        )

    async def begin_update(self) -> None:
        if self.version >= _HAS_SESSIONS:
            await self._call("POST", "/begin_weight_update", {}, self._admin)

    async def receive_bucket(
        self, group: str, bucket: Bucket, flattened: bool, version: int | None, flush: bool = False
    ) -> None:
        """Takes in one flattened broadcast, or one per tensor; `version` with the last one: it is recorded per call.

        `flush` drops every cached prefix after it; an engine in which anything runs does not survive that.
        """
        request: dict[str, Any] = {
            "names": [tensor.name for tensor in bucket.tensors],
            "dtypes": [tensor.dtype for tensor in bucket.tensors],
            "shapes": [tensor.shape for tensor in bucket.tensors],
            "group_name": group,
            "flush_cache": flush,
        }
        if flattened:
            request["load_format"] = "flattened_bucket"
        if version is not None:
            request["weight_version"] = str(version)
        await self._call("POST", "/update_weights_from_distributed", request, self._admin)

    async def load_folder(self, folder: Path, version: int, flush: bool, timeout_s: float) -> None:
        """Takes all weights from a Hugging Face folder; `flush` as above."""
        request = {
            "model_path": str(folder),
            "load_format": "safetensors",  # whatever the server was started with, such as dummy
            "weight_version": str(version),
            "flush_cache": flush,
        }
        await self._call("POST", "/update_weights_from_disk", request, self._admin, timeout_s)

    async def relabel(self, version: int) -> None:
        """The weights stay; tokens sampled from now on bear this version."""
        request = {"new_version": str(version), "abort_all_requests": False}
        await self._call("POST", "/update_weight_version", request, self._admin)

    async def end_update(self) -> None:
        if self.version >= _HAS_SESSIONS:
            await self._call("POST", "/end_weight_update", {}, self._admin)

    async def checksums(self) -> dict[str, str]:
        """Digests of the tensors that the engine holds, by `rank:name` in its own fused names."""
        reply = await self._call("POST", "/weights_checker", {"action": "checksum"}, self._admin)
        return {
            f"{rank}:{name}": digest
            for rank, held in enumerate(reply["ranks"])
            for name, digest in held["checksums"].items()
        }

    async def served_version(self) -> str:
        """The weight version that the server says it holds."""
        info = await self._call("GET", "/model_info", None, self._api)
        return str(info["weight_version"])

    async def close(self) -> None:
        await self._session.close()

    async def _call(
        self,
        method: str,
        path: str,
        request: dict[str, Any] | None,
        headers: dict[str, str],
        timeout_s: float | None = None,
    ) -> Any:
        """The reply of a call that succeeded. Raises EngineError with the server's own words."""
        timeout_s = timeout_s or self._timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._base_url + path, json=request, headers=headers, timeout=timeout
            ) as reply:
                if reply.status != 200:
                    raise EngineError(
                        f"{path} answered {reply.status}: {(await reply.text())[:500]}"
                    )
                # replies with logprobs are big and come by the hundred at a weight update: not the slow standard json
                is_json = "json" in reply.content_type
                body = msgspec.json.decode(await reply.read()) if is_json else await reply.text()
        except TimeoutError:
            raise EngineSilent(f"{path} did not answer within {timeout_s:.0f} s") from None
        except aiohttp.ClientError as e:
            raise EngineError(f"{path}: {type(e).__name__}: {e}") from None
        if isinstance(body, dict) and body.get("success") is False:
            raise EngineError(f"{path} failed: {body.get('message')}")
        return body


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
