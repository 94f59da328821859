"""The pair on disk: what comes back, how it lies, and what is said about broken stores."""

import errno
import json
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from checkpoints_tiny import VARIANTS
from zoo import write

from lmc_fast.architectures import FAMILIES
from lmc_fast.architectures.axes import END_SLOTS
from lmc_fast.architectures.spec import SHARED
from lmc_fast.checkpoints import Model
from lmc_fast.errors import LmcError
from lmc_fast.kernels.routes import side_by_side
from lmc_fast.output import OWNER, atomic_directory, marker
from lmc_fast.streaming import packing
from lmc_fast.streaming import store as store_module
from lmc_fast.streaming.layout import ALIGNMENT, head_rows, segment_bytes, slot_shapes
from lmc_fast.streaming.packing import fingerprint, pieces
from lmc_fast.streaming.store import STORE_NAMES, Store


def same(slots, expected):
    assert slots.keys() == expected.keys()
    for name, t in slots.items():
        assert t.dtype == expected[name].dtype and torch.equal(t, expected[name]), name


def head_slots(weights):
    return {name: t for name, t in weights.ends.items() if name in ("head", "head_bias")}


def check_contents(store, a, b):
    for i in range(store.layers):
        x, y = store.read(i)
        same(x, a.blocks[i])
        same(y, b.blocks[i])
    for side, w in enumerate((a, b)):
        parts = [store.read(store.layers + p)[side] for p in range(store.head_parts)]
        same({name: torch.cat([p[name] for p in parts]) for name in parts[0]}, head_slots(w))
        rest = {name: t for name, t in w.ends.items() if name not in ("embed", "head", "head_bias")}
        same(store.ends()[side], rest)
    if "embed" in a.ends:
        rows = [0, 1, 2, 7, 30, 31, len(a.ends["embed"]) - 1]
        both = store.embed_rows(rows)
        assert torch.equal(both[:, 0], a.ends["embed"][rows]) and torch.equal(both[:, 1], b.ends["embed"][rows])
        room = torch.full((both.nbytes + 8,), 255, dtype=torch.uint8)
        again = store.embed_rows(rows, lambda size: room[:size])
        assert torch.equal(again, both) and again.data_ptr() == room.data_ptr() and (room[-8:] == 255).all()
    store.verify()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_comes_back(variant, dtype, make_store, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", 1000)
    monkeypatch.setattr(store_module, "CHUNK", 1000)
    store, a, b = make_store(variant, dtype)
    assert not a.spec.tied and store.dtype == dtype
    check_contents(store, a, b)
    assert store.segment_bytes == segment_bytes(a.spec, dtype.itemsize)


@pytest.mark.parametrize("name", ["qwen2-moe", "bert-pretraining", "dinov2", "olmo", "clip-text"])
def test_other_kinds_of_models(name, tmp_path):
    """Mixtures have 3-D slots, image models no token table, masked models a head transform, OLMo's norms nothing."""
    write(name, tmp_path / "a", 1)
    write(name, tmp_path / "b", 2)
    a, b = (Model(tmp_path / side).load() for side in "ab")
    check_contents(Store.create(tmp_path / "store", a.spec, pieces(a, b)), a, b)


def test_matrices_lie_side_by_side_and_aligned(make_store):
    store, a, b = make_store("llama-tied-biased")
    x, y = store.read(0)
    for name, place in store.places(0).items():
        assert place.offset % ALIGNMENT == 0
        if x[name].dim() == 2:
            both = side_by_side(x[name], y[name])
            assert torch.equal(both, torch.cat([a.blocks[0][name], b.blocks[0][name]], dim=1))
            assert both.data_ptr() == x[name].data_ptr()
    assert side_by_side(a.blocks[0]["q"], b.blocks[0]["q"]) is None and side_by_side(y["q"], x["q"]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_and_blocks_are_told_apart_as_in_the_tables(family):
    ends = {slot for entry in FAMILIES[family].ends for slot in entry.slots} - {*SHARED}  # held in every block
    blocks = {slot for entry in FAMILIES[family].block for slot in entry.slots}
    assert {s.removesuffix("_bias") for s in ends} <= END_SLOTS
    assert not {s.removesuffix("_bias") for s in blocks} & END_SLOTS


def test_the_head_in_parts(make_store):
    store, a, b = make_store("gpt2", part_bytes=2000)
    assert store.head_parts == len(head_rows(a.spec, 4, 2000)) > 3
    assert max(store.segment_bytes[store.layers :]) <= 2000 and sum(head_rows(a.spec, 4, 2000)) == a.spec.vocab
    check_contents(store, a, b)


@pytest.mark.parametrize("run", [1, 7, 40])
def test_tables_come_in_runs_of_rows(run, make_pair, tmp_path):
    a, b = make_pair("llama-tied-biased")

    def stream():
        for i in reversed(range(a.spec.layers)):  # any order
            yield i, [a.blocks[i], b.blocks[i]]
        tables = ("embed", "head")
        yield "ends", [{n: t for n, t in w.ends.items() if n not in tables} for w in (a, b)]
        for table in tables:
            for start in range(0, a.spec.vocab, run):
                yield "ends", [{table: w.ends[table][start : start + run]} for w in (a, b)]

    check_contents(Store.create(tmp_path / "s", a.spec, stream(), part_bytes=3000), a, b)


def test_an_incomplete_pair_is_refused_and_leaves_nothing(make_pair, tmp_path):
    a, b = make_pair()
    good = list(pieces(a, b))
    ends = {name: t for name, t in a.ends.items() if name != "head"}, {n: t for n, t in b.ends.items() if n != "head"}
    short = {**a.ends, "embed": a.ends["embed"][:-1]}, {**b.ends, "embed": b.ends["embed"][:-1]}
    broken = {**a.blocks[0], "q": a.blocks[0]["q"] * 1e300 * 1e300}
    wrong = {**a.blocks[0], "q": a.blocks[0]["q"][1:]}
    extra = {**a.blocks[0], "queen": a.blocks[0]["q"]}
    for bad, words in [
        (good[:-1], "block 1"),
        ([*good, good[-1]], "twice"),
        ([("ends", ends), *good[1:]], "head has fewer rows"),
        ([("ends", short), *good[1:]], "embed has fewer rows"),
        ([("ends", ({"embed": a.ends["embed"]}, {"embed": b.ends["embed"]}))] * 2, "embed has more rows"),
        ([(0, (broken, b.blocks[0]))], "slot q overflows"),
        ([(0, (wrong, b.blocks[0]))], "slot q has shapes"),
        ([(0, (extra, b.blocks[0]))], "queen"),
        ([(7, (a.blocks[0], b.blocks[0]))], "block 7"),
    ]:
        with pytest.raises(LmcError, match=words):
            Store.create(tmp_path / "s", a.spec, bad)
        assert not list(tmp_path.iterdir())


def test_creation_stopped_halfway(make_pair, tmp_path, monkeypatch):
    a, b = make_pair()

    def interrupted():
        yield from list(pieces(a, b))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store.create(tmp_path / "s", a.spec, interrupted())
    assert not list(tmp_path.iterdir())

    def full(self, tensor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing.File, "write", full)
        with pytest.raises(LmcError, match="disk is full"):
            Store.create(tmp_path / "s", a.spec, pieces(a, b))
    assert not list(tmp_path.iterdir())
    (tmp_path / "s.partial").mkdir()  # somebody's: a name proves nothing
    (tmp_path / "s.partial" / "block-00009.bin").write_bytes(b"x")
    with pytest.raises(LmcError, match="did not make"):
        Store.create(tmp_path / "s", a.spec, pieces(a, b))
    assert (tmp_path / "s.partial" / "block-00009.bin").read_bytes() == b"x"
    (tmp_path / "s.partial" / "block-00009.bin").unlink()
    (tmp_path / "s.partial").rmdir()
    child = os.fork()
    if child == 0:  # a killed run
        with atomic_directory(tmp_path / "s", STORE_NAMES) as work:
            (work / OWNER).write_bytes(marker())
            (work / "block-00009.bin").write_bytes(b"x")
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / "s.partial" / "result" / "block-00009.bin").exists()
    Store.create(tmp_path / "s", a.spec, pieces(a, b))
    assert not (tmp_path / "s.partial").exists()
    assert not (tmp_path / "s" / "block-00009.bin").exists()
    with pytest.raises(LmcError, match="not empty"):
        Store.create(tmp_path / "s", a.spec, pieces(a, b))


def test_foreign_and_damaged_stores(make_store):
    store, a, _ = make_store(key="pair 1")
    path, spec = store.path, a.spec
    assert Store.open(path, spec, "pair 1").key == "pair 1"
    assert fingerprint(spec) == fingerprint(replace(spec, tied=True))
    for arguments, words in [
        ((path / "no", spec), "no/index.json"),
        ((path, spec.changed(norms={"eps": 1e-3})), "another architecture"),
        ((path, spec, "pair 2"), "other models"),
    ]:
        with pytest.raises(LmcError, match=words):
            Store.open(*arguments)
    index = path / "index.json"
    good = index.read_bytes()
    for bad in (b"", b"{}", b"[1]", b"\xff", good[:-9], good.replace(b"float32", b"float16")):
        index.write_bytes(bad)
        with pytest.raises(LmcError, match=r"index\.json is corrupt"):
            Store.open(path, spec)
    other = json.loads(good) | {"version": 99}
    other["checksum"] = packing.checksum({k: v for k, v in other.items() if k != "checksum"})
    index.write_text(json.dumps(other))
    with pytest.raises(LmcError, match="another format or version"):
        Store.open(path, spec)
    index.write_bytes(good)
    for name in ("block-00001.bin", "head-00000.bin", "embed.bin", "ends.bin"):
        file = path / name
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(LmcError, match=f"{name} is truncated"):
            Store.open(path, spec)
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        opened = Store.open(path, spec)  # a changed byte shows when it is read
        with pytest.raises(LmcError, match=f"{name} is corrupt"):
            opened.verify()
        file.unlink()
        with pytest.raises(LmcError, match=f"{name} is missing"):
            Store.open(path, spec)
        file.write_bytes(content)
    Store.open(path, spec).verify()


def test_reading_what_breaks_after_opening(make_store, monkeypatch):
    store, _, _ = make_store()
    file = store.file(1)
    content = file.read_bytes()
    file.write_bytes(content[:500])
    with pytest.raises(LmcError, match=r"block-00001.bin is truncated at byte 500"):
        store.read(1)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with ThreadPoolExecutor(2) as pool, pytest.raises(LmcError, match=r"block-00001.bin is corrupt"):
        store.read(1, pool)
    file.unlink()
    with pytest.raises(LmcError, match=r"block-00001.bin cannot be read"):
        store.read(1)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    for read in (lambda: store.read(0), store.ends, lambda: store.embed_rows([3])):
        with pytest.raises(LmcError, match=r"(block-00000|ends|embed).bin cannot be read \(Input/output error\)"):
            read()


def test_short_reads_are_continued(make_store, monkeypatch):
    store, a, b = make_store()
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: real(fd, [into[0][:37]], at))
    check_contents(store, a, b)


def test_rows_outside_the_table(make_store):
    store, a, _ = make_store()
    for rows in ([-1], [a.spec.vocab], [0, 1, a.spec.vocab + 5]):
        with pytest.raises(LmcError, match=f"token {rows[0] if rows[0] < 0 else rows[-1]} is outside"):
            store.embed_rows(rows)
    assert store.embed_rows([]).shape == (0, 2, a.spec.width)


def test_only_one_piece_is_held(make_pair, tmp_path):
    a, b = make_pair()
    seen = []

    def stream():
        yield next(pieces(a, b))
        for i in range(a.spec.layers):
            block = {name: t.clone() for name, t in a.blocks[i].items()}
            seen.append(weakref.ref(block["q"]))
            yield i, [block, b.blocks[i]]
            del block
            assert seen[-1]() is None

    Store.create(tmp_path / "s", a.spec, stream())
    assert len(seen) == a.spec.layers


def test_slot_shapes_cover_the_spec(make_checkpoint):
    for variant in VARIANTS:
        spec = Model(make_checkpoint(variant, 1)).spec
        ends, block = slot_shapes(spec)
        assert {"embed", "head"} <= ends.keys() and {"q", "down"} <= block.keys()
