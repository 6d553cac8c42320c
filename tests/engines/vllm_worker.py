"""The benchmarks' engine process, and what tests do to it besides."""

from __future__ import annotations

import os
from typing import Any

from tests.engines.vllm_settings import SETTINGS
from tools.bench.vllm_engine import Engine
from tools.demo_process import serve

os.environ |= SETTINGS


def change_weights(worker: Any) -> None:
    """Runs in every worker: other weights, in place."""
    for name, parameter in worker.model_runner.model.named_parameters():
        if "input_layernorm" in name:  # matrices may have been packed for the CPU
            parameter.data[::2] *= -1


class TestedEngine(Engine):
    def __init__(self) -> None:
        super().__init__()
        self._adapters: dict[str, int] = {}

    def load(
        self, model: str, transfer: dict[str, Any] | None, events_endpoint: str = "", **settings: Any
    ) -> dict[str, Any]:
        from vllm.config import KVEventsConfig

        if events_endpoint:
            settings["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, endpoint=events_endpoint)
        return super().load(model, transfer, **settings)

    def adapted(self, prompts: list[list[int]], name: str, path: str) -> list[dict[str, Any]]:
        """Generate with a LoRA adapter."""
        from vllm.lora.request import LoRARequest

        number = self._adapters.setdefault(path, len(self._adapters) + 1)
        return self.generate(prompts, lora_request=LoRARequest(name, number, path))

    def break_load(self) -> dict[str, Any]:
        """Let the next copy from host memory to the engine raise."""
        from connectors.pages import PageCopier

        load = PageCopier.load

        def fail(*arguments: Any) -> None:
            PageCopier.load = load  # type: ignore[method-assign]
            raise OSError("broken by a test")

        PageCopier.load = fail  # type: ignore[method-assign]
        return {}

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

    def follow_events(self, endpoint: str) -> dict[str, Any]:
        """Subscribe to the KV events that the engine publishes there."""
        import zmq

        self._events = zmq.Context.instance().socket(zmq.SUB)
        self._events.subscribe(b"")
        self._events.connect(endpoint)
        return {}

    def events(self) -> list[list[Any]]:
        """What was published since the last call: kind, medium, tier, number of blocks, KV cache group."""
        import msgspec
        import zmq
        from vllm.distributed.kv_events import KVEventBatch

        decoder, found = msgspec.msgpack.Decoder(KVEventBatch), []
        while self._events.poll(100):
            payload = self._events.recv_multipart(zmq.NOBLOCK)[-1]
            found += decoder.decode(payload).events
        return [
            [type(event).__name__, event.medium, event.ownership, len(event.block_hashes), event.group_idx]
            for event in found
            if getattr(event, "ownership", None)
        ]

    def scheduler_name(self) -> str:
        return type(self._llm.llm_engine.engine_core.engine_core.scheduler).__name__

    def preemptions(self) -> float:
        """Since the start."""
        return sum(metric.value for metric in self._llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def hit_sources(self) -> dict[str, float]:
        """Prompt tokens from caches by source, as /metrics shows them."""
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if "source" in metric.labels and "cache" in metric.name:
                found[metric.labels["source"]] = found.get(metric.labels["source"], 0) + metric.value
        return found

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
