"""Judges of mutant_commands' cases: peft, transformers, numpy, an undisturbed run, and what lay there before."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from importlib.util import find_spec
from pathlib import Path

from benchmarks.judges import Refused, command
from benchmarks.mutant_commands import CARRY, GROW, MERGE, RUN

HAS_PEFT = find_spec("peft") is not None
VOCABULARY = 40  # of tiny's models; a larger one's further tokens have no chance
LARGE = 1 << 24  # bytes: what is larger is told by its size


def adapter(home: Path, base: str, name: str) -> None:
    """What is carried changes the aligned endpoint as peft says that the damaged one changes the original."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    os.chdir(home)
    command(*CARRY)
    tokens = torch.arange(24).view(2, 12)
    found = []
    for model, changes in (("b", "adapter"), ("ab/b", "new")):
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        whole = PeftModel.from_pretrained(whole, changes, autocast_adapter_dtype=False).double().eval()
        with torch.no_grad():
            found.append(whole(input_ids=tokens).logits.log_softmax(-1))
    apart = (found[0] - found[1]).abs().max().item()
    assert apart <= 1e-4 * max(1.0, found[0].abs().max().item()), f"{apart:.1e} apart"


def option(home: Path, base: str, name: str) -> None:
    """A merge by an option file is what numpy makes of it."""
    import numpy as np
    from safetensors.numpy import load_file

    os.chdir(home)
    command(*MERGE)
    pairs = json.loads((home / "weights.json").read_text("utf-8"), object_pairs_hook=list)
    assert len({key for key, _ in pairs}) == len(pairs), "a name was said twice"
    rows: dict[str, list[float]] = {}
    for key, value in pairs:
        row = value if isinstance(value, list) else [1 - value, value]
        first, _, last = key.partition("-")
        for block in [key] if key in ("embed", "head") else map(str, range(int(first), int(last or first) + 1)):
            assert block not in rows, f"{block} twice"
            rows[block] = [share / sum(row) for share in row]
    a, b, new = (load_file(home / model / "model.safetensors") for model in ("a", "b", "new"))
    assert a.keys() == new.keys()
    for tensor, found in new.items():
        block = re.search(r"layers\.(\d+)\.", tensor)
        where = block[1] if block else "embed" if "embed_in" in tensor else "head"
        x, y = rows.get(where, [0.5, 0.5])
        wanted = x * a[tensor].astype(np.float64) + y * b[tensor].astype(np.float64)
        assert np.abs(found - wanted).max() <= 1e-6 * max(1, np.abs(wanted).max()), tensor


def grown(home: Path, base: str, name: str) -> None:
    """A grown model computes what it did, says transformers, and has room for the damaged one."""
    import torch
    from transformers import AutoModelForCausalLM

    os.chdir(home)
    command(*GROW)
    sizes = [json.loads((home / model / "config.json").read_text()) for model in ("larger", "new")]
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        assert sizes[1][key] >= sizes[0].get(key, 0), key
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        a, new = (AutoModelForCausalLM.from_pretrained(m).eval()(input_ids=tokens).logits for m in ("a", "new"))
    a, new = (logits[..., :VOCABULARY].log_softmax(-1) for logits in (a, new))
    apart = (a - new).abs().max().item()
    assert apart <= 1e-4, f"{apart:.1e} apart"


def unfinished(home: Path, base: str, name: str) -> None:
    """A run that goes on from damaged files ends with the tensors of one that was never stopped."""
    before = listing(home, "out")
    os.chdir(home)
    try:
        command(*RUN, "--resume")
    finally:
        assert listing(home, "out") == before, "what lay beside it was changed"
    _same_tensors(home / "out", (home.parent / "good").resolve().parent / "tiny-expected")


def argument(home: Path, base: str, name: str) -> None:
    """What is refused leaves nothing behind; what is done leaves what was there, and writes finite tensors."""
    import torch
    from safetensors.torch import load_file

    words = json.loads((home / "words.json").read_text())
    (home / "words.json").unlink()
    before = listing(home)
    os.chdir(home)
    try:
        command(*words)
    except Refused:
        changed = _changed(before, listing(home))
        assert not changed, f"refused, but {changed[0]} changed"
        raise
    after = listing(home)
    lost = [file for file in _changed(before, after) if file in before]
    assert not lost, f"{lost[0]} changed"
    for file in after.keys() - before.keys():
        if file.endswith(b".safetensors"):
            tensors = load_file(os.fsdecode(os.path.join(os.fsencode(home), file)))
            assert all(torch.isfinite(t).all() for t in tensors.values()), file


def listing(home: Path, but: str | None = None) -> dict[bytes, object]:
    """Everything below, links not followed, but what begins with `but`."""
    found: dict[bytes, object] = {}
    for place, directories, files in os.walk(os.fsencode(home)):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            told = os.path.relpath(path, os.fsencode(home))
            if but is not None and told.startswith(but.encode()):
                continue
            status = os.lstat(path)
            found[told] = status.st_mode
            if stat.S_ISLNK(status.st_mode):
                found[told] = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                found[told] = status.st_size
                if status.st_size <= LARGE:
                    with open(path, "rb") as file:
                        found[told] = hashlib.sha256(file.read()).digest()
    return found


def _changed(before: dict[bytes, object], after: dict[bytes, object]) -> list[bytes]:
    return sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))


def _same_tensors(found: Path, expected: Path) -> None:
    import torch
    from safetensors.torch import load_file

    for file in sorted(expected.rglob("*.safetensors")):
        ours, theirs = load_file(found / file.relative_to(expected)), load_file(file)
        same = ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
        assert same, f"{file.relative_to(expected)} differs"
