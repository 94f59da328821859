"""Matching alone, learning from a given alignment, further steps, some blocks, and what a cancelled run keeps."""

import json

import numpy as np
import pytest
import torch

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.symmetry.storage import pack


@pytest.fixture
def pair(make_checkpoint):
    return lmc.open_pair(make_checkpoint("llama", 1), make_checkpoint("llama", 2))


@pytest.fixture
def data():
    return torch.randint(40, (48, 16), generator=torch.Generator().manual_seed(1))


HOW = {"batch": 4, "objective": "endpoints"}


def parts(alignment):
    return {n: t for k, g in enumerate(alignment.members) for n, t in pack(g, str(k)).items()}


def same(x, y):
    x, y = parts(x), parts(y)
    return x.keys() == y.keys() and all(torch.equal(t, y[n]) for n, t in x.items())


def test_no_steps_are_the_matching_that_learning_starts_from(pair, data, tmp_path, capsys):
    matched, learned = lmc.align(pair, data, steps=0), lmc.align(pair, data, steps=2, **HOW)
    assert same(matched, lmc.Alignment(*learned.matched, matched=learned.matched))
    assert "history" not in matched.info and same(matched, lmc.Alignment(*matched.matched, matched=matched.matched))
    np.save(tmp_path / "ids.npy", data.numpy())
    command = ["align", str(pair.a.path), str(pair.b.path), "--data", str(tmp_path / "ids.npy"), "--block", "16"]
    capsys.readouterr()  # what another test's command set up may have shown until here
    assert main([*command, "--steps", "0", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert [curve["name"] for curve in json.loads(capsys.readouterr().out)["curves"]] == ["naive", "matched"]
    assert not (tmp_path / "out" / "learning.png").exists()


def test_learning_goes_on_from_a_given_alignment(pair, data):
    first = lmc.align(pair, data, steps=3, **HOW)
    more = lmc.align(pair, data, steps=3, base=first, **HOW)
    assert same(lmc.Alignment(*more.matched, matched=more.matched), first)
    assert more.info["history"]["excess"][0] == pytest.approx(min(first.info["history"]["excess"].values()), abs=1e-4)
    assert same(lmc.align(pair, data, steps=0, base=first), first)
    assert all(
        d[1] for d in (lmc.verify(m.path, s, data) for m, s in zip(pair.members, more.state_dicts(pair), strict=True))
    )


def test_further_steps_keep_the_history_of_both_runs(pair, data):
    first = lmc.align(pair, data, steps=3, **HOW)
    more = lmc.extend(pair, data, first, 4)
    again = lmc.extend(pair, data, more, 2)
    history = again.info["history"]
    assert history["loss"][:3] == first.info["history"]["loss"] and len(history["loss"]) == 9
    assert (
        max(history["excess"]) == 9
        and min(history["excess"].values()) == history["excess"][again.info["exported_step"]]
    )
    assert [x["after"] for x in again.info["extended"]] == [3, 7] and again.info["extended"][1]["seed"] == 2
    assert all(a is b for a, b in zip(again.matched, first.matched, strict=True))
    best = [min(a.info["history"]["excess"].values()) for a in (first, more, again)]
    assert best == sorted(best, reverse=True)
    for wrong in ({"method": "dual"}, {"schedule": lmc.Schedule()}, {"base": first}):
        with pytest.raises(lmc.LmcError, match=f"{next(iter(wrong))} is that of the run"):
            lmc.extend(pair, data, first, 1, **wrong)
    with pytest.raises(lmc.LmcError, match="nothing was learned"):
        lmc.extend(pair, data, lmc.align(pair, data, steps=0), 1)


def test_some_blocks_alone_are_learned(pair, data):
    found = lmc.align(pair, data, steps=3, blocks=[1], validation=data[:8], **HOW)
    found = lmc.align(pair, data, steps=6, blocks=[1], base=found, **HOW)
    whole = lmc.align(pair, data, steps=6, **HOW)

    def moved(alignment, block):
        return any(
            not torch.allclose(t, pack(g0, "")[n], atol=1e-6)
            for g, g0 in zip(alignment.members, alignment.matched, strict=True)
            for n, t in pack(g, "").items()
            if f"blocks.{block}." in n
        )

    assert found.info["blocks"] == [1] and not moved(found, 0)
    assert whole.info["exported_step"] == 0 or moved(whole, 0)
    assert found.info["exported_step"] == 0 or moved(found, 1)
    for wrong in ([2], [-1], [0, 0], ["0"], [True]):
        with pytest.raises(lmc.LmcError, match="different numbers from 0 to 1"):
            lmc.align(pair, data, blocks=wrong)


def test_a_cancelled_run_hands_out_what_it_learned(pair, data):
    seen = []
    with pytest.raises(lmc.Cancelled) as cancelled:
        lmc.align(pair, data, steps=50, progress=seen.append, cancel=lambda: seen[-1].step >= 5 and
                  seen[-1].stage == "learning", **HOW)  # fmt: skip
    kept = cancelled.value.alignment
    assert len(kept.info["history"]["loss"]) == 5
    more = lmc.extend(pair, data, kept, 2)
    assert len(more.info["history"]["loss"]) == 7
    with pytest.raises(lmc.Cancelled) as cancelled:
        lmc.align(pair, data, steps=5, cancel=lambda: True)
    assert cancelled.value.alignment is None


def test_another_alignment_is_refused(pair, data, make_checkpoint, tmp_path):
    other = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    with pytest.raises(lmc.LmcError, match="not a symmetry of llama"):
        lmc.align(pair, data, base=lmc.align(other, data, method="weight"))
    state, seen = tmp_path / "state.safetensors", []
    with pytest.raises(lmc.Cancelled):
        lmc.align(pair, data, steps=9, state_file=state, progress=seen.append,
                  cancel=lambda: seen[-1].stage == "learning", **HOW)  # fmt: skip
    base = lmc.align(pair, data, steps=0)
    for more in ({"base": base}, {"blocks": [0]}):
        with pytest.raises(lmc.LmcError, match=f"cannot resume: {next(iter(more))} was None"):
            lmc.align(pair, data, steps=9, state_file=state, **HOW, **more)
