"""Walks an LMDB file in a process of its own: a damaged one can kill its reader with SIGBUS,
or lead it round in circles.

Run as a script, ``python lmdb_check.py DIRECTORY``; exit code 0 if every page could be
read. Joins the environment's readers: others may write while it walks. What only a writer
would notice, it does not. Imports lmdb only, so that it starts quickly.
"""

import contextlib
import os
import sys

import lmdb


def walk(path: str) -> None:
    """Read every record; raises lmdb.Error for what is damaged, and may not return at all."""
    left = os.path.getsize(os.path.join(path, "data.mdb"))
    with lmdb.open(path, readonly=True, max_dbs=8, create=False) as env:
        for name in (b"slots", b"log"):
            with contextlib.suppress(lmdb.NotFoundError):  # killed before its first commit
                db = env.open_db(name, create=False)
                with env.begin(db=db) as txn:
                    for key, value in txn.cursor():
                        left -= len(key) + len(value)
                        if left < 0:
                            raise lmdb.Error("its pages go round in circles")


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except (lmdb.Error, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)
