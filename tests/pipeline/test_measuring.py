"""The curves of a run: how many points, on which part of the data, and nothing measured twice."""

import pytest
import torch

import lmc_fast as lmc
from lmc_fast.engine import evaluate
from lmc_fast.pipeline import run
from lmc_fast.pipeline.held_out import judging


@pytest.fixture
def case(make_checkpoint):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    tokens = torch.randint(40, (24, 16), generator=torch.Generator().manual_seed(1))
    return pair, tokens, lmc.align(pair, tokens, method="weight")


def test_curves_of_a_run_are_those_of_barrier(case, monkeypatch):
    pair, tokens, alignment = case
    alignment.info["history"] = {}  # so that there is a third curve, of the same elements
    items, real = [], evaluate.evaluate
    monkeypatch.setattr(
        evaluate, "evaluate", lambda s, some, *rest, **more: items.extend(some) or real(s, some, *rest, **more)
    )
    found = run.measure(pair, tokens, alignment)
    assert [curve.name for curve in found] == ["naive", "matched", "learned"]
    assert [len(curve.lambdas) for curve in found] == [3, 3, 11]
    assert len(items) == 3 + 1 + 9  # endpoints once
    for curve, moved in zip(found, (None, alignment, alignment), strict=True):
        exact = lmc.barrier(pair, tokens, moved, len(curve.lambdas))
        assert curve.losses == pytest.approx(exact.losses, abs=2e-6)
    assert [len(curve.losses) for curve in run.measure(pair, tokens, alignment, points=5)] == [5, 5, 5]


def test_a_long_test_text_is_sampled_evenly(case, monkeypatch):
    pair, tokens, alignment = case
    monkeypatch.setattr(run, "MEASURED", 8 * 16)
    found, exact = run.measure(pair, tokens, alignment)[1], lmc.barrier(pair, tokens[::3], alignment, 3)
    assert found.losses == pytest.approx(exact.losses, abs=2e-6)


@pytest.mark.parametrize(("learned_from", "count"), [(2, 16), (40, 16), (400, 50), (10_000, 64)])
def test_short_runs_are_judged_by_fewer_sequences(learned_from, count):
    data = torch.arange(300)[:, None]
    found = judging(data, learned_from).flatten()
    assert len(found) == count and found[0] == 0 and found[-1] > 200  # over all of them
    assert torch.equal(judging(data[:5], learned_from), data[:5])


def test_no_curves(case, tmp_path):
    pair, tokens, _ = case
    report = lmc.run(pair, tokens, tmp_path / "out", method="weight", curves=False)
    assert "curves" not in report and not (tmp_path / "out" / "curve.png").exists()
    with pytest.raises(lmc.LmcError, match="2 points make no curve"):
        lmc.run(pair, tokens, tmp_path / "more", method="weight", points=2)
    assert not list(tmp_path.glob("more*"))


def test_an_alignment_of_other_models_is_told(make_checkpoint, case, caplog):
    (pair, tokens, alignment), third = case, make_checkpoint("neox", 3)
    a, b = pair.homes
    of_three = lmc.align(lmc.open_models([a, b, third]), tokens, scheme="mergemany")
    for look in (lmc.barrier, lmc.diagnose):
        with pytest.raises(lmc.LmcError, match="of these models in another order"):
            look(lmc.open_pair(b, a), tokens, alignment)
        with pytest.raises(lmc.LmcError, match="of 3 models, not of 2"):
            look(pair, tokens, of_three)
        caplog.clear()
        look(pair, tokens, alignment)
        assert "another checkpoint" not in caplog.text
        look(lmc.open_pair(a, third), tokens, alignment)
        assert f"made for another checkpoint than {third}" in caplog.text
