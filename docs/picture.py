"""Draws docs/barrier.png: the curves of `lmc-fast demo`, and the loss of both models' ensemble as the limit.

lmc-fast demo --out demo-out && python docs/picture.py demo-out
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import lmc_fast as lmc
from lmc_fast.cli.demo import demo_pair
from lmc_fast.pipeline.run import MEASURED


def main(out: Path) -> None:
    curves = json.loads((out / "report.json").read_text())["curves"]
    pair = lmc.open_pair(out / "a", out / "b")
    tokens = lmc.read_tokens(demo_pair() / "test.npy", pair.a, 128)
    tokens = tokens[:: max(1, tokens.numel() // MEASURED)]  # those that a run measures its curves on
    limit = lmc.diagnose(pair, tokens, sequences=len(tokens)).losses["ensemble"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    for curve in curves:
        label = f"{curve['name']}: barrier {curve['barrier']:.3f}"
        axes.plot(curve["lambdas"], curve["losses"], "o-", ms=4, label=label)
    axes.axhline(limit, ls="--", color="grey", label=f"ensemble of both: {limit:.3f}")
    axes.set_xlabel("λ  (0: first model, 1: second)")
    axes.set_ylabel("loss on unseen text (nats per token)")
    axes.legend(frameon=False)
    figure.savefig(Path(__file__).with_name("barrier.png"), dpi=144, metadata={"Software": "lmc-fast"})
    print(f"ensemble {limit:.4f}, ends {curves[-1]['losses'][0]:.4f} and {curves[-1]['losses'][-1]:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
