"""Whom a control channel trusts: a folder with a host's own CURVE key pair and its peers' public keys.

    <folder>/secret.key     never leaves the host; mode 0600
    <folder>/public.key     to be copied to each peer, as <its folder>/peers/<any name>.key
    <folder>/peers/*.key    public keys of the peers that are let in

Each file is one line, a key in Z85. Who can write the folder decides who is let in, so one that
others may write is refused. Keys are read once: after a change the server is started again.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from kvstore.errors import ConfigError

KEY_NCHARS: Final = 40
_Z85: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_DIGITS: Final = {char: i for i, char in enumerate(_Z85)}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveKeys:
    """A host's key pair, and the public keys of its peers.

    Attributes:
        peers: name -> public key. A server lets these in; of a client it is where to look up the
            ``server_key`` of the server it asks.
    Raises:
        ConfigError: one of them is no key.
    """

    public: str
    secret: str = field(repr=False)
    peers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, key in {"public": self.public, "secret": self.secret, **self.peers}.items():
            if not is_key(key):
                raise ConfigError(f"keys: {what} is no key; a key is {KEY_NCHARS} characters of Z85")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `generate` made, and the peers' keys that were put beside it.

        Raises:
            ConfigError: a file is missing, is no key, or can be read (the secret) or written (any) by
                others; the message names it and says what to do.
        """
        folder = Path(folder)
        _only_ours_to_write(folder, missing=f"make one with: kvstore keygen {folder}")
        secret = _read_key(folder / "secret.key", missing=f"make one with: kvstore keygen {folder}", is_secret=True)
        public = _read_key(folder / "public.key", missing="it was made with secret.key; copy it back from a peer")
        peers_folder, peers = folder / "peers", {}
        if os.path.lexists(peers_folder):
            _only_ours_to_write(peers_folder, missing="make it, and put the peers' public keys there")
            for path in sorted(peers_folder.glob("*.key")):
                peers[path.stem] = _read_key(path, missing="copy it there again")
        return cls(public=public, secret=secret, peers=peers)


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """Where `generate` has put things."""

    folder: Path
    name: str
    public: str

    @property
    def secret_path(self) -> Path:
        return self.folder / "secret.key"

    @property
    def public_path(self) -> Path:
        return self.folder / "public.key"

    @property
    def peers_path(self) -> Path:
        return self.folder / "peers"


def generate(folder: str | Path, name: str | None = None) -> KeyFiles:
    """Make a key pair, and an empty folder for the keys of peers. Never overwrites a secret.

    Args:
        name: what peers may call this host, in ``peers/<name>.key``; by default its host name.
    Raises:
        ConfigError: there is a secret already, the folder cannot be written or is writable by others,
            or ``name`` cannot be a file's.
        MissingExtraError: pyzmq is not installed.
    """
    name = _host_name() if name is None else name
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: {name!r} cannot be a file's; give up to 64 letters, digits, dots and dashes")
    from connectors.control import make_key_pair

    public, secret = make_key_pair()
    files = KeyFiles(Path(folder), name, public)
    try:
        files.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _only_ours_to_write(files.folder, missing="give another one")
        _write_new(files.secret_path, secret, 0o600)
        try:
            files.public_path.unlink(missing_ok=True)  # of a secret that is gone
            _write_new(files.public_path, public, 0o644)
            files.peers_path.mkdir(mode=0o700, exist_ok=True)
        except BaseException:
            files.secret_path.unlink()
            raise
    except FileExistsError as e:
        if os.path.lexists(files.secret_path):
            raise ConfigError(
                f"{files.secret_path} exists and is not overwritten; give another folder, or remove it "
                "if no peer trusts it any more"
            ) from e
        raise ConfigError(f"{e.filename} is in the way; give another folder") from e
    except OSError as e:
        raise ConfigError(f"{e.filename}: cannot be written ({e.strerror}); give another folder") from e
    return files


def is_key(text: str) -> bool:
    """Whether it is a key in Z85: 40 characters, each five of them below 2**32."""
    return len(text) == KEY_NCHARS and all(char in _DIGITS for char in text) and max(_words(text)) < 1 << 32


def key_bytes(key: str) -> bytes:
    """The 32 bytes of a key in Z85."""
    return b"".join(word.to_bytes(4, "big") for word in _words(key))


def _words(key: str) -> list[int]:
    words = []
    for start in range(0, KEY_NCHARS, 5):
        word = 0
        for char in key[start : start + 5]:
            word = word * 85 + _DIGITS[char]
        words.append(word)
    return words


def _read_key(path: Path, *, missing: str, is_secret: bool = False) -> str:
    try:
        # Not blocking: a FIFO of that name must not hang the start.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise ConfigError(f"{path} is missing; {missing}") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror})") from e
    with open(fd, "rb") as f:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no file; {missing}")
        if is_secret:
            check_only_ours_to_read(path, status)
        _check_not_writable(path, status)
        data = f.read(KEY_NCHARS + 2)
    text = data.decode("ascii", "replace").removesuffix("\n")
    if not is_key(text):
        raise ConfigError(f"{path} is no key: a key file is one line of {KEY_NCHARS} characters of Z85; {missing}")
    return text


def check_only_ours_to_read(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {status.st_uid}; run: chown {os.geteuid()} {path}")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"{path} can be read by others (mode {stat.S_IMODE(status.st_mode):o}); run: chmod 600 {path}, "
            "and make a new key where others may have read it"
        )


def _only_ours_to_write(folder: Path, *, missing: str) -> None:
    try:
        status = folder.stat()
    except OSError as e:
        raise ConfigError(f"{folder} cannot be read ({e.strerror}); {missing}") from e
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{folder} is no directory; {missing}")
    _check_not_writable(folder, status)


def _check_not_writable(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{path} belongs to user {status.st_uid}; run: chown {os.geteuid()} {path}")
    if status.st_mode & 0o022:
        raise ConfigError(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}); run: chmod go-w {path}"
        )


def _write_new(path: Path, key: str, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with open(fd, "w", encoding="ascii") as f:
            os.fchmod(fd, mode)
            f.write(key + "\n")
            f.flush()
            os.fsync(fd)
    except BaseException:
        path.unlink()
        raise


def _host_name() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip(".-_")[:64]
    return name or "host"
