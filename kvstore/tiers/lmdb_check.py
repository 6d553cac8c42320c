"""Walks an LMDB file in a process of its own: a damaged one can kill its reader with SIGBUS.

Run as a script, ``python lmdb_check.py DIRECTORY``; exit code 0 if every page could be
read. Imports lmdb only, so that it starts quickly.
"""

import sys

import lmdb


def walk(path: str) -> int:
    """Read every record of every database; returns the number of records."""
    with lmdb.open(path, readonly=True, lock=False, max_dbs=8, create=False) as env, env.begin() as txn:
        names = [bytes(key) for key, _ in txn.cursor()]
        count = len(names)
        for name in names:
            db = env.open_db(name, txn=txn, create=False)
            count += sum(1 for _ in txn.cursor(db=db))
        return count


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except lmdb.Error as e:
        print(e, file=sys.stderr)
        sys.exit(1)
