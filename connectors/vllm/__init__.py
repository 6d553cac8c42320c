"""Connectors for vLLM: its `KVConnectorBase_V1` over the engine-neutral halves.

Installed, vLLM knows them by name (entry point ``vllm.general_plugins``); else
``"kv_connector_module_path": "connectors.vllm"`` finds them. Tested with vLLM 0.32.
"""

from __future__ import annotations

from typing import Final

from connectors.vllm.connector import KVStoreConnector, KVStoreOffloadingConnector, KVStoreSharedStorageConnector
from connectors.vllm.peer_connectors import KVStoreNcclConnector, KVStoreNixlConnector, KVStoreTcpConnector

_CONNECTORS: Final = (
    KVStoreNcclConnector,
    KVStoreNixlConnector,
    KVStoreOffloadingConnector,
    KVStoreSharedStorageConnector,
    KVStoreTcpConnector,
)

__all__ = [
    "KVStoreConnector",
    "KVStoreNcclConnector",
    "KVStoreNixlConnector",
    "KVStoreOffloadingConnector",
    "KVStoreSharedStorageConnector",
    "KVStoreTcpConnector",
    "register",
]


def register() -> None:
    """Make the connectors known to vLLM; it calls this itself in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in (connector.__name__ for connector in _CONNECTORS):
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "connectors.vllm", name)
