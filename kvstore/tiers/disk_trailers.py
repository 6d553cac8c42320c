"""The trailers in a disk tier's data file, read slot by slot: what an index is rebuilt from."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.direct_io import preadv_full, pwritev_full
from kvstore.identity import NAMESPACE_NBYTES
from kvstore.slot import ALIGNMENT, SlotCodec, Slots
from kvstore.tiers.disk_dir import DiskDirectory
from kvstore.tiers.disk_index import Records, empty_records, joined
from kvstore.tiers.page_buffer import page_aligned

_SCAN_SLOTS: Final = 256
_SCAN_THREADS: Final = 16


class DiskTrailers:
    """Reads and erases trailers around the page cache. Not for slots that others may write."""

    def __init__(self, directory: DiskDirectory, codec: SlotCodec) -> None:
        self._directory, self._codec = directory, codec

    def scan(self) -> Records:
        """Entries for everything that the data file holds, the newest where a chunk is there twice.

        Payloads are not read: what is damaged there is noticed when it is loaded.
        """
        num_slots = self._directory.num_slots_on_disk()
        parts = [
            np.arange(start, min(start + _SCAN_SLOTS, num_slots), dtype=np.int64)
            for start in range(0, num_slots, _SCAN_SLOTS)
        ]
        with ThreadPoolExecutor(_SCAN_THREADS, "kvstore-disk-scan") as pool:
            found = pool.map(self._records, parts)
            records = joined([empty_records(self._codec.fmt.blocks_per_chunk), *found])
        records = records.at(np.argsort(records.generations)[::-1])
        if not len(records):
            return records
        namespaces = np.ascontiguousarray(records.namespaces).view(np.uint8).reshape(len(records), NAMESPACE_NBYTES)
        chunks = void_keys(np.concatenate((namespaces, records.keys.reshape(len(records), -1)), axis=1))
        _, newest = np.unique(chunks, return_index=True)
        return records.at(newest)

    def erase(self, slots: Slots, wanted: NDArray[np.void]) -> None:
        """Overwrite the trailers of those of these slots that name a wanted key.

        Args:
            wanted: keys as `void_keys` gives them.
        """
        zeros = page_aligned(ALIGNMENT)
        for start in range(0, len(slots), _SCAN_SLOTS):
            part = slots[start : start + _SCAN_SLOTS]
            trailers = self._codec.parse(self._read(part))
            named = trailers.valid & np.isin(void_keys(trailers.keys), wanted).any(axis=1)
            for slot in part[named].tolist():
                offset = (slot + 1) * self._codec.fmt.slot_nbytes - ALIGNMENT
                pwritev_full(self._directory.data_fd, [zeros], offset)

    def _records(self, slots: Slots) -> Records:
        trailers = self._codec.parse(self._read(slots))
        records = Records(slots, trailers.generations, trailers.namespaces, trailers.keys.copy())
        return records.at(trailers.valid & (trailers.generations > 0))

    def _read(self, slots: Slots) -> NDArray[np.uint8]:
        """Trailers, shape (len(slots), trailer_nbytes); zeros beyond the end of the file."""
        fmt = self._codec.fmt
        tail = -(-fmt.trailer_nbytes // ALIGNMENT) * ALIGNMENT
        buffer = page_aligned(tail)
        out = np.zeros((len(slots), fmt.trailer_nbytes), dtype=np.uint8)
        for i, slot in enumerate(slots.tolist()):
            buffer[:] = 0
            preadv_full(self._directory.data_fd, [buffer], (slot + 1) * fmt.slot_nbytes - tail)
            out[i] = buffer[-fmt.trailer_nbytes :]
        return out


def void_keys(keys: NDArray[np.uint8]) -> NDArray[np.void]:
    """Rows of bytes, such as keys, shape (..., 36), as one item each, for `np.isin` and `np.unique`."""
    return np.ascontiguousarray(keys).view(f"V{keys.shape[-1]}").reshape(keys.shape[:-1])
