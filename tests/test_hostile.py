"""A few of benchmarks.hostile's bad inputs of every kind, judged in this process."""

from collections import Counter

import pytest

from benchmarks import hostile, judges, mutants

PER_GROUP = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("hostile") / "good"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutants, "FAMILIES", ("neox", "vit"))
        hostile.prepare(home)
        yield home


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # one of the bad inputs is one
def test_bad_inputs_are_refused_or_read_as_others_read_them(home, tmp_path):
    counts, outcomes = Counter(), Counter()
    for case in hostile.cases(home):
        if case.group == "config" and not case.name.startswith("config.json is"):
            continue  # thousands, whose judge is transformers: the benchmark's part
        counts[case.group] += 1
        if counts[case.group] <= PER_GROUP and "million" not in case.name:
            outcome, detail = hostile.judged(case, home, tmp_path / "case")
            assert outcome not in hostile.FAULTS, (case.group, case.name, outcome, detail)
            outcomes[case.group, outcome] += 1
    assert counts.keys() | {"adapter"} == hostile.JUDGES.keys()  # whose judge, peft, may not be installed
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "refused") > 50
    assert sum(n for (_, outcome), n in outcomes.items() if outcome == "equal") > 3


def test_what_is_wrong_is_noticed(home, tmp_path, monkeypatch):
    case = mutants.Case("data", "text", "data.txt: good", lambda h: (h / "data.txt").write_text("w5 w6 w7 w8"))
    assert hostile.judged(case, home, tmp_path / "case") == ("equal", "")
    monkeypatch.setitem(hostile.JUDGES, "data", lambda *_: exec("assert False, 'differs'"))
    assert hostile.judged(case, home, tmp_path / "case") == ("silent", "differs")
    monkeypatch.setattr("lmc_fast.data.require_regular", lambda *_: 1 / 0)
    monkeypatch.setitem(hostile.JUDGES, "data", judges.text)
    assert hostile.judged(case, home, tmp_path / "case")[0] == "traceback"
