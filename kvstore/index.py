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
_MAX_USED: Final = 0.75
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
        locations, _ = self._probe(_words(keys))
        found = locations >= 0
        return locations if found.all() else locations[: int(found.argmin())]

    def contains(self, keys: Sequence[BlockKey]) -> NDArray[np.bool_]:
        """Which keys are present, shape (len(keys),)."""
        return self._probe(_words(keys))[0] >= 0

    def contains_chunks(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which chunks have all their keys present; keys of shape (n, blocks_per_chunk, 36)."""
        present = self._probe(_as_words(keys))[0] >= 0
        return np.asarray(present.reshape(len(keys), -1).all(axis=1))

    def insert(self, slots: Slots, keys: NDArray[np.uint8]) -> None:
        """Add slots that are not in, with their keys, shape (n, blocks_per_chunk, 36).

        A key that is in already is found at its newest location from now on.
        """
        words = _as_words(keys)
        locations = (slots[:, None] * self.blocks_per_chunk + np.arange(self.blocks_per_chunk)).reshape(-1)
        self._keys[locations] = words
        self._in[slots] = True
        if self._num_used + len(locations) > _MAX_USED * len(self._table):
            self._rebuild()
        else:
            self._add(locations, words)

    def remove(self, slots: Slots) -> None:
        """Take slots out, and every key that is found in them; slots that are not in are passed over."""
        slots = slots[self._in[slots]]
        self._in[slots] = False
        locations = (slots[:, None] * self.blocks_per_chunk + np.arange(self.blocks_per_chunk)).reshape(-1)
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

    def _make_table(self) -> None:
        size = 1 << max(4, int(np.ceil(np.log2(self.num_slots * self.blocks_per_chunk / 0.6 + 1))))
        self._table = np.zeros(size, dtype=np.uint64)
        self._mask = size - 1
        self._num_used = self._num_tombstones = 0

    def _hash(self, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """For each key its first place in the table, and the upper half of its entry."""
        mixed: NDArray[np.uint64] = (words * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> _HALF
        mixed *= _MULTIPLIERS[0]
        return (mixed >> _HALF).astype(np.int64) & self._mask, (mixed | np.uint64(1)) & _LOCATION

    def _probe(self, words: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each key its location (negative: absent) and its place in the table."""
        places, marks = self._hash(words)
        entries = self._table[places]
        open_ = np.flatnonzero(((entries >> _HALF) != marks) & (entries != _EMPTY))
        while True:
            while len(open_):
                at = places[open_] = (places[open_] + 1) & self._mask
                entry = entries[open_] = self._table[at]
                open_ = open_[((entry >> _HALF) != marks[open_]) & (entry != _EMPTY)]
            locations = (entries & _LOCATION).astype(np.int64)
            present = entries != _EMPTY
            same = (self._keys[locations] == words).all(axis=1)
            locations[~present] = -1
            open_ = np.flatnonzero(present & ~same)
            if not len(open_):
                return locations, places

    def _add(self, locations: NDArray[np.int64], words: NDArray[np.uint32]) -> None:
        places, marks = self._hash(words)
        entries = (marks << _HALF) | locations.astype(np.uint64)
        if len(self):
            present, present_at = self._probe(words)
            known = present >= 0
            self._table[present_at[known]] = entries[known]
            entries, words, places = entries[~known], words[~known], places[~known]
        open_ = np.arange(len(words))
        while len(open_):
            at = places[open_]
            before = self._table[at]
            free = before <= _TOMBSTONE
            self._table[at[free]] = entries[open_[free]]
            after = self._table[at]
            won = after == entries[open_]
            self._num_used += int(np.count_nonzero(won & (before == _EMPTY)))
            self._num_tombstones -= int(np.count_nonzero(won & (before == _TOMBSTONE)))
            open_, holders = open_[~won], (after[~won] & _LOCATION).astype(np.int64)
            twin = (self._keys[holders] == words[open_]).all(axis=1)  # two of one batch: the last has won
            open_ = open_[~twin]
            places[open_] = (places[open_] + 1) & self._mask

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
        locations = (slots[:, None] * self.blocks_per_chunk + np.arange(self.blocks_per_chunk)).reshape(-1)
        self._add(locations, self._keys[locations])


def _words(keys: Sequence[BlockKey]) -> NDArray[np.uint32]:
    return keys_to_array(keys).view(np.uint32).reshape(len(keys), _WORDS)


def _as_words(keys: NDArray[np.uint8]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(keys, dtype=np.uint8).reshape(-1, KEY_NBYTES).view(np.uint32)
