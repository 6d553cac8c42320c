"""Conformance suites: inherit them and say how yours is made.

ConnectorTests   a connector's two halves
"""

from connectors.testing.connector import IDENTITY, Caches, ConnectorTests, PagedEngine, make_caches, make_keys

__all__ = ["IDENTITY", "Caches", "ConnectorTests", "PagedEngine", "make_caches", "make_keys"]
