"""Every stage around learning, on a model of many blocks: how much of it is in memory, and what comes out."""

import re

import pytest
import torch
from checkpoints_tiny import randomize
from live import LiveBytes
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import lmc_fast as lmc
from lmc_fast.alignment import Alignment
from lmc_fast.checkpoints import Checkpoint, Model, lazy
from lmc_fast.evaluation import difference
from lmc_fast.matching.activations import gather_statistics
from lmc_fast.matching.balance import balance
from lmc_fast.matching.closed_form import Evidence, match
from lmc_fast.pipeline.export import export_endpoint
from lmc_fast.pipeline.matched import match_endpoints
from lmc_fast.pipeline.prepare import prepare
from lmc_fast.streaming.store import Store
from lmc_fast.symmetry import Transform, canonicalize
from lmc_fast.symmetry.elements import Dense

WIDTH, FFN, VOCAB = 64, 192, 64
BLOCK = (4 * WIDTH * WIDTH + 2 * WIDTH * FFN) * 8  # bytes in float64


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """ends(layers) -> two checkpoints whose blocks are large beside all else."""
    made = {}

    def make(layers):
        if layers not in made:
            made[layers] = [tmp_path_factory.mktemp(f"{layers}-{side}") for side in "ab"]
            for seed, directory in enumerate(made[layers]):
                config = GPTNeoXConfig(
                    vocab_size=VOCAB,
                    hidden_size=WIDTH,
                    num_hidden_layers=layers,
                    num_attention_heads=8,
                    intermediate_size=FFN,
                    max_position_embeddings=32,
                )
                model = GPTNeoXForCausalLM(config)
                randomize(model, seed)
                model.save_pretrained(directory)
        return made[layers]

    return make


TOKENS = torch.randint(VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))


def canonical(directory):
    return canonicalize(Model(directory).open_weights(torch.float64))


def _canonical_and_balanced(a, b, out):
    x, y = canonical(a), canonical(b)
    moved = balance(x).apply(x)
    for i in range(moved.spec.layers):
        y.blocks[i], moved.blocks[i]


def _match(a, b, out):
    match(canonical(a), canonical(b), Evidence(1, 0), rounds=2)


def _statistics(a, b, out):
    gather_statistics(canonical(a), canonical(b), TOKENS, batch=2, keep=out)


def _export(a, b, out):
    spec = Model(a).spec
    export_endpoint(
        Model(a),
        Transform({"stream": Dense.orthogonal(torch.eye(WIDTH).double())}, Transform.identity(spec).blocks),
        out / "x",
        None,
    )


def _merge(a, b, out):
    lmc.merge(a, b, out / "merged")


def _verify(a, b, out):
    lmc.verify(a, b, TOKENS)


def _prepare(a, b, out):
    x, y = canonical(a), canonical(b)
    for _ in prepare((x, y), (Transform.identity(x.spec), Transform.identity(x.spec)), torch.float32):
        pass


# how many float64 blocks may be alive, input and output of what is just done included
STAGES = [
    (_canonical_and_balanced, 5),
    (_match, 7),
    (_statistics, 7),
    (_export, 4),
    (_merge, 2),
    (_verify, 2),
    (_prepare, 5),
]


@pytest.mark.parametrize(("stage", "blocks"), STAGES, ids=[stage.__name__[1:] for stage, _ in STAGES])
def test_memory_is_that_of_a_few_blocks_however_many_there_are(stage, blocks, ends, tmp_path):
    peaks = []
    for layers in (3, 12):
        out = tmp_path / str(layers)
        out.mkdir()
        a, b = ends(layers)
        with LiveBytes() as live, torch.no_grad():
            stage(a, b, out)
        peaks.append(live.peak)
        print(stage.__name__, layers, live.peak / BLOCK)
    assert peaks[0] < blocks * BLOCK
    kept = (12 - 3) * (8 * 8 * 8 * 4 + FFN + 8) * 8  # head maps and permutations of the transforms that are found
    assert peaks[1] <= peaks[0] + 2 * kept


def test_live_bytes_counts_what_is_alive():
    with LiveBytes() as live:
        x = torch.zeros(1000, dtype=torch.float64)
        y = x[10:20]
        del x
        assert live.now == 8000  # a view keeps all of it
        z = y + 1
        del y
        assert live.now == 80
        z.add_(1)
        assert live.now == 80 and live.peak == 8080
        del z
        assert live.now == 0


