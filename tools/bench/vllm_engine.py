"""A vLLM engine in a process of its own: takes one request a line as JSON, answers with one line each.

Run by `tools.demo_process.Child`. The engine's core and scheduler run in this process.
"""

from __future__ import annotations

import os
import time
from typing import Any

from tools.demo_process import serve

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


class Engine:
    """Commands; every answer is JSON."""

    def __init__(self) -> None:
        self._llm: Any = None

    def load(self, model: str, transfer: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
        """Start; ``transfer`` is vLLM's ``--kv-transfer-config``, the rest are arguments of `vllm.LLM`."""
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if transfer is not None:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._llm = LLM(model, skip_tokenizer_init=True, enforce_eager=True, seed=0, **settings)
        return {}

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int = 4,
        cache_salt: str | None = None,
        transfer_params: dict[str, Any] | None = None,
        **how: Any,
    ) -> list[dict[str, Any]]:
        """For each prompt its tokens, their log probabilities, how many prompt tokens were not computed,
        and what the connector hands over; ``how`` are arguments of `vllm.LLM.generate`."""
        from vllm import SamplingParams

        extra = {"kv_transfer_params": transfer_params} if transfer_params else None
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, detokenize=False, ignore_eos=True, logprobs=0, extra_args=extra
        )
        inputs = [{"prompt_token_ids": ids, **({"cache_salt": cache_salt} if cache_salt else {})} for ids in prompts]
        answers = []
        for output in self._llm.generate(inputs, params, use_tqdm=False, **how):
            tokens = list(output.outputs[0].token_ids)
            logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            handed_over = getattr(output, "kv_transfer_params", None)
            answers.append(
                {"tokens": tokens, "logprobs": logprobs, "cached": output.num_cached_tokens, "hand_over": handed_over}
            )
        return answers

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """How long it takes to answer all of them, and how many prompt tokens were not computed."""
        start = time.perf_counter()
        answers = self.generate(prompts, max_tokens)
        return {"seconds": time.perf_counter() - start, "cached": [answer["cached"] for answer in answers]}

    def first_tokens(self, prompts: list[list[int]]) -> dict[str, Any]:
        """Of requests that come at once: seconds from arrival to first token, and tokens not computed."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, ignore_eos=True)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = [output.metrics.first_token_latency for output in outputs]
        return {"seconds": seconds, "cached": [output.num_cached_tokens for output in outputs]}

    def settle_own(self, seconds: float) -> dict[str, Any]:
        """For a connector that is not ours: step for so long, that it may end what it stores."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._llm.llm_engine.step()
            time.sleep(0.01)
        return {}

    def reset(self, connector: bool) -> bool:
        """Empty the engine's own cache, and with ``connector`` what lies below it."""
        return bool(self._llm.reset_prefix_cache(reset_connector=connector))

    def settle(self, must_store: bool = True) -> dict[str, Any]:
        """Step until every job has been reported and all is durable, or cannot be; then each connector's stats."""
        connector = self._connector()
        while connector.has_pending_push_work():
            self._llm.llm_engine.step()
        children = getattr(connector, "_connectors", [connector])
        if not all([child.scheduler.flush(120) for child in children]) and must_store:
            raise RuntimeError("not everything was stored")
        return {"stats": [child.scheduler.stats() for child in children]}

    def forget_host(self) -> dict[str, Any]:
        """Empty the connector's host memory; what lies below it stays."""
        self._connector().scheduler._planes.forget_host()
        return {}

    def close(self) -> dict[str, Any]:
        self._llm.llm_engine.engine_core.shutdown()
        return {}

    def _connector(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler.connector


if __name__ == "__main__":
    serve(Engine())
