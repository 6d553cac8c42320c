"""Lets peers take what is in a local lookup buffer, and insert: the end that is asked.

service      what a peer may ask, and what it is answered
selections   what peers have taken, and not released yet
tickets      room that peers have, and not filled yet
lanes        pipes to peers, with a thread each
"""

from connectors.lookup_service.service import LookupService

__all__ = ["LookupService"]
