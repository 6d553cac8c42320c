"""Which arguments of ``generate`` go with a cache that holds one row of plain tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from kvstore.errors import ConfigError

# What `generate` passes on beside the settings of a GenerationConfig: nothing that changes the KV.
PASSED_ON: Final = {
    "attention_mask",
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
    "use_model_defaults",
}
# Settings whose cache is not one row that grows by the tokens that come out; value: what is allowed.
ONE_ROW: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
    "token_healing": (None, False),
    "is_assistant": (None, False),
}


def check_settings(given: Mapping[str, Any], default: Any) -> None:
    """Check arguments of ``generate``.

    Args:
        default: the model's GenerationConfig, in effect unless another is given.
    Raises:
        ConfigError: one is unknown, or asks for what can't be done right.
    """
    config = given.get("generation_config") or default
    known = set(config.to_dict()) | set(ONE_ROW) | PASSED_ON
    for name in given:
        if name not in known:
            raise ConfigError(f"{name}: not an argument of PrefixCache.generate; its prompts are tokens only")
    for name, allowed in ONE_ROW.items():
        value = given.get(name, getattr(config, name, None))
        if value not in allowed:
            raise ConfigError(f"{name}: {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
