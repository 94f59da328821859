"""alignment.safetensors and state.safetensors that were cut, flipped, edited or made for something else are refused."""

import json

import numpy as np
import pytest
import torch
from random_elements import random_element
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmc_fast import Alignment, LmcError, align, open_pair
from lmc_fast.checkpoints import Model
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.storage import load_tensors, pack, save_tensors


@pytest.fixture(scope="module")
def spec(make_checkpoint):
    return Model(make_checkpoint("llama")).spec


@pytest.fixture
def saved(spec, tmp_path):
    file = tmp_path / "alignment.safetensors"
    a, b, *matched = (random_element(spec, seed) for seed in (1, 2, 3, 4))
    Alignment(a, b, tuple(matched), {"method": "dual"}).save(file)
    Alignment.load(file, spec)
    return file


def test_what_was_not_learned_is_written_once(saved, spec, tmp_path):
    once = tmp_path / "once.safetensors"
    a, b, c = (random_element(spec, seed) for seed in (1, 2, 3))
    Alignment(a, b, (random_element(spec, 1), c)).save(once)  # A stayed where matching left it
    names = load_tensors(once)[0].keys()
    assert {name.split(".blocks")[0].split(".stream")[0] for name in names} == {"members.0", "members.1", "matched.1"}
    found = Alignment.load(once, spec)
    for element, expected in zip((*found.members, *found.matched), (a, b, a, c), strict=True):
        left, right = pack(element, ""), pack(expected, "")
        assert left.keys() == right.keys() and all(torch.equal(t, right[name]) for name, t in left.items())
    assert once.stat().st_size < 0.8 * saved.stat().st_size


def refused(file, spec):
    with pytest.raises(LmcError, match=file.name):
        Alignment.load(file, spec)
    with pytest.raises(LmcError, match=file.name):
        Alignment.load(file)


