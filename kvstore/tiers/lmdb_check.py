"""Walks an LMDB file in a process of its own: a damaged one can kill its reader with SIGBUS,
or lead it round in circles.

Run as a script, ``python lmdb_check.py DIRECTORY``; exit code 0 if every page could be
read. Joins the environment's readers: others may write while it walks. Imports lmdb only,
so that it starts quickly.
"""

import os
import sys

import lmdb


def walk(path: str) -> int:
    """Read every record of every database; returns the number of records."""
    left = os.path.getsize(os.path.join(path, "data.mdb"))
    count = 0
    with lmdb.open(path, readonly=True, max_dbs=8, create=False) as env:
        with env.begin() as txn:
            names = [bytes(key) for key, _ in txn.cursor()]
        for name in names:
            db = env.open_db(name, create=False)
            with env.begin(db=db) as txn:
                for key, value in txn.cursor():
                    count, left = count + 1, left - len(key) - len(value)
                    if left < 0:
                        raise lmdb.Error("its pages go round in circles")
    return count


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except (lmdb.Error, OSError) as e:
        print(e, file=sys.stderr)
        sys.exit(1)
