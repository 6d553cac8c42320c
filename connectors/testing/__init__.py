"""Conformance suites: inherit them and say how yours is made.

ConnectorTests   a connector's two halves
PipeTests        a transport: tensors and slots from one process to another
"""

from connectors.testing.connector import IDENTITY, Caches, ConnectorTests, PagedEngine, make_caches, make_keys
from connectors.testing.pipe import PipeTests

__all__ = ["IDENTITY", "Caches", "ConnectorTests", "PagedEngine", "PipeTests", "make_caches", "make_keys"]