def test_every_flipped_bit_and_every_cut_is_noticed(saved, spec):
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, 8), *rng.integers(8, header, 40), *rng.integers(header, len(whole), 40)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        saved.write_bytes(flipped)
        refused(saved, spec)
    for length in (0, 7, 8, 100, header, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refused(saved, spec)
    saved.write_bytes(whole + b"\0")
    refused(saved, spec)


def test_edited_tensors_and_metadata_are_noticed(saved, spec):
    tensors = load_file(saved)
    with safe_open(saved, "pt") as handle:
        metadata = handle.metadata()
    first = sorted(tensors)[0]

    def edited(change, meta=metadata):
        kept = dict(tensors)
        change(kept)
        save_file(kept, saved, meta)
        refused(saved, spec)

    edited(lambda t: t.update({first: t[first] * 1.01}))
    edited(lambda t: t.update({first: torch.zeros_like(t[first])}))
    edited(lambda t: t.update({first: t[first].to(torch.float32)}))
    edited(lambda t: t.update({first: t[first][None].clone()}))
    edited(lambda t: t.pop(first))
    edited(lambda t: t.update(x=torch.zeros(2)))
    for key in ("lmc_fast", "checksum"):
        edited(lambda t: None, {k: v for k, v in metadata.items() if k != key})
    edited(lambda t: None, metadata | {"lmc_fast": metadata["lmc_fast"].replace('"dual"', '"weight"')})
    edited(lambda t: None, metadata | {"checksum": "0" * 32})
    edited(lambda t: None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"version": None},
        {"version": 1},
        {"version": True},
        {"members": None},
        {"members": 2},
        {"members": [{"name": "a"}]},
        {"layers": 3},
        {"layers": 0},
        {"layers": -1},
        {"layers": "2"},
        {"layers": 2.0},
        {"layers": True},
        {"layers": [2]},
        {"layers": 10**9},
        {"layers": None},
        {"info": None},
        {"info": [1]},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense_are_refused_though_the_checksum_fits(change, saved, spec):
    tensors, metadata = load_tensors(saved)
    save_tensors(saved, tensors, metadata | change)
    with pytest.raises(LmcError, match=saved.name):
        Alignment.load(saved, spec)


def test_tensors_that_make_no_sense_are_refused_though_the_checksum_fits(saved, spec):
    tensors, metadata = load_tensors(saved)
    names = [n for n in sorted(tensors) if n.startswith(("members.0", "matched.1"))]
    for name in names[:: max(1, len(names) // 25)]:
        t = tensors[name]
        other = t.long() if t.is_floating_point() else t.double()
        for bad in (t[..., :-1], t[None], torch.zeros_like(t), t.flatten()[0], t.to(torch.bool), other):
            save_tensors(saved, tensors | {name: bad.clone()}, metadata)
            with pytest.raises(LmcError):
                Alignment.load(saved, spec)
                pytest.fail(f"{name} {tuple(t.shape)} may be {bad.dtype} {tuple(bad.shape)}")
    save_tensors(saved, tensors | {"members.0.blocks.7.vo.matrix": tensors[names[0]]}, metadata)
    refused(saved, spec)


def test_states_that_make_no_sense_are_refused_though_the_checksum_fits(make_checkpoint, tokens, tmp_path):
    pair = open_pair(make_checkpoint("llama", 1), make_checkpoint("llama", 2))
    file = tmp_path / "state.safetensors"

    def go_on():
        return align(pair, tokens, validation=tokens, steps=2, batch=1, state_file=file)

    go_on()
    tensors, metadata = load_tensors(file)
    again = go_on()
    assert again.info["history"]["loss"] == metadata["history"]["loss"]

    def refused_state(tensors, metadata):
        save_tensors(file, tensors, metadata)
        with pytest.raises(LmcError, match=file.name):
            go_on()

    charts = [n for n in sorted(tensors) if n.startswith(("chart.", "momentum.", "best.", "adam."))]
    for name in charts:
        t = tensors[name]
        for bad in (t.flatten()[:1].clone(), t[None].clone(), t.double(), None):
            rest = {n: x for n, x in tensors.items() if n != name}
            if bad is None and not name.startswith(("chart.", "momentum.")):
                continue  # a best state and Adam's moments may not be there yet
            refused_state(rest if bad is None else rest | {name: bad}, metadata)
    base = next(n for n in sorted(tensors) if n.startswith("members.0") and tensors[n].is_floating_point())
    refused_state(tensors | {base: torch.zeros_like(tensors[base])}, metadata)
    for change in (
        {"history": None},
        {"history": {"loss": 5}},
        {"history": {"losses": []}},
        {"history": {"loss": [], "excess": {"x": 1}}},
        {"run": None},
        {"run": []},
        {"run": {"method": "dual", "schedule": 5}},
    ):
        refused_state(tensors, json.loads(json.dumps(metadata)) | change)


def first_layout(transform, prefix):
    """The tensors of a transform as version 1 wrote them, from the elements and not by the library's names."""
    out = {f"{prefix}.rotation": transform.stream.matrix}
    for i, block in enumerate(transform.blocks):
        at = f"{prefix}.blocks.{i}."
        out |= {at + "heads": block["heads"].places, at + "units": block["units"].places}
        if "queries" in block:
            out[at + "queries"] = block["queries"].places
        for name in ("vo", "qk"):
            out |= {at + name: block[name].matrix, f"{at}{name}_inverse": block[name].back}
        if hasattr(block["units"].inner, "scale"):
            out[at + "unit_scale"] = block["units"].inner.scale
    return {name: t.contiguous() for name, t in out.items()}


@pytest.mark.parametrize("variant", ["llama", "neox-sequential"])
def test_alignments_of_version_1_are_read(variant, make_checkpoint, tmp_path):
    model = Model(make_checkpoint(variant))
    elements = [random_element(model.spec, seed) for seed in range(4)]
    tensors = {}
    for prefix, element in zip(("a", "b", "matched.a", "matched.b"), elements, strict=True):
        tensors |= first_layout(element, prefix)
    file = tmp_path / "alignment.safetensors"
    info = {"method": "dual", "history": {"loss": [1.5], "excess": {"1": 0.25}}}
    text = json.dumps({"version": 1, "layers": model.spec.layers, "info": info})
    save_file(tensors, file, {"lmc_fast": text})  # no checksum
    found = Alignment.load(file, model.spec)
    assert found.info == info
    weights = canonicalize(model.load(torch.float64))
    for element, same in zip(elements, (*found.members, *found.matched), strict=True):
        x, y = element.apply(weights), same.apply(weights)
        assert all(torch.equal(x.ends[name], y.ends[name]) for name in x.ends)
        assert all(torch.equal(p[n], q[n]) for p, q in zip(x.blocks, y.blocks, strict=True) for n in p)
    found.save(file)
    with safe_open(file, "pt") as handle:
        metadata = json.loads(handle.metadata()["lmc_fast"])
        assert (metadata["version"], [m["name"] for m in metadata["members"]]) == (2, ["a", "b"])
        assert {name.rpartition(".blocks")[0] for name in handle.keys() if "blocks" in name} == {  # noqa: SIM118
            part for m in metadata["members"] for part in (m["element"], m["matched"])
        }
    save_file(tensors | {"a.blocks.0.odd": torch.zeros(2)}, file, {"lmc_fast": text})
    with pytest.raises(LmcError, match=r"a\.blocks\.0\.odd"):
        Alignment.load(file, model.spec)
    for lost in ("a.blocks.1.vo", "matched.b.blocks.0.qk"):  # its inverse alone says nothing
        save_file({name: t for name, t in tensors.items() if name != lost}, file, {"lmc_fast": text})
        with pytest.raises(LmcError, match=f"{lost} is missing"):
            Alignment.load(file, model.spec)
    for name in ("a.blocks.0.vo_inverse", "b.rotation", "b.blocks.1.units"):
        save_file(tensors | {name: tensors[name] * 2}, file, {"lmc_fast": text})
        with pytest.raises(LmcError, match="not a symmetry"):
            Alignment.load(file, model.spec)
