"""Connectors that hand KV from one vLLM server to another, without storage between them.

    KVStoreTcpConnector    plain sockets
    KVStoreNcclConnector   torch.distributed: gloo where there is no GPU
    KVStoreNixlConnector   one-sided reads (UCX)

They differ in the pipe; see `connectors.hand_over` for the rest.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from urllib.parse import urlsplit

import torch

from connectors.base import SchedulerHalf, Stripe, WorkerHalf
from connectors.control import checked_address
from connectors.curve_keys import CurveKeys
from connectors.hand_over import HandOverScheduler
from connectors.hand_over_told import HandOverConfig
from connectors.offloading_worker import OffloadingWorker
from connectors.pipe import PipeEnd
from connectors.registration import LEASE_S, Joins, PeerAddress, Registration, Role, read_secret
from connectors.vllm.connector import KVStoreConnector
from connectors.vllm.settings import EXTRA_CONFIG, Settings, named_in
from connectors.wire.rendezvous import is_loopback, listen_on
from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity
from kvstore.slot import Rows

if TYPE_CHECKING:
    from connectors.nixl_process.life import ProcessHold

_GIB: Final = 1 << 30
_NOT_HERE: Final = (  # tiers belong to a connector beside this one, and a block is what is handed over
    "block_size", "disk_path", "disk_capacity_bytes", "disk_on_mismatch",
    "shared_storage_path", "shared_capacity_bytes",
)  # fmt: skip
_REGISTER: Final = ("register_at", "serve_at", "register_key_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """Args:
    listen: address of the control channel, ``tcp://host:port``; port 0 takes a free one.
    advertise: the one that other hosts reach it at; by default ``listen``.
    keys_path: folder that ``kvstore keygen`` made; needed beyond loopback.
    lease_s: how long what nobody takes is held.
    transfer_timeout_s: deadline of one transfer.
    push: send blocks to the decode server that the proxy names, before it asks for them.
    register_at: URL of a proxy that this server registers with; needs the two below.
    serve_at: URL that the proxy reaches this server's API at.
    register_key_file: the secret that the proxy and its servers share.
    """

    listen: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    keys_path: str | None = None
    lease_s: float = 60.0
    transfer_timeout_s: float = 30.0
    push: bool = False
    register_at: str | None = None
    serve_at: str | None = None
    register_key_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("lease_s", "transfer_timeout_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
                raise ConfigError(f"{name}: {value!r}; give seconds, above 0 and up to 3600")
        if not isinstance(self.push, bool):
            raise ConfigError(f"push: {self.push!r}; give true or false")
        for name in ("listen", "advertise", "keys_path", *_REGISTER):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}: {value!r}; give a text")
        given = [name for name in _REGISTER if getattr(self, name) is not None]
        if given and len(given) < len(_REGISTER):
            missing = ", ".join(name for name in _REGISTER if name not in given)
            raise ConfigError(f"{given[0]}: {getattr(self, given[0])!r} needs {missing} too")

    @classmethod
    def split(cls, extra: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """These settings, and what is left."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{name: extra[name] for name in names if name in extra}), {
            name: value for name, value in extra.items() if name not in names
        }


class PeerConnector(KVStoreConnector):
    """What they have in common.

    ``kv_connector_extra_config``: see `PeerSettings`, and `connectors.vllm.settings.Settings` for
    host memory. A ``kv_producer`` hands over, a ``kv_consumer`` takes.
    """

    transport: ClassVar[str]
    _host: str
    _registered: Registration | None = None

    @abstractmethod
    def make_end(self, rows: Rows, is_server: bool, offer_fd: int | None, host: str) -> PipeEnd:
        """A pipe's end.

        Args:
            offer_fd: the memfd that rows are, where the peer may take them.
            host: the address that a server's end listens at, and is reached at.
        """

    def configure(self, identity: KVIdentity, extra: Mapping[str, Any]) -> None:
        with named_in(EXTRA_CONFIG):
            mine, others = PeerSettings.split(extra)
            self._store_config = Settings.of(others, (), _NOT_HERE).store_config(
                identity, default_host_nbytes=_GIB, event_log_blocks=self._event_log_blocks
            )
            keys = CurveKeys.load(Path(mine.keys_path)) if mine.keys_path is not None else None
            self._register = None if mine.register_at is None else self._registration(mine)
            self._host = host = reached_at(mine, keys)
        self._hand_over = HandOverConfig(
            transport=self.transport,
            make_end=lambda rows, is_server, offer_fd: self.make_end(rows, is_server, offer_fd, host),
            listen=mine.listen,
            advertise=mine.advertise,
            keys=keys,
            hands_over=self._kv_transfer_config.is_kv_producer,
            takes=self._kv_transfer_config.is_kv_consumer,
            lease_s=mine.lease_s,
            transfer_s=mine.transfer_timeout_s,
            push=mine.push,
        )

    def make_scheduler(self, num_workers: int, windows: Sequence[int | None]) -> SchedulerHalf:
        with named_in(EXTRA_CONFIG):
            if self._hand_over.hands_over:  # who only takes connects to others, unless they push
                check_listens(self._host)
            half = HandOverScheduler(self._store_config, num_workers, windows, hand_over=self._hand_over)
        try:
            if self._register is not None:
                self._registered = self._register(PeerAddress(address=half.address, key=half.public_key))
        except BaseException:
            half.close()
            raise
        return half

    def shutdown(self) -> None:
        registered, self._registered = self._registered, None
        try:
            if registered is not None:
                registered.close()  # first: nothing new is sent here
        finally:
            super().shutdown()

    def _registration(self, settings: PeerSettings) -> Callable[[PeerAddress], Registration]:
        """What registers this server, once it is known where its control channel listens."""
        proxy, serve_at, key_file = settings.register_at, settings.serve_at, settings.register_key_file
        assert proxy is not None and serve_at is not None and key_file is not None
        if urlsplit(serve_at).scheme not in ("http", "https"):
            raise ConfigError(f"serve_at: {serve_at!r}; give a URL, like http://10.0.0.2:8001")
        secret, role = read_secret(key_file), self._kv_transfer_config
        as_role: Role = (
            "both" if role.is_kv_producer and role.is_kv_consumer else ("prefill" if role.is_kv_producer else "decode")
        )

        def register(peer: PeerAddress) -> Registration:
            return Registration(proxy, secret, Joins(role=as_role, url=serve_at, lease_s=LEASE_S, peer=peer))

        return register

    def make_worker(self, stripe: Stripe, groups: Sequence[Sequence[torch.Tensor]]) -> WorkerHalf:
        return OffloadingWorker(stripe, groups, 1)


