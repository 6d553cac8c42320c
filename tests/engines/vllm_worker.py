"""The benchmarks' engine process, and what tests do to it besides."""

from __future__ import annotations

import os
from typing import Any

from tools.bench.vllm_engine import Engine, serve

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for the function that changes weights in the workers
}


def change_weights(worker: Any) -> None:
    """Runs in every worker: other weights, in place."""
    for name, parameter in worker.model_runner.model.named_parameters():
        if "input_layernorm" in name:  # matrices may have been packed for the CPU
            parameter.data[::2] *= -1


class TestedEngine(Engine):
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

    def change_weights(self) -> dict[str, Any]:
        self._llm.collective_rpc(change_weights)
        return {}

    def metrics(self) -> dict[str, float]:
        """What /metrics shows of ours: "name{connector,tier}" -> value."""
        prefix = "vllm:kvstore_tier_"
        return {
            f"{metric.name.removeprefix(prefix)}{{{metric.labels['connector']},{metric.labels['tier']}}}": metric.value
            for metric in self._llm.get_metrics()
            if metric.name.startswith(prefix)
        }


if __name__ == "__main__":
    serve(TestedEngine())
