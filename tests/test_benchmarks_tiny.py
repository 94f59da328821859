"""What the experiments measure with: losses on a line by transformers alone, and training in slices."""

import importlib.util
import time

import pytest
import torch

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("benchmarks are not part of an installed package", allow_module_level=True)
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from benchmarks.experiments import problems
from benchmarks.medium import TimeUp, trained
from benchmarks.tiny import DATA, LAMBDAS, excesses

if not (DATA / "train.npy").exists():
    pytest.skip("needs examples/pair", allow_module_level=True)


def test_a_line_by_transformers_is_the_one_that_lmc_fast_measures(make_checkpoint):
    places = make_checkpoint("neox", 1), make_checkpoint("neox", 2)
    pair = lmc.open_pair(*places)
    tokens = torch.randint(pair.spec.vocab, (6, 12), generator=torch.Generator().manual_seed(0))
    expected = lmc.barrier(pair, tokens, points=len(LAMBDAS))
    stock = [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]
    found = excesses(*stock, tokens)
    assert found == pytest.approx((expected.barrier, expected.middle), abs=2e-5)


def test_training_in_slices_comes_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "slices").mkdir()
    whole = trained(tmp_path / "whole", 64, 1, 3, time.monotonic() + 1000)
    for _ in range(2):
        with pytest.raises(TimeUp):
            trained(tmp_path / "slices", 64, 1, 3, 0.0)
    sliced = trained(tmp_path / "slices", 64, 1, 3, 0.0)
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), sliced.parameters(), strict=True))
    with pytest.raises(SystemExit, match="3 steps"):
        trained(tmp_path / "slices", 64, 1, 5, 0.0)


@pytest.mark.parametrize(
    ("matched", "learned", "missed"), [(0.4, 0.3, 0), (0.6, 0.3, 1), (0.4, 0.42, 1), (0.6, 0.7, 2), (0.505, 0.51, 0)]
)
def test_what_is_worse_than_before_is_told(matched, learned, missed):
    middles = {"naive": 0.5, "matched": matched, "learned": learned}
    rows = [{"experiment": "x", "case": case, "middle": middle} for case, middle in middles.items()]
    assert len(list(problems([*rows, {"experiment": "x", "case": "block 0", "cosine": 1.0}]))) == missed
