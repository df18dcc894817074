"""SGLang's HTTP API, versions 0.5.16 to 0.5.23. Only this file knows the differences:

| from   | difference                                                                        |
|--------|-----------------------------------------------------------------------------------|
| 0.5.18 | a reply lists the weight versions of its tokens as spans, not as one version      |
| 0.5.21 | a weight update is enclosed in /begin_weight_update and /end_weight_update        |
| 0.5.21 | the prefix cache can be flushed while retracted requests are queued               |

Every call has a deadline and a key: the admin key where the server requires it, else the API key.
Any call raises EngineError, and EngineTimeout at its deadline.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec
import numpy as np

from megatron_async_rl.errors import EngineError, EngineTimeout
from megatron_async_rl.model.engine import engine_versions
from megatron_async_rl.protocol.types import Segment
from megatron_async_rl.protocol.weight_messages import Bucket, JoinGroup

OLDEST, NEWEST = (0, 5, 16), (0, 5, 23)
HEALTH_S = 5.0
PROBE_S = 30.0  # SGLang itself ends a probe after 20 s
KEEP_ALIVE_S = 2.0  # SGLang closes a connection after 5 idle seconds and loses a request sent then
LOAD_S = 1.0  # a heartbeat waits no longer for the server's figures
_HAS_SPANS, _HAS_SESSIONS = (0, 5, 18), (0, 5, 21)
_LOAD = {  # metric -> the field of a scheduler's load
    "running_requests": "num_running_reqs",
    "queued_requests": "num_waiting_reqs",
    "kv_use_fraction": "token_usage",
    "kv_capacity_tokens": "max_total_num_tokens",
    "cache_hit_fraction": "cache_hit_rate",
    "decode_tokens_per_s": "gen_throughput",
}


@dataclass(frozen=True)
class RequestOutput:
    """Tokens of one request. `stop` is "abort" if a weight update ended it early."""

    segments: list[Segment]
    stop: Literal["stop", "length", "abort"]
    num_cached: int = 0  # input tokens found in the prefix cache
    experts: np.ndarray | None = None  # [positions * layers * top_k] int32, see `generate`


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, by SGLang's names."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_token_ids: list[int]
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # texts; the server needs its tokenizer (rollout.stop)


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
        """Reads the server's SGLang version. Raises EngineError for an unsupported one."""
        info = await self._call("GET", "/server_info", None, self._api)
        self.version = engine_versions.parsed(info["version"])
        if not OLDEST <= self.version <= NEWEST:
            oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
            raise EngineError(
                f"SGLang {info['version']} is outside the supported {oldest} to {newest}; install "
                "a supported one in the engine's environment (tools/setup_env.sh)"
            )

    async def is_healthy(self) -> bool:
        return await self._answers("/health", HEALTH_S)

    async def can_generate(self) -> bool:
        """Generates one token: a server with a hanging scheduler may still answer other calls."""
        return await self._answers("/health_generate", PROBE_S)

    async def _answers(self, path: str, timeout_s: float) -> bool:
        try:
            await self._call("GET", path, None, self._api, timeout_s)
        except EngineError:
            return False
        return True

    async def load(self) -> dict[str, float]:
        """Returns the server's own figures by name; none if this SGLang has no such endpoint."""
        try:
            reply = await self._call("GET", "/v1/loads?include=core", None, self._api, LOAD_S)
            loads = reply["loads"]
            return {
                name: sum(float(load[key]) for load in loads)
                / (len(loads) if "fraction" in name else 1)
                for name, key in _LOAD.items()
                if all(key in load for load in loads)  # not every version has each
            }
        except (EngineError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return {}

    # ---- generation

    async def generate(
        self,
        ids: list[int],
        sampling: Sampling,
        cache_key: str | None = None,
        experts_from: int | None = None,
    ) -> RequestOutput:
        """Returns tokens, their logprobs under softmax(logits / temperature), and their versions.

        The logprobs are of all tokens, also if top_p, top_k or min_p left some out of the sampling.
        Cached prefixes are shared only among requests of the same `cache_key`. `experts_from`: also
        return the experts chosen for the tokens from this position on, but the last; a request that
        was aborted in the queue has none.
        """
        request: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": asdict(sampling) | {"top_k": sampling.top_k or -1},
            "return_logprob": True,
            "logprob_start_len": -1,  # of the response only
        }
        if cache_key is not None:
            request["extra_key"] = cache_key
        if experts_from is not None:
            request |= {"return_routed_experts": True, "routed_experts_start_len": experts_from}
        reply = await self._call("POST", "/generate", request, self._api, self._generate_timeout_s)
        output = self._output(reply)
        if experts_from is not None and output.experts is None and output.stop != "abort":
            raise EngineError(
                "the server returned no experts, which rollout.routing_replay needs; install a "
                "newer SGLang in its environment"
            )
        return output

    async def input_logprobs(
        self, ids: list[int], start: int, cache_key: str | None = None
    ) -> tuple[int, list[float]]:
        """Returns the version of the weights, and the logprobs of ids[start:] by one prefill.

        They are under softmax(logits): SGLang divides by a temperature for sampled tokens only. The
        version is -1 if an update aborted the request.
        """
        request: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start - 1,
        }
        if cache_key is not None:
            request["extra_key"] = cache_key
        reply = await self._call("POST", "/generate", request, self._api, self._generate_timeout_s)
        output = self._output(reply)
        if output.stop == "abort" or not output.segments:
            return -1, []
        wanted = ids[start:]
        found = reply["meta_info"].get("input_token_logprobs", [])[-len(wanted) :]
        # SGLang reports the last id of the vocabulary as 0
        same = all(t in (0, w) for (_, t, *_), w in zip(found, wanted, strict=False))
        if len(found) != len(wanted) or not same:
            raise EngineError("the server returned logprobs of other input tokens than asked for")
        return output.segments[0].version, [logprob for logprob, *_ in found]

    def _output(self, reply: dict[str, Any]) -> RequestOutput:
        meta = reply["meta_info"]
        reason = meta["finish_reason"]
        ids = reply.get("output_ids") or []
        token_logprobs = meta.get("output_token_logprobs") or []
        if [token for _, token, *_ in token_logprobs] != ids:
            num_logprobs = len(token_logprobs)
            raise EngineError(
                f"the server returned {len(ids)} tokens, but logprobs of {num_logprobs} others"
            )
        if reason["type"] not in ("stop", "length", "abort"):
            raise EngineError(f"the server ended a request with {reason}")
        if reason["type"] == "abort" and reason.get("status_code"):
            raise EngineError(f"the server refused a request: {reason.get('message')}")
        logprobs = [logprob for logprob, *_ in token_logprobs]
        segments = [
            Segment(version, ids[start:end], logprobs[start:end])
            for version, start, end in self._version_spans(meta, len(ids))
        ]
        experts = meta.get("routed_experts")
        if experts is not None:
            experts = np.frombuffer(base64.b64decode(experts), "<i4")
        return RequestOutput(segments, reason["type"], meta.get("cached_tokens", 0), experts)

    def _version_spans(self, meta: dict[str, Any], num_tokens: int) -> list[tuple[int, int, int]]:
        """Returns (version, start, end) over the output tokens, as the reply labels them."""
        if not num_tokens:
            return []
        if self.version >= _HAS_SPANS:
            spans = [(int(s["version"]), s["start"], s["end"]) for s in meta["weight_versions"]]
        else:
            spans = [(int(meta["weight_version"]), 0, num_tokens)]
        ends = [0, *(end for _, _, end in spans)]
        if [start for _, start, _ in spans] != ends[:-1] or ends[-1] != num_tokens:
            raise EngineError(
                f"the server's version spans {spans} do not cover its {num_tokens} tokens"
            )
        return spans

    async def abort_all(self) -> None:
        await self._post("/abort_request", {"abort_all": True})

    async def pause(self, mode: Literal["retract", "in_place"]) -> None:
        """Stops generation until `resume`; clients keep waiting for their requests.

        retract: running requests return to the queue without their KV cache; in_place: they freeze.
        The server accepts weights at once.
        """
        await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        # emptying the allocator's cache takes 10 to 30 ms, and the next update needs the memory
        await self._post("/continue_generation", {"torch_empty_cache": False})

    async def flush_cache(self, timeout_s: float = 0.0) -> None:
        """Drops all cached prefixes. Raises EngineError if requests still run after `timeout_s`."""
        await self._post(f"/flush_cache?timeout={max(timeout_s, 0.0):.3f}")

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
        await self._post("/init_weights_update_group", request)

    async def leave_group(self, group: str) -> None:
        await self._post("/destroy_weights_update_group", {"group_name": group})

    async def begin_update(self) -> None:
        if self.version >= _HAS_SESSIONS:
            await self._post("/begin_weight_update", {})

    async def receive_bucket(
        self, group: str, bucket: Bucket, flattened: bool, version: int | None, flush: bool = False
    ) -> None:
        """Receives one flattened broadcast, or one broadcast per tensor.

        Pass `version` with the last bucket: the server records it at each call. `flush` then drops
        all cached prefixes; a server that still runs a request crashes on it.
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
        await self._post("/update_weights_from_distributed", request)

    async def load_folder(self, folder: Path, version: int, flush: bool, timeout_s: float) -> None:
        """Loads all weights from a Hugging Face folder; `flush` as in `receive_bucket`."""
        request = {
            "model_path": str(folder),
            "load_format": "safetensors",  # overrides the server's own, such as dummy
            "weight_version": str(version),
            "flush_cache": flush,
        }
        await self._post("/update_weights_from_disk", request, timeout_s)

    async def relabel(self, version: int) -> None:
        """Labels tokens from now on with `version`; the weights stay the same."""
        request = {"new_version": str(version), "abort_all_requests": False}
        await self._post("/update_weight_version", request)

    async def end_update(self) -> None:
        if self.version >= _HAS_SESSIONS:
            await self._post("/end_weight_update", {})

    async def checksums(self) -> dict[str, str]:
        """Returns digests of the server's tensors by `rank:name`, with its fused names."""
        reply = await self._post("/weights_checker", {"action": "checksum"})
        return {
            f"{rank}:{name}": digest
            for rank, held in enumerate(reply["ranks"])
            for name, digest in held["checksums"].items()
            if not name.endswith(".gemma_weight")  # 1 + weight, which SGLang computes as it loads
        }

    async def served_version(self) -> str:
        """Returns the weight version that the server reports."""
        info = await self._call("GET", "/model_info", None, self._api)
        return str(info["weight_version"])

    async def close(self) -> None:
        await self._session.close()

    async def _post(
        self, path: str, request: dict[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """Makes a call that requires the admin key."""
        return await self._call("POST", path, request, self._admin, timeout_s)

    async def _call(
        self,
        method: str,
        path: str,
        request: dict[str, Any] | None,
        headers: dict[str, str],
        timeout_s: float | None = None,
    ) -> Any:
        """Returns the body of a successful reply. Raises EngineError with the server's message."""
        timeout_s = timeout_s or self._timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, self._base_url + path, json=request, headers=headers, timeout=timeout
            ) as reply:
                if reply.status != 200:
                    text = (await reply.text())[:500]
                    raise EngineError(f"{path} answered {reply.status}: {text}")
                # at a weight update hundreds of large replies arrive: standard json is too slow
                is_json = "json" in reply.content_type
                body = msgspec.json.decode(await reply.read()) if is_json else await reply.text()
        except TimeoutError:
            raise EngineTimeout(f"{path} did not answer within {timeout_s:.0f} s") from None
        except aiohttp.ClientError as e:
            raise EngineError(f"{path}: {type(e).__name__}: {e}") from None
        if isinstance(body, dict) and body.get("success") is False:
            raise EngineError(f"{path} failed: {body.get('message')}")
        return body
