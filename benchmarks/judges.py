"""Who says whether what was accepted of a bad input is right: transformers, numpy or the undamaged file; see hostile.

A judge is given the damaged directory (beside it lies a link, `good`, to what it is a change of), what it is a change
of, and the name of the change. It raises Refused or LmcError with the library's own words, and AssertionError where an
answer is wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path


class Refused(Exception):
    """What the library said."""


def command(*arguments: object) -> int:
    """Exit code of a command. Raises Refused with its message, AssertionError for one that acts on a terminal."""
    from lmc_fast.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 2
    leaving = contextlib.suppress(SystemExit)  # of argparse
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), leaving:
        code = main([str(argument) for argument in arguments])
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("lmc-fast: warning: ")]
    if lines and lines[0].startswith("usage: "):
        lines = lines[-1:]
    if code == 2:
        raise Refused("\n".join(lines).removeprefix("lmc-fast: error: "))
    assert all(line.isprintable() for line in out.getvalue().split("\n")), "control characters are printed"
    return code


def checkpoint(home: Path, base: str, name: str) -> None:
    """A damaged checkpoint, given to `inspect` and `verify`, then beside transformers."""
    import torch
    import zoo

    from lmc_fast.checkpoints import Model
    from lmc_fast.engine.model import logits

    kind = "neox" if base in ("sharded", "pickled") else base
    os.chdir(home)
    try:
        command("inspect", home, "--quiet")
    finally:
        assert not Path("was-here").exists(), "a pickle's code ran"
    command("verify", home, home.parent / "good", "--quiet")
    model = Model(home)
    x = zoo.inputs(kind)
    if not x.is_floating_point():
        x = x[:, : model.spec.max_positions].clamp(max=(model.spec.table or model.spec.vocab) - 1)
    ours = logits(model.load(torch.float32), x.float() if x.is_floating_point() else x)
    config = json.loads((home / "config.json").read_text())
    if not config.get("architectures"):  # transformers' caller chooses the class then, as we do
        good = json.loads((home.parent / "good" / "config.json").read_text())
        (home / "config.json").write_text(json.dumps(config | {"architectures": good["architectures"]}))
    theirs = zoo.reference(home, x, torch.float32)
    ours, theirs = zoo.outcome(kind, ours), zoo.outcome(kind, theirs)
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
    apart, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert apart <= 1e-4 * max(size, 1.0), f"{apart:.1e} apart, of {size:.1e}"


def tokenizer(home: Path, base: str, name: str) -> None:
    """A damaged tokenizer cuts text as transformers' does."""
    from transformers import AutoTokenizer

    from lmc_fast import open_pair
    from lmc_fast.checkpoints import Model
    from lmc_fast.data import read_tokens

    ours = read_tokens(home / "text.txt", Model(home), 8).flatten().tolist()
    open_pair(home, home.parent / "good")
    theirs = AutoTokenizer.from_pretrained(home)((home / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    assert ours == theirs[: len(ours)] and len(theirs) - len(ours) < 8, "other ids"


def text(home: Path, base: str, name: str) -> None:
    """Data for a language model is what numpy, or json line by line, reads."""
    import numpy as np

    from lmc_fast.checkpoints import Model
    from lmc_fast.data import read_tokens

    file = home / name.split(":")[0].split(" ")[0]
    ours = read_tokens(file, Model(home), 4).flatten().tolist()
    if file.suffix == ".npy":
        array = np.load(file)
        assert array.dtype.kind in "iu", array.dtype
        theirs = [int(i) for i in array.reshape(-1)]
    else:
        content = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        documents = [content]
        if file.suffix == ".jsonl":
            documents = [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
        assert all(type(document) is str for document in documents)
        words = {f"w{i}": i for i in range(2, 40)}
        end = [0] if len(documents) > 1 else []
        theirs = [i for document in documents for i in [*(words.get(w, 1) for w in document.split()), *end]]
    assert ours == theirs[: len(ours)] and len(theirs) - len(ours) < 4, "other ids"


def images(home: Path, base: str, name: str) -> None:
    """Images are what numpy reads, normalised."""
    import numpy as np

    from lmc_fast.checkpoints import Model
    from lmc_fast.images import read_images

    if not (home / "data.npz").exists():
        pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
        np.savez(home / "data.npz", images=pixels, labels=np.arange(6) % 5)
    ours = read_images(home / "data.npz", Model(home))
    with np.load(home / "data.npz") as arrays:
        pixels, labels = arrays["images"], arrays["labels"]
    theirs = pixels.astype(np.float64).transpose(0, 3, 1, 2) / (255 if pixels.dtype == np.uint8 else 1)
    settings = {"do_normalize": False}
    if (home / "preprocessor_config.json").exists():
        settings = json.loads((home / "preprocessor_config.json").read_text())
    if settings.get("do_normalize", True) and pixels.dtype == np.uint8:
        mean, std = (np.array(settings[key], float).reshape(1, -1, 1, 1) for key in ("image_mean", "image_std"))
        theirs = (theirs - mean) / std
    apart = np.abs(ours.inputs.numpy() - theirs).max()
    assert apart <= 1e-5 * max(1, np.abs(theirs).max()), f"{apart} apart"
    assert ours.targets.tolist() == labels.astype(int).tolist()


def own(home: Path, base: str, name: str) -> None:
    """An alignment or a state that is accepted is the undamaged one."""
    import torch

    from lmc_fast import Alignment, Schedule, align, open_pair
    from lmc_fast.pair import open_models
    from lmc_fast.symmetry.storage import pack

    good = home.parent / "good"
    if base == "tiny":  # of three models, or of two sizes
        file = name.split(":")[0]
        spec = open_models(
            [good / m for m in {"abc": ("a", "b", "child"), "al": ("a", "larger")}[file.split("/")[0]]]
        ).spec
        found, expected = (Alignment.load(h / file, spec) for h in (home, good))
        ours, theirs = (
            {k: t for i, g in enumerate(x.members) for k, t in pack(g, str(i)).items()} for x in (found, expected)
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), "other elements"
        return
    pair = open_pair(good, home.parent / "other")
    if name.startswith("alignment"):
        found, expected = (Alignment.load(h / "alignment.safetensors", pair.spec) for h in (home, good))
    else:
        tokens = torch.arange(60).view(3, 20) % 40
        run = {"validation": tokens, "schedule": Schedule(steps=2, batch=1)}
        found = align(pair, tokens, state_file=home / "state.safetensors", **run)
        expected = Alignment.load(good / "alignment.safetensors", pair.spec)
    ours, theirs = pack(found.a, "a") | pack(found.b, "b"), pack(expected.a, "a") | pack(expected.b, "b")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), "other elements"
