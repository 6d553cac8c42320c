"""Imports what an engine needs, and starts nothing; see `tests.engines.warm`."""

import gc

import vllm.entrypoints.llm
import vllm.model_executor.model_loader
import vllm.model_executor.models.llama
import vllm.v1.worker.cpu_worker  # noqa: F401

import tests.engines.vllm_worker  # noqa: F401

gc.freeze()  # else each engine looks through all of it
