"""Lets peers take what is in a local lookup buffer, and insert: the end that is asked.

    held         what peers hold, by number
    selections   what they have taken, and not released yet
    tickets      room that they have, and not filled yet
    lanes        pipes to them, with a thread each
    service      what they may ask, and what they are answered

All of it comes back, whenever a peer dies.
"""

from connectors.lookup_service.service import LookupService

__all__ = ["LookupService"]
