"""A vLLM engine in a process of its own: takes one request a line as JSON, answers with one line each.

Run by `tools.demo_process.Child`. The engine core runs in this process, its workers in others.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # this test changes weights in the workers
    "VLLM_NO_USAGE_STATS": "1",
}


def change_weights(worker: Any) -> None:
    """Runs in every worker: other weights, in place."""
    for name, parameter in worker.model_runner.model.named_parameters():
        if "input_layernorm" in name:  # matrices may have been packed for the CPU
            parameter.data[::2] *= -1


class Engine:
    def __init__(self) -> None:
        self._llm: Any = None

    def load(self, model: str, transfer: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        if transfer is not None:
            settings["kv_transfer_config"] = KVTransferConfig(**transfer)
        self._llm = LLM(
            model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=4096, seed=0,
            disable_log_stats=False, **settings,
        )  # fmt: skip
        return {}

    def generate(
        self, prompts: list[list[int]], max_tokens: int = 4, cache_salt: str | None = None
    ) -> list[dict[str, Any]]:
        """For each prompt its tokens, their log probabilities, and how many prompt tokens were not computed."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False, ignore_eos=True, logprobs=0)
        inputs = [{"prompt_token_ids": ids, **({"cache_salt": cache_salt} if cache_salt else {})} for ids in prompts]
        answers = []
        for output in self._llm.generate(inputs, params, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            answers.append({"tokens": tokens, "logprobs": logprobs, "cached": output.num_cached_tokens})
        return answers

    def abort(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Begin with these prompts, go some steps, and abort them all."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        for i, ids in enumerate(prompts):
            params = SamplingParams(max_tokens=64, temperature=0, detokenize=False, ignore_eos=True)
            engine.add_request(f"abort-{i}", {"prompt_token_ids": ids}, params)
        for _ in range(steps):
            engine.step()
        engine.abort_request([f"abort-{i}" for i in range(len(prompts))])
        while engine.has_unfinished_requests():
            engine.step()
        return {}

    def reset(self, connector: bool) -> bool:
        return bool(self._llm.reset_prefix_cache(reset_connector=connector))

    def change_weights(self) -> dict[str, Any]:
        self._llm.collective_rpc(change_weights)
        return {}

    def settle(self) -> dict[str, Any]:
        """Step until every job has been reported and all is durable; then what is stored."""
        connector = self._connector()
        while connector.has_pending_push_work():
            self._llm.llm_engine.step()
        children = getattr(connector, "_connectors", [connector])
        assert all(child.scheduler.flush(60) for child in children)
        return {"stats": [child.scheduler.stats() for child in children]}

    def metrics(self) -> dict[str, float]:
        """What /metrics shows of ours: "name{connector,tier}" -> value."""
        prefix = "vllm:kvstore_tier_"
        return {
            f"{metric.name.removeprefix(prefix)}{{{metric.labels['connector']},{metric.labels['tier']}}}": metric.value
            for metric in self._llm.get_metrics()
            if metric.name.startswith(prefix)
        }

    def forget_host(self) -> dict[str, Any]:
        self._connector().scheduler._planes.forget_host()
        return {}

    def close(self) -> dict[str, Any]:
        self._llm.llm_engine.engine_core.shutdown()
        return {}

    def _connector(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler.connector


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        command = getattr(engine, request.pop("command"))
        try:
            answer = {"answer": command(**request)}
        except Exception as e:
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
