"""The ring of slots: right contents at every visit, bit for bit the resident results, clean ends."""

import errno
import itertools
import os
import random
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lmc_fast.engine.attention import Positions
from lmc_fast.engine.block import block
from lmc_fast.engine.passes import visit_order
from lmc_fast.errors import LmcError
from lmc_fast.streaming.layout import ALIGNMENT
from lmc_fast.streaming.packing import pieces
from lmc_fast.streaming.ring import Streamed
from lmc_fast.streaming.schedule import steady_loads
from lmc_fast.streaming.store import Store


@pytest.fixture(scope="module")
def deep(make_pair, tmp_path_factory):
    """(store, A, B) with five blocks and a head in four parts."""
    a, b = make_pair("llama-tied-biased")
    for w in (a, b):
        w.blocks += [{name: t * (2 + i) for name, t in w.blocks[0].items()} for i in range(3)]
        w.spec = replace(w.spec, layers=5)
    store = Store.create(tmp_path_factory.mktemp("deep") / "store", a.spec, pieces(a, b), part_bytes=3000)
    assert store.head_parts == 4
    return store, a, b


def expected(deep, segment):
    store, a, b = deep
    if segment < store.layers:
        return a.blocks[segment], b.blocks[segment]
    rows = [len(store.read(store.layers + p)[0]["head"]) for p in range(store.head_parts)]
    start = sum(rows[: segment - store.layers])
    return [{"head": w.ends["head"][start : start + rows[segment - store.layers]]} for w in (a, b)]


def same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("load", "read"))]


@pytest.fixture(autouse=True)
def no_thread_survives():
    yield
    assert not threads()


@pytest.fixture
def erratic(monkeypatch):
    """Reads take any time: sometimes none, sometimes longer than a visit."""
    real, chance = os.preadv, random.Random(3)

    def read(fd, into, at):
        time.sleep(chance.choice((0, 0, 0.002)))
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("resident", [(), (1,), (0, 2, 5), range(9)])
def test_every_visit_sees_its_unit(slots, resident, deep, erratic):
    store = deep[0]
    learn, look = visit_order(5, 4, learn=True), visit_order(5, 4, learn=False)
    with Streamed(store, buffers=slots, resident=resident, poison=True) as ring:
        for visits in (learn, learn, look, look[:3], look, learn):
            ring.begin(visits)
            for segment in visits:
                with ring.visit(segment) as found:
                    same(found, expected(deep, segment))
                    for slot in found[0].values():
                        assert slot.dim() == 2 or slot.data_ptr() % ALIGNMENT == 0
        assert ring.traffic.visits == 3 * len(learn) + 2 * len(look) + 3


def test_passes_may_be_left_and_visits_may_fail(deep, erratic):
    chance = random.Random(1)
    with Streamed(deep[0], buffers=2, poison=True) as ring:
        for visits in [visit_order(5, 4, learn=True), visit_order(5, 4, learn=False)] * 6:
            ring.begin(visits)
            stop = chance.randrange(len(visits))
            for i, segment in enumerate(visits):
                if i == stop and i % 2:
                    with pytest.raises(ZeroDivisionError), ring.visit(segment):
                        raise ZeroDivisionError
                    break
                if i == stop:
                    break
                with ring.visit(segment) as found:
                    same(found, expected(deep, segment))


def test_traffic_is_what_the_schedule_says(deep):
    store, visits = deep[0], visit_order(5, 4, learn=True)
    per_pass = steady_loads(visits, 2, (1, 3))
    with Streamed(store, buffers=2, resident=(1, 3)) as ring:
        counts = []
        for _ in range(4):
            ring.begin(visits)
            for segment in visits:
                with ring.visit(segment):
                    pass
            counts.append((ring.traffic.loads, ring.traffic.bytes))
    assert counts[3][0] - counts[2][0] == sum(per_pass.values())
    assert counts[3][1] - counts[2][1] == sum(store.segment_bytes[u] * n for u, n in per_pass.items())
    assert ring.traffic.read_seconds > 0 and set(ring.traffic.to_json()) >= {"loads", "bytes", "stall_seconds"}


