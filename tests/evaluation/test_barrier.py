"""Standard errors of a curve against transformers' losses and scipy, and the words that are said of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.evaluation.barrier import curve_between
from lmc_fast.examples import Examples


def losses_of_inputs(paths, place, tokens):
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    with torch.no_grad():
        for x, y in zip(model.parameters(), other.parameters(), strict=True):
            x.copy_(torch.lerp(x, y, place))
        out = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).mean(1)


def test_the_standard_error_is_that_of_the_mean_over_inputs(make_checkpoint):
    paths = [make_checkpoint("llama", seed) for seed in (1, 2)]
    tokens = torch.randint(40, (9, 20), generator=torch.Generator().manual_seed(1))
    curve = lmc.barrier(lmc.open_pair(*paths), tokens, points=3)
    first, middle, last = (losses_of_inputs(paths, place, tokens) for place in (0.0, 0.5, 1.0))
    excess = (middle - (first + last) / 2).numpy()
    assert curve.errors == pytest.approx([0, stats.sem(excess), 0], rel=1e-4, abs=1e-6)
    assert (curve.middle, curve.lowest[0]) == (pytest.approx(excess.mean(), abs=1e-5), min(0.0, curve.middle))
    assert f"± {stats.sem(excess):.4f}" in curve.words and f"middle {curve.middle:+.4f}" in curve.words
    assert lmc.barrier(lmc.open_pair(*paths), tokens[:1], points=3).errors is None


def test_inputs_with_unequal_numbers_of_predictions_count_by_them(make_checkpoint):
    """Against the jackknife."""
    pair = lmc.open_pair(*(make_checkpoint("llama", seed) for seed in (1, 2)))
    tokens = torch.randint(40, (40, 12), generator=torch.Generator().manual_seed(2))
    targets = tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.6, -1)
    targets[:, 3] = tokens[:, 3]
    a, b = (model.open_weights() for model in (pair.a, pair.b))

    def curve(rows):
        return curve_between(a, b, Examples(tokens[rows], targets[rows]), 3, batch=7)

    everything = torch.arange(40)
    without = np.array([curve(everything[everything != i]).middle for i in range(40)])
    jackknife = np.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
    assert curve(everything).errors[1] == pytest.approx(jackknife, rel=0.1)
