"""One page of pictures of a diagnosis."""

from __future__ import annotations

from pathlib import Path

from .diagnosis import Diagnosis
from .plots import new_page, save_figure


def plot_diagnosis(found: Diagnosis, file: Path) -> None:
    """Six panels over the blocks; .png, .svg or .pdf. Raises LmcError."""
    figure, panels = new_page(3, 2, (9.6, 10.2))
    blocks = list(range(len(found.blocks)))
    costs, kinds, features, shares, partners, variance = panels
    costs.bar(blocks, [block.own for block in found.blocks])
    costs.set_title("excess if this block alone is averaged (nats)")
    names = ["a", "b", "middle", "calibrated", "ensemble"]
    kinds.bar([f"{name}\nalone" for name in found.parts], list(found.parts.values()))
    kinds.bar([name for name in names if name not in "ab"], [_over(found, n) for n in names if n not in "ab"])
    kinds.set_title("excess over the line between the ends (nats)")
    features.plot(blocks, [block.cosine for block in found.blocks], "o-", label="cosine")
    features.plot(blocks, [block.distance for block in found.blocks], "o-", label="relative distance")
    features.set_title("features of the middle and averaged features")
    shares.plot(blocks, [block.share_a for block in found.blocks], "o-", label="share of A's")
    shares.plot(blocks, [block.share_b for block in found.blocks], "o-", label="share of B's")
    shares.set_title("features of the middle as a sum of both")
    for number, space in enumerate(found.blocks[0].matched):
        color = f"C{number}"
        partners.plot(blocks, [block.matched.get(space) for block in found.blocks], "o-", color=color, label=space)
        before = [block.matched_before.get(space) for block in found.blocks]
        partners.plot(blocks, before, "--", color=color, alpha=0.5, label=f"{space}, before")
    partners.plot(blocks, [block.stream for block in found.blocks], "o-", color="C4", label="stream")
    partners.plot(blocks, [block.stream_before for block in found.blocks], "--", color="C4", alpha=0.5)
    partners.set_title("cosine of partners in A and B")
    variance.plot(blocks, [block.variance for block in found.blocks], "o-")
    variance.set_title("variance of the middle's features over the ends'")
    for panel in (features, shares, partners):
        panel.legend(frameon=False, fontsize=8)
    for panel in (costs, features, shares, partners, variance):
        panel.set_xlabel("block")
    save_figure(figure, file)


def _over(found: Diagnosis, name: str) -> float:
    return found.losses[name] - (found.losses["a"] + found.losses["b"]) / 2