def test_resident_units_are_loaded_once(deep):
    with Streamed(deep[0], buffers=2, resident=range(9)) as ring:
        for _ in range(3):
            ring.begin(range(9))
            for segment in range(9):
                with ring.visit(segment) as found:
                    same(found, expected(deep, segment))
        assert ring.traffic.loads == 0 and ring.traffic.bytes == sum(deep[0].segment_bytes) and ring.buffers == 0


def test_a_slot_is_poisoned_when_it_is_released(deep):
    """Views that outlive their visit show it at the latest when their slot is given away."""
    with Streamed(deep[0], buffers=2, poison=True) as ring:
        seen = []
        real = ring.transport.load
        ring.transport.load = lambda segment, slot, buffer: (seen.append(buffer.clone()), real(segment, slot, buffer))
        ring.begin(visit_order(5, 4, learn=False))
        for segment in visit_order(5, 4, learn=False):
            with ring.visit(segment):
                pass
    later = seen[2:]  # the first two go into fresh slots
    assert len(later) >= 7
    for buffer in later:
        assert (buffer == 255).all() and buffer.view(torch.float32).isnan().all()


def run(source, x, positions, spec, rounds=2):
    """Block-major forward and backward with recompute at lambda = 0.3: the gradients at the input."""
    visits = [*range(spec.layers), *range(spec.layers)[::-1]]
    out = []

    def at(slots):
        return {name: torch.lerp(slots[0][name], slots[1][name], 0.3) for name in slots[0]}

    for _ in range(rounds):
        source.begin(visits)
        stream = [x]
        with torch.no_grad():
            for i in range(spec.layers):
                with source.visit(i) as slots:
                    stream.append(block(spec, at(slots), stream[-1], positions, i))
        gradient = stream[-1].cos()
        for i in reversed(range(spec.layers)):
            with source.visit(i) as slots, torch.enable_grad():
                leaf = stream[i].detach().requires_grad_()
                (gradient,) = torch.autograd.grad(block(spec, at(slots), leaf, positions, i), leaf, gradient)
        out += [stream[-1], gradient]
    return out


class InMemory:
    def __init__(self, a, b):
        self.blocks = list(zip(a.blocks, b.blocks, strict=True))

    def begin(self, visits):
        pass

    def visit(self, segment):
        return nullcontext(self.blocks[segment])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["neox", "gpt2", "llama"])