class KVStoreTcpConnector(PeerConnector):
    """Hands KV over by plain sockets."""

    transport = "tcp"

    def make_end(self, rows: Rows, is_server: bool, offer_fd: int | None, host: str) -> PipeEnd:
        from connectors.tcp import TcpEnd

        return TcpEnd(rows, is_server=is_server, listen=host)


class KVStoreNcclConnector(PeerConnector):
    """Hands KV over by torch.distributed.

    ``device`` in ``kv_connector_extra_config``: a CUDA device, by whose memory NCCL moves blocks; by default
    gloo, from host memory to host memory. The same kind at both ends.
    """

    transport = "nccl"
    _device: torch.device | None = None

    def configure(self, identity: KVIdentity, extra: Mapping[str, Any]) -> None:
        others = dict(extra)
        with named_in(EXTRA_CONFIG):
            self._device = _device_of(others.pop("device", None))
        super().configure(identity, others)

    def make_end(self, rows: Rows, is_server: bool, offer_fd: int | None, host: str) -> PipeEnd:
        from connectors.nccl import NcclEnd

        return NcclEnd(rows, is_server=is_server, listen=host, device=self._device)


class KVStoreNixlConnector(PeerConnector):
    """Hands KV over by one-sided reads of NIXL, in a process that runs as long as this server."""

    transport = "nixl"
    _hold: ProcessHold | None = None

    def make_scheduler(self, num_workers: int, windows: Sequence[int | None]) -> SchedulerHalf:
        """Raises MissingExtraError where NIXL is not installed."""
        from connectors.nixl_process.life import ProcessHold

        self._hold = ProcessHold(is_local=is_loopback(self._host))
        try:
            return super().make_scheduler(num_workers, windows)
        except BaseException:
            self._let_go()
            raise

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.close()

    def make_end(self, rows: Rows, is_server: bool, offer_fd: int | None, host: str) -> PipeEnd:
        from connectors.nixl import NixlEnd

        return NixlEnd(rows, is_server=is_server, listen=host, offer_fd=offer_fd)


def _device_of(setting: object) -> torch.device | None:
    """Raises ConfigError: it is no CUDA device, or NCCL cannot be used here."""
    from connectors.nccl import check_device

    if setting is None:
        return None
    try:
        device = torch.device(setting) if isinstance(setting, str) else None
    except RuntimeError:
        device = None
    if device is None or device.type != "cuda":
        raise ConfigError(f"device: {setting!r}; give a CUDA device like 'cuda' or 'cuda:1', or leave it out for gloo")
    return check_device(device)


def reached_at(settings: PeerSettings, keys: CurveKeys | None) -> str:
    """The host that others reach this server at, where pipes listen too.

    Raises:
        ConfigError: it is no address, not one that can be reached, or beyond loopback without keys.
    """
    name = "listen" if settings.advertise is None else "advertise"
    address, _ = checked_address(name, settings.advertise or settings.listen, keys)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    if settings.advertise is not None and not int(port):
        raise ConfigError(f"advertise: {address} has no port; give the one of listen, which must not be 0 then")
    if host in ("0.0.0.0", "::", "*"):
        raise ConfigError(
            f"{name}: {address} is no address that another host can reach; set advertise to one, like tcp://10.0.0.2:7000"
        )
    return host


def check_listens(host: str) -> None:
    """Raises ConfigError where pipes cannot listen there."""
    try:
        listen_on(host, 1).close()
    except ConfigError as e:
        raise ConfigError(f"listen, advertise: {host!r}, where pipes listen too: {e}") from e
