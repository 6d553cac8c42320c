"""Connectors for vLLM: its `KVConnectorBase_V1` over the engine-neutral halves.

Installed, vLLM knows them by name (entry point ``vllm.general_plugins``); else
``"kv_connector_module_path": "connectors.vllm"`` finds them. Tested with vLLM 0.32.
"""

from __future__ import annotations

from typing import Final

from connectors.vllm.connector import KVStoreConnector, KVStoreOffloadingConnector, KVStoreSharedStorageConnector

__all__ = ["KVStoreConnector", "KVStoreOffloadingConnector", "KVStoreSharedStorageConnector", "register"]

_NAMES: Final = ("KVStoreOffloadingConnector", "KVStoreSharedStorageConnector")


def register() -> None:
    """Make the connectors known to vLLM; it calls this itself in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in _NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "connectors.vllm", name)