def test_streamed_and_resident_agree_bit_for_bit(variant, dtype, make_store, erratic):
    store, a, b = make_store(variant, dtype)
    x = torch.randn(2, 7, a.spec.width, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = Positions.of(a.spec, 7, dtype, "cpu")
    wanted = run(InMemory(a, b), x, positions, a.spec)
    assert all(t.isfinite().all() for t in wanted)
    for slots, resident in itertools.product((1, 2, 3), ((), (0,))):
        with Streamed(store, buffers=slots, resident=resident, poison=True) as ring:
            assert all(map(torch.equal, run(ring, x, positions, a.spec), wanted))


def test_rows_and_ends(make_store):
    store, a, b = make_store("gpt2")
    with Streamed(store) as ring:
        x, y = ring.embed_rows(torch.tensor([0, 3, 4, 39]))
        assert torch.equal(x, a.ends["embed"][[0, 3, 4, 39]]) and torch.equal(y, b.ends["embed"][[0, 3, 4, 39]])
        assert ring.traffic.row_bytes == 2 * x.nbytes
        assert torch.equal(ring.ends[1]["positions"], b.ends["positions"])
        assert ring.spec == a.spec and ring.head_parts == store.head_parts


def visit_all(ring, passes=2):
    for _ in range(passes):
        ring.begin(range(len(ring.store.segment_bytes)))
        for segment in range(len(ring.store.segment_bytes)):
            with ring.visit(segment):
                pass


@pytest.mark.parametrize("resident", [(), (1,)])
def test_a_broken_file_ends_the_run_and_is_named(resident, make_store):
    store, _, _ = make_store()
    file = store.file(1)
    content = file.read_bytes()
    for broken, words in [
        (content[:300], r"block-00001.bin is truncated at byte 300"),
        (content[:300] + b"?" + content[301:], r"block-00001.bin is corrupt"),
        (None, r"block-00001.bin cannot be read"),
    ]:
        file.write_bytes(broken) if broken else file.unlink()
        with pytest.raises(LmcError, match=words), Streamed(store, resident=resident) as ring:
            visit_all(ring)
        assert not threads()
        file.write_bytes(content)


def test_an_input_error_in_the_middle_of_a_run(make_store, monkeypatch):
    store, _, _ = make_store()
    real, count = os.preadv, itertools.count()

    def failing(fd, into, at):
        if next(count) == 9:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, into, at)

    with Streamed(store) as ring:
        visit_all(ring, 1)
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(LmcError, match=r"\.bin cannot be read \(Input/output error\)"):
            visit_all(ring, 20)
        with pytest.raises(LmcError, match="Input/output"):  # it stays broken
            visit_all(ring, 20)


def test_a_fault_of_our_own_is_not_the_users(make_store, monkeypatch):
    store, _, _ = make_store()
    with Streamed(store) as ring:
        monkeypatch.setattr(ring.transport, "load", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="division"):
            visit_all(ring)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_it_closes_in_the_middle_of_a_read(error, make_store, monkeypatch):
    store, _, _ = make_store()
    real, started, go = os.preadv, threading.Event(), threading.Event()

    def slow(fd, into, at):
        started.set()
        go.wait(0.05)
        return real(fd, into, at)

    monkeypatch.setattr(os, "preadv", slow)
    with pytest.raises(error), Streamed(store) as ring:
        ring.begin([0, 1])
        started.wait()
        raise error
    assert not threads()
    ring.close()  # twice does no harm
    for late in (lambda: ring.begin([0]), lambda: ring.visit(0).__enter__()):
        with pytest.raises(RuntimeError, match="closed"):
            late()


def test_visits_out_of_order(make_store):
    store, _, _ = make_store()
    with Streamed(store) as ring:
        for visit in (lambda: ring.visit(0), lambda: (ring.begin([0, 1]), ring.visit(1))[1]):
            with pytest.raises(RuntimeError, match="comes next"), visit():
                pass
        ring.begin([0, 1])
        with ring.visit(0), pytest.raises(RuntimeError, match="one visit at a time"), ring.visit(1):
            pass
    with pytest.raises(LmcError, match="at least one buffer"):
        Streamed(store, buffers=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_on_a_gpu(pinned, deep):
    """Copies run on a stream of their own: long kernels and many passes would show a missing wait."""
    store = deep[0]
    visits = visit_order(5, 4, learn=True)
    with Streamed(store, "cuda", buffers=2, resident=(1,), pinned=pinned, poison=True) as ring:
        results = []
        for _ in range(5):
            ring.begin(visits)
            for segment in visits:
                with ring.visit(segment) as found:
                    torch.cuda._sleep(1_000_000)
                    results.append([{name: t.clone() for name, t in slots.items()} for slots in found])
        for segment, found in zip(visits * 5, results, strict=True):
            same([{name: t.cpu() for name, t in slots.items()} for slots in found], expected(deep, segment))
        assert ring.traffic.loads > 0
        for rows in ([0, 3], [1, 2, 5, 7, 8], [4]):  # they are read into one place, which grows
            for found, weights in zip(ring.embed_rows(torch.tensor(rows, device="cuda")), deep[1:], strict=True):
                assert torch.equal(found.cpu(), weights.ends["embed"][rows])
