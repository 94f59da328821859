"""The choice of a route: counted far from the crossover, measured and cached near it, overridden by the environment."""

import json

import pytest
import torch

from lmc_fast.kernels import dispatch

HERE = (torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LMC_FAST_ROUTE", raising=False)
    dispatch.crossover_of.cache_clear()
    yield
    dispatch.crossover_of.cache_clear()


@pytest.mark.parametrize("keep", [False, True])
def test_far_from_the_crossover_counting_decides(keep):
    assert dispatch.choose(16, 512, *HERE, keep).route == "fused"
    assert dispatch.choose(512 * 8, 512, *HERE, keep).route == "weight"
    assert not dispatch.cache_file().exists()


def test_near_it_a_measurement_decides_once(monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "measure_crossover", lambda *a: calls.append(a) or 2.0)
    for _ in range(2):
        assert dispatch.choose(96, 64, *HERE).route == "fused"
        assert dispatch.choose(150, 64, *HERE).route == "weight"
    dispatch.crossover_of.cache_clear()  # another process
    assert dispatch.choose(96, 64, *HERE).why.endswith("measured at 2.00")
    assert len(calls) == 1
    assert list(json.loads(dispatch.cache_file().read_text()).values()) == [2.0]


@pytest.mark.parametrize("same", [False, True])
def test_what_another_process_found_meanwhile_stays(same, monkeypatch):
    """Else runs that begin together would choose apart, now or at the next start, and end at other bits."""
    found = {}

    def measure(*_):
        dispatch.cache_file().parent.mkdir(exist_ok=True)
        dispatch.cache_file().write_text(json.dumps(found | {"another": 1.5}))
        return 2.0

    monkeypatch.setattr(dispatch, "measure_crossover", measure)
    dispatch.crossover_of(64, *HERE, True)
    (key,) = json.loads(dispatch.cache_file().read_text()).keys() - {"another"}
    dispatch.cache_file().unlink()
    dispatch.crossover_of.cache_clear()
    found = {key: 3.0} if same else {}
    assert dispatch.crossover_of(64, *HERE, True) == (3.0 if same else 2.0)
    assert json.loads(dispatch.cache_file().read_text()) == {"another": 1.5, key: 3.0 if same else 2.0}


@pytest.mark.parametrize("content", ["", "[]", "not json", '{"other": 1}'])
def test_a_spoilt_cache_is_replaced(content, monkeypatch):
    dispatch.cache_file().parent.mkdir()
    dispatch.cache_file().write_text(content)
    monkeypatch.setattr(dispatch, "measure_crossover", lambda *a: 2.0)
    assert dispatch.choose(96, 64, *HERE).route == "fused"
    assert 2.0 in json.loads(dispatch.cache_file().read_text()).values()


def test_a_real_measurement_is_finite_and_positive():
    for keep in (False, True):
        assert 0 < dispatch.measure_crossover(32, *HERE, keep) < float("inf")


def test_environment_overrides(monkeypatch):
    monkeypatch.setenv("LMC_FAST_ROUTE", "concat")
    assert dispatch.choose(1, 512, *HERE).route == "concat"
    monkeypatch.setenv("LMC_FAST_ROUTE", "teleport")
    with pytest.raises(ValueError, match="LMC_FAST_ROUTE"):
        dispatch.choose(1, 512, *HERE)