@pytest.mark.parametrize("lazily", [False, True])
def test_prepared_pieces_are_the_moved_endpoints(lazily, make_checkpoint, monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK_ELEMENTS", 13 * 24)  # so that tables come in runs of 13 rows
    pair = lmc.open_pair(make_checkpoint("gpt2-tied", 1), make_checkpoint("gpt2-tied", 2))
    models = (pair.a, pair.b)
    a, b = (canonicalize(m.open_weights() if lazily else m.load()) for m in models)
    base = match_endpoints(a, b, TOKENS % 40, Evidence(1, 0.3))
    moved = [g.apply(canonicalize(m.load())) for g, m in zip(base, models, strict=True)]
    seen = []
    rows = {"embed": 0, "head": 0}
    for name, slots in prepare((a, b), base, torch.bfloat16):
        (table,) = (t for t in rows if t in slots[0]) if name == "ends" and len(slots[0]) == 1 else (None,)
        seen.append(table or name)
        for w, found in zip(moved, slots, strict=True):
            assert all(t.dtype == torch.bfloat16 for t in found.values())
            if table:
                start = rows[table]
                expected = {table: w.ends[table][start : start + len(found[table])]}
            else:
                expected = w.small_ends if name == "ends" else w.blocks[name]
            assert found.keys() == expected.keys()
            assert all(torch.equal(t, expected[n].to(torch.bfloat16)) for n, t in found.items())
        if table:
            rows[table] += len(slots[0][table])
    assert seen == ["ends", *["embed"] * 4, *["head"] * 4, 0, 1] and rows == {"embed": 40, "head": 40}


@pytest.mark.parametrize("variant", ["gptj", "bert", "vit"])
def test_prepared_pieces_make_a_store(variant, tmp_path):
    import zoo

    zoo.write(variant, tmp_path / "x")
    w = canonicalize(Model(tmp_path / "x").open_weights())
    one = Transform.identity(w.spec)
    store = Store.create(tmp_path / "store", w.spec, prepare((w, w), (one, one), torch.float32))
    parts = [store.read(store.layers + k)[0] for k in range(store.head_parts)]
    for name in ("head", "head_bias"):
        assert torch.equal(torch.cat([part[name] for part in parts]), w.ends.get(name, parts[0][name]))
    found, expected = store.read(1)[1], w.blocks[1]
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())


def test_a_whole_alignment_from_lazy_endpoints(ends, tmp_path):
    a, b = ends(3)
    pair = lmc.open_pair(a, b)
    opened, loaded = (
        match_endpoints(
            *(canonicalize(load(m)) for m in (pair.a, pair.b)), TOKENS, Evidence(1, 0.3), keep=keep, rounds=3
        )
        for load, keep in ((Model.open_weights, tmp_path), (Model.load, None))
    )
    assert torch.equal(opened[1].stream.matrix, loaded[1].stream.matrix)
    alignment = Alignment(*opened, opened)
    lmc.export(pair, alignment, tmp_path / "out", torch.float32)
    for side, model, g in (("a", pair.a, opened[0]), ("b", pair.b, opened[1])):
        written = Model(tmp_path / "out" / side).load(torch.float64)
        expected = g.apply(canonicalize(model.load(torch.float64)))
        assert torch.equal(written.blocks[2]["down"], expected.blocks[2]["down"].float().double())
        assert torch.equal(written.ends["head"], expected.ends["head"].float().double())
        assert difference(written, model.load(torch.float64), TOKENS).kl < 1e-8


def test_a_failure_in_the_middle_of_an_export_leaves_nothing(ends, tmp_path, monkeypatch):
    a, b = ends(3)
    pair = lmc.open_pair(a, b)
    one = Transform.identity(pair.spec)
    real = Checkpoint.read
    reads = []

    def failing(self, name):
        found = re.search(r"layers\.(\d+)", name)
        block = int(found[1]) if found else None
        if not reads or reads[-1] != block:
            reads.append(block)
        if block == 2:
            raise OSError(28, "No space left on device")
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "read", failing)
    with pytest.raises(lmc.LmcError, match="disk is full"):
        lmc.export(pair, Alignment(one, one, (one, one)), tmp_path / "out")
    assert reads == [None, 0, 1, 2] and not list(tmp_path.iterdir())
