"""Every error this package raises.

    KVStoreError
    ├── ConfigError              a setting is wrong: stops the start (also a ValueError)
    │   └── IdentityMismatchError  a directory holds KV of another model or layout
    ├── KeyFormatError           bytes that are not a block key (also a ValueError)
    ├── DamagedFileError         a file that was given is not what it should be (also a ValueError)
    ├── NotStoredError           what was asked for is not stored, or a key names several things
    ├── BlockNotReadyError       a block is still being written
    ├── NoRoomError              no slot could be had before the deadline
    ├── TierUnavailableError     a tier is off for now (full disk, vanished path, dead process)
    ├── StoreClosedError         the store was closed
    ├── UnsupportedModelError    a model's cache cannot be represented
    └── MissingExtraError        an optional package is not installed (also an ImportError)

A miss is a value, never an exception. Corruption is caught, counted and served as a miss.
"""

from __future__ import annotations

from collections.abc import Mapping


class KVStoreError(Exception):
    """Base of all errors of this package."""


class ConfigError(KVStoreError, ValueError):
    """A setting is wrong; the message names the key, what was given and what is allowed."""


class IdentityMismatchError(ConfigError):
    """A directory holds KV of another identity.

    Attributes:
        differences: field name -> (what the directory has, what was asked for).
    """

    def __init__(self, path: str, differences: Mapping[str, tuple[object, object]]) -> None:
        self.path = path
        self.differences = dict(differences)
        lines = [f"  {k}: directory has {a!r}, this store asks for {b!r}" for k, (a, b) in differences.items()]
        super().__init__(
            f"{path} holds KV of another identity:\n"
            + "\n".join(lines)
            + '\nUse another path, or on_mismatch="clear" to delete what is stored there.'
        )


class KeyFormatError(KVStoreError, ValueError):
    """Bytes given as a block key are not one."""


class DamagedFileError(KVStoreError, ValueError):
    """A file that was given is not what it should be; nothing of it was used."""


class NotStoredError(KVStoreError):
    """What was asked for is not stored; or a key names several things."""


class BlockNotReadyError(KVStoreError):
    """A block is still being written."""


class NoRoomError(KVStoreError):
    """No slot could be had before the deadline."""


class TierUnavailableError(KVStoreError):
    """A tier is off for now; what it would have served is a miss."""


class StoreClosedError(KVStoreError):
    """The store was closed."""


class UnsupportedModelError(KVStoreError):
    """A model's cache cannot be represented in blocks."""


class MissingExtraError(KVStoreError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'kvstore[{extra}]'")
