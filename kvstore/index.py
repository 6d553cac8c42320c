"""Block key -> location, for millions of keys: an open-addressing hash table in numpy arrays.

A location is ``slot * blocks_per_chunk + position``. An entry of the table is 32 bits of the
key's hash and the location; keys lie in an array by location. A look-up probes a batch by
those 32 bits and then compares all 36 bytes, so equal hashes are right too. Linear probing;
a removed entry leaves a tombstone unless the next entry is empty. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.keys import KEY_NBYTES, BlockKey, keys_to_array

Slots = NDArray[np.int64]
_WORDS: Final = KEY_NBYTES // 4
_EMPTY: Final = np.uint64(0)
_TOMBSTONE: Final = np.uint64(1)  # no key's: an entry's upper half is never 0
_LOCATION: Final = np.uint64(2**32 - 1)
_HALF: Final = np.uint64(32)
_MARK_BIT: Final = np.uint64(2**32)
_WINDOW: Final = np.arange(8)
_HEAD: Final = 64  # keys
_LOAD: Final = 0.4  # of the table when every slot is in, at most
_MAX_USED: Final = 0.75  # tombstones counted in
# odd multipliers, one a word: multiply-shift hashing (Dietzfelbinger et al., 1997)
_MULTIPLIERS: Final = (
    np.random.Generator(np.random.PCG64(0x6B76)).integers(1 << 62, 1 << 63, _WORDS, dtype=np.uint64) | 1
)


class BlockIndex:
    """Args:
    num_slots: slots it may hold, of ``blocks_per_chunk`` keys each.
    """

    def __init__(self, num_slots: int, blocks_per_chunk: int) -> None:
        if num_slots * blocks_per_chunk > _LOCATION:
            raise ConfigError(f"num_blocks: {num_slots * blocks_per_chunk} is more than 2**32 - 1")
        self.num_slots, self.blocks_per_chunk = num_slots, blocks_per_chunk
        self._keys = np.zeros((num_slots * blocks_per_chunk, _WORDS), dtype=np.uint32)
        self._in = np.zeros(num_slots, dtype=np.bool_)
        self._make_table()

    def __len__(self) -> int:
        """Number of keys that can be found."""
        return self._num_used - self._num_tombstones

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._in.nbytes + self._table.nbytes

    def find_prefix(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """Locations of the leading keys that are present, shape (m,), m <= len(keys)."""
        head = self._leading(keys[:_HEAD])
        if len(head) < _HEAD or len(keys) == _HEAD:
            return head  # a long prefix that is not here costs no more than a short one
        return np.concatenate((head, self._leading(keys[_HEAD:])))

    def contains(self, keys: Sequence[BlockKey]) -> NDArray[np.bool_]:
        """Which keys are present, shape (len(keys),)."""
        return self._probe(_words(keys))[0] >= 0

    def contains_chunks(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which chunks have all their keys present; keys of shape (n, blocks_per_chunk, 36)."""
        present = self._probe(_as_words(keys))[0] >= 0
        return np.asarray(present.reshape(keys.shape[:2]).all(axis=1))

    def insert(self, slots: Slots, keys: NDArray[np.uint8], *, are_new: bool = False) -> None:
        """Add slots that are not in, with their keys, shape (n, blocks_per_chunk, 36).

        A key that is in already is found at its newest location from now on.

        Args:
            are_new: none of the keys is in, which the caller knows; spares looking.
        """
        words = _as_words(keys)
        locations = self._locations(slots)
        self._keys[locations] = words
        self._in[slots] = True
        if self._num_used + len(locations) > _MAX_USED * len(self._table):
            self._rebuild()
        else:
            self._add(locations, words, are_new=are_new or not len(self))

    def remove(self, slots: Slots) -> None:
        """Take slots out, and every key that is found in them; slots that are not in are passed over."""
        slots = slots[self._in[slots]]
        self._in[slots] = False
        locations = self._locations(slots)
        found_at, places = self._probe(self._keys[locations])
        mine = places[found_at == locations]
        self._table[mine] = _TOMBSTONE
        self._num_tombstones += len(mine)
        self._sweep(mine)

    def keys_of(self, slots: Slots) -> NDArray[np.uint8]:
        """Keys of slots, shape (n, blocks_per_chunk, 36)."""
        keys = self._keys.reshape(-1, self.blocks_per_chunk, _WORDS)[slots]
        return keys.view(np.uint8).reshape(len(slots), self.blocks_per_chunk, KEY_NBYTES)

    def holds(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots are in."""
        held: NDArray[np.bool_] = self._in[slots]
        return held

    def slots(self) -> Slots:
        """The slots that are in, ascending."""
        return np.flatnonzero(self._in)

    def _leading(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        locations, _ = self._probe(_words(keys))
        found = locations >= 0
        return locations if found.all() else locations[: int(found.argmin())]

    def _make_table(self) -> None:
        size = 1 << max(4, int(np.ceil(np.log2(self.num_slots * self.blocks_per_chunk / _LOAD + 1))))
        self._table = np.zeros(size, dtype=np.uint64)
        self._mask = size - 1
        self._num_used = self._num_tombstones = 0

    def _hash(self, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """For each key its first place in the table, and its entry but for the location."""
        mixed: NDArray[np.uint64] = np.dot(words, _MULTIPLIERS)
        mixed ^= mixed >> _HALF
        mixed *= _MULTIPLIERS[0]
        return (mixed >> _HALF).view(np.int64) & self._mask, (mixed << _HALF) | _MARK_BIT

    def _probe(self, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each key its location (negative: absent) and its place in the table.

        A cache line of the table is looked through at once; few keys lie further from home.
        """
        places, marks = self._hash(words)
        at = (places[:, None] + _WINDOW) & self._mask
        seen = self._table[at]
        ends = (seen ^ marks[:, None]) <= _LOCATION
        ends |= seen == _EMPTY
        ends[:, -1] = True
        picked = np.arange(len(words)), ends.argmax(axis=1)
        entries, places = seen[picked], at[picked]
        locations = (entries & _LOCATION).view(np.int64)
        if (entries > _LOCATION).all() and self._keys[locations].tobytes() == words.tobytes():
            return locations, places
        if not entries.any():
            return np.full(len(words), -1), places
        same = (self._keys[locations] == words).all(axis=1)
        open_ = np.flatnonzero((entries != _EMPTY) & ((entries == _TOMBSTONE) | ~same))
        while len(open_):
            next_ = places[open_] = (places[open_] + 1) & self._mask
            entry = entries[open_] = self._table[next_]
            locations[open_] = entry & _LOCATION
            same = (self._keys[locations[open_]] == words[open_]).all(axis=1) & (entry != _TOMBSTONE)
            open_ = open_[(entry != _EMPTY) & ~same]
        locations[entries == _EMPTY] = -1
        return locations, places

    def _add(self, locations: NDArray[np.int64], words: NDArray[np.uint32], *, are_new: bool) -> None:
        places, marks = self._hash(words)
        entries = marks | locations.view(np.uint64)
        if not are_new:
            present, present_at = self._probe(words)
            known = present >= 0
            if known.any():
                self._table[present_at[known]] = entries[known]
                entries, words, places = entries[~known], words[~known], places[~known]
        while len(entries):
            at = (places[:, None] + _WINDOW) & self._mask
            free = self._table[at] <= _TOMBSTONE
            at = at[np.arange(len(at)), np.where(free.any(axis=1), free.argmax(axis=1), len(_WINDOW) - 1)]
            before = self._table[at]
            taken = before <= _TOMBSTONE
            self._table[at[taken]] = entries[taken]
            after = self._table[at]
            won = after == entries
            self._num_used += int(np.count_nonzero(before[won] == _EMPTY))
            self._num_tombstones -= int(np.count_nonzero(before[won] == _TOMBSTONE))
            if won.all():
                return
            holders = (after & _LOCATION).view(np.int64)
            twin = (self._keys[holders] == words).all(axis=1)  # two of one batch: the last has won
            open_ = ~won & ~twin
            entries, words, places = entries[open_], words[open_], at[open_]

    def _sweep(self, places: NDArray[np.int64]) -> None:
        """Empty the tombstones that no probe need pass any more."""
        while len(places):
            last = self._table[(places + 1) & self._mask] == _EMPTY
            places = np.unique(places[last & (self._table[places] == _TOMBSTONE)])
            self._table[places] = _EMPTY
            self._num_tombstones -= len(places)
            self._num_used -= len(places)
            places = (places - 1) & self._mask

    def _rebuild(self) -> None:
        self._make_table()
        slots = self.slots()
        locations = self._locations(slots)
        self._add(locations, self._keys[locations], are_new=True)

    def _locations(self, slots: Slots) -> NDArray[np.int64]:
        if self.blocks_per_chunk == 1:
            return slots
        return (slots[:, None] * self.blocks_per_chunk + np.arange(self.blocks_per_chunk)).reshape(-1)


def _words(keys: Sequence[BlockKey]) -> NDArray[np.uint32]:
    return keys_to_array(keys).view(np.uint32).reshape(len(keys), _WORDS)


def _as_words(keys: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(keys, dtype=np.uint8).reshape(-1, KEY_NBYTES).view(np.uint32)
