"""KV of a producer of another tensor parallelism: cut anew, or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from connectors.restripe import Landing, Restripe
from kvstore import BlockKey, HostTierConfig, KVIdentity, KVLayout, StoreConfig, hash_blocks
from kvstore.identity import Placement
from kvstore.planes import Planes
from kvstore.slot import SlotCodec, SlotFormat

LAYOUT = KVLayout(num_layers=3, num_kv_heads=8, head_size=4, block_size=5, dtype=torch.float16)


def identity(order: str, tp_size: int, layout: KVLayout = LAYOUT) -> KVIdentity:
    placement = Placement(tp_size=tp_size, byte_layout=f"vllm 0.32 cpu {order} vec")
    return KVIdentity(model="m", revision="r1", layout=layout, placement=placement)


def payload(order: str, tp_size: int) -> np.ndarray:
    """What each element is, by rank, layer, and as the order says: built element by element."""
    layers, heads, tokens, content = 3, 8, 5, 2 * 4
    whole = np.arange(layers * heads * tokens * content, dtype=np.uint16).reshape(layers, heads, tokens, content)
    parts = []
    for rank in range(tp_size):
        of_rank = range(rank * heads // tp_size, (rank + 1) * heads // tp_size)
        for layer in range(layers):
            if order == "LBHNC":
                parts += [whole[layer, head, token] for head in of_rank for token in range(tokens)]
            else:
                parts += [whole[layer, head, token] for token in range(tokens) for head in of_rank]
    return np.concatenate(parts).view(np.uint8)


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize(("there", "here"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 8), (8, 1), (2, 8), (4, 4)])
def test_each_byte_goes_where_it_belongs(order: str, there: int, here: int) -> None:
    nbytes = LAYOUT.block_nbytes
    source, target = np.zeros((3, nbytes + 64), dtype=np.uint8), np.full((4, nbytes + 128), 7, dtype=np.uint8)
    source[2, :nbytes] = payload(order, there)
    Restripe(identity(order, here), there, here)(source, np.array([0, 2]), target, np.array([3, 1]))
    assert np.array_equal(target[1, :nbytes], payload(order, here))
    assert not target[3, :nbytes].any()
    assert (target[:, nbytes:] == 7).all() and (target[[0, 2]] == 7).all()


@pytest.mark.parametrize(
    ("mine", "there", "why"),
    [
        (identity("LBHNC", 2), 3, "tp_size: 2 here, 3 there; neither is a multiple"),
        (identity("LBHNC", 4), 6, "tp_size: 4 here, 6 there; neither is a multiple"),
        (identity("LBHNC", 1), 16, "16 does not divide 8 KV heads"),
        (identity("BHLNC", 2), 1, "how heads lie in pages of .*BHLNC.* is not known"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(mine: KVIdentity, there: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Restripe(mine, there, mine.placement.tp_size)


def take(landing: Landing, keys: list[BlockKey], slots: np.ndarray, namespace: bytes) -> list[bool]:
    """Verify the first rows and bring in what is good, as `RemotePeer` does with what has come."""
    good = [landing.codec.holds(landing.rows[i].data, key, namespace) for i, key in enumerate(keys)]
    landing.bring(np.flatnonzero(good), keys, slots, namespace)
    return good


def test_only_what_verifies_is_brought_in() -> None:
    mine, theirs = identity("LBHNC", 2), identity("LBHNC", 1)
    planes = Planes(StoreConfig(identity=mine, host=HostTierConfig(num_blocks=8)))
    landing = Landing.of(planes, 1)
    try:
        assert landing.peer == theirs
        keys = hash_blocks(list(range(4 * LAYOUT.block_size)), block_size=LAYOUT.block_size, identity=mine)
        codec, namespace = SlotCodec(SlotFormat.of(theirs, 1)), mine.namespace()
        landing.rows[:4, : LAYOUT.block_nbytes] = payload("LBHNC", 1)
        array = np.stack([np.frombuffer(key, dtype=np.uint8) for key in keys])[:, None, :]
        codec.seal(landing.rows, np.arange(4), array, namespace, np.zeros(4, dtype=np.uint64))
        landing.rows[1, 100] ^= 1  # damaged
        wrong = [keys[0], keys[1], keys[3], keys[3]]  # the third is another block
        slots = np.array([5, 0, 2, 7])
        assert take(landing, wrong, slots, namespace) == [True, False, False, True]
        assert not any(take(landing, keys, slots, bytes(16)))
        rows = planes.arena.rows
        for slot in (5, 7):
            assert np.array_equal(rows[slot, : LAYOUT.block_nbytes], payload("LBHNC", 2))
        assert not rows[[0, 2]].any()
        found = planes.codec.verify(rows, np.array([5, 7]), namespace)
        assert found.valid.all() and [k.tobytes() for k in found.keys[:, 0]] == [keys[0], keys[3]]
    finally:
        landing.close()
        planes.close()


def test_signed_slots_are_verified_with_the_same_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("secret") / "key"
    secret.write_bytes(b"0123456789abcdef")
    mine = identity("LBNHC", 1)
    config = StoreConfig(identity=mine, host=HostTierConfig(num_blocks=2))
    planes = Planes(dataclasses.replace(config, integrity_key_file=str(secret)))
    landing = Landing.of(planes, 2)
    try:
        keys = hash_blocks(list(range(LAYOUT.block_size)), block_size=LAYOUT.block_size, identity=mine)
        array = np.frombuffer(keys[0], dtype=np.uint8)[None, None, :]
        fmt = SlotFormat.of(landing.peer, 1)
        for key, is_good in ((None, False), (b"another secret..", False), (b"0123456789abcdef", True)):
            SlotCodec(fmt, key).seal(landing.rows, np.arange(1), array, mine.namespace(), np.zeros(1, dtype=np.uint64))
            assert take(landing, keys, np.arange(1), mine.namespace()) == [is_good]
    finally:
        landing.close()
        planes.close()
