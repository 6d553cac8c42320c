"""Copies the slots database of an LMDB index to stdout, in a process of its own.

A damaged LMDB file can kill its reader with SIGBUS, or lead it round in circles; so a child
reads, and its parent believes nothing but lengths. Run as a script, ``python lmdb_dump.py
DIRECTORY {lock,nolock}``. Each record is two uint32 lengths, the key, the value. With
"nolock" nothing is written, which is right while nobody has the index open.
"""

import os
import struct
import sys
from collections.abc import Iterator

import lmdb

MAPPED_NBYTES = 64 << 20
BATCH = 8192
PER_STORED = 16  # a file system may compress


def records(path: str, *, lock: bool) -> Iterator[tuple[bytes, bytes]]:
    """Every record of the slots database; raises lmdb.Error where it is damaged.

    What is read as one is copied before it is written on: who reads slowly keeps no page of a running store. The
    file is mapped anew now and then: pages that were read would else stay in memory.
    """
    last = b""
    while True:
        left = MAPPED_NBYTES
        with lmdb.open(path, readonly=True, lock=lock, max_dbs=8, create=False) as env:
            slots = env.open_db(b"slots", create=False)
            while left > 0:
                batch: list[tuple[bytes, bytes]] = []
                with env.begin(db=slots) as txn:
                    cursor = txn.cursor()
                    is_there = cursor.set_range(last) if last else cursor.first()
                    if is_there and last and bytes(cursor.key()) == last:
                        is_there = cursor.next()
                    while is_there and len(batch) < BATCH:
                        batch.append(cursor.item())
                        is_there = cursor.next()
                yield from batch
                if not is_there:
                    return
                last = bytes(batch[-1][0])
                left -= sum(len(value) for _, value in batch)


def main(path: str, mode: str) -> None:
    """Write the records; fails once they are more than their file can hold."""
    status = os.stat(os.path.join(path, "data.mdb"))
    left = min(status.st_size, PER_STORED * 512 * status.st_blocks + (1 << 20))  # a hole holds nothing
    for key, value in records(path, lock=mode == "lock"):
        left -= len(key) + len(value)
        if left < 0:
            raise lmdb.Error("its pages go round in circles")
        sys.stdout.buffer.write(struct.pack("=II", len(key), len(value)) + key + value)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2])
    except (lmdb.Error, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)
