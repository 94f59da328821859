"""Bad adapters, option files, unfinished runs, models of other sizes and arguments: see mutants.

All are changes of one directory, `tiny`: models a and b, b's child and an adapter for it, a larger model, data, the
alignment ab of a and b, abc of a, b and child, al of a and the larger one, and out.partial, which a run left that was
stopped. What a command is given in an `argument` case stands in words.json.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.mutants import (
    GONE,
    VALUES,
    Case,
    damaged_files,
    header_changes,
    odd_files,
    odd_json,
    replaced,
    set_value,
)

Change = Callable[[Path], None]
DATA = ["--data", "ids.npy", "--length", "16"]
RUN = ["align", "a", "b", *DATA, "--steps", "3", "--batch", "2", "--memory", "4GiB", "--no-curves", "--out", "out"]
CARRY = ["carry", "ab/alignment.safetensors", "adapter", "--from", "b", "--endpoint", "b", "--evenly", "--out", "new"]
GROW = ["grow", "a", "--like", "larger", "--out", "new"]
MERGE = ["merge", "a", "b", "--weights-by-block", "weights.json", "--out", "new"]
COMMANDS = {
    "align": ["align", "a", "b", *DATA, "--val", "ids.npy", "--method", "weight", "--no-curves", "--out", "new"],
    "align of three": ["align", "a", "b", "child", *DATA, "--test", "ids.npy", "--steps", "1", "--out", "new"],
    "plan": ["plan", "a", "b", "child", "--memory", "4GiB", "--tokens", "64", "--device-profile", "here"],
    "merge": [*MERGE, "--weight", "0.5", "--shard-size", "1MB"],
    "merge on a base": ["merge", "a", "child", "--base", "b", "--weights", "1", "1", "--out", "new"],
    "carry": [
        *CARRY[:2],
        "child",
        *CARRY[3:7],
        "--onto",
        "ab/a",
        "--weight",
        "0.5",
        "--memory",
        "4GiB",
        "--out",
        "new",
    ],
    "carry an adapter": CARRY,
    "barrier": [
        "barrier",
        "a",
        "b",
        *DATA,
        "--alignment",
        "ab/alignment.safetensors",
        "--points",
        "3",
        "--out",
        "c.json",
    ],
    "barrier of three": [
        "barrier",
        "a",
        "b",
        "child",
        *DATA,
        "--alignment",
        "abc/alignment.safetensors",
        "--points",
        "2",
    ],
    "grow": [*GROW[:-2], *DATA, "--out", "new"],
    "diagnose": ["diagnose", "a", "b", *DATA, "--alignment", "ab/alignment.safetensors", "--out", "d.json"],
    "heal": [
        "heal",
        "child",
        "--from",
        "a",
        "b",
        *DATA,
        "--steps",
        "1",
        "--batch",
        "2",
        "--rate",
        "0.001",
        "--out",
        "new",
    ],
    "verify": ["verify", "a", "ab/a", "--data", "ids.npy", "--memory", "4GiB"],
    "inspect": ["inspect", "a", "larger", "--data", "ids.npy"],
}
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1",
    "0",
    "-0.0",
    "1e30",
    str(2**63),
    str(10**30),
    "",
    "x",
    "0x10",
    "9" * 400,
)
SIZES = ("", "0", "1KiB", "-1GiB", "nanGiB", "1e999", "9" * 400 + "TiB", "x\n", "\udcff")
WORDS = ("", "c", "a,b", "meta", "cuda:99999999999", "\udcff", "x\n", "../x")
OPTIONS: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ("--steps", "--batch", "--points", "--length", "--tokens", "--weight", "--weights", "--rate"), NUMBERS
    ),
    **dict.fromkeys(("--memory", "--shard-size"), SIZES),
    **dict.fromkeys(("--from", "--device-profile"), WORDS),
}
PATHS = ("a", "b", "child", "larger", "adapter", "ids.npy", "weights.json", "ab/a")
PEFT = (
    *("use_rslora", "use_dora", "fan_in_fan_out", "bias", "modules_to_save", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "init_lora_weights", "layer_replication", "target_parameters", "lora_bias"),
    *("trainable_token_indices", "exclude_modules", "megatron_config", "use_qalora", "unheard_of"),
)
PATTERNS = (
    {"(": 2},
    {"(a+)+$": 2},
    {".*": 2},
    {".*dense": 3},
    {"": 3},
    {"x": "y"},
    {".*": -1},
    {".*": 0},
    {".*": 1e300},
)


def prepare(home: Path, expected: Path) -> None:
    """Writes `tiny`, and what the stopped run would have made. The working directory changes."""
    import numpy as np
    import torch
    from lora import adapted, write_adapter
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

    import lmc_fast as lmc
    from lmc_fast.cli import main

    config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "max_position_embeddings": 32}
    made = {}
    for seed, (name, more) in enumerate({"a": {}, "b": {}, "larger": {"intermediate_size": 32}}.items()):
        torch.manual_seed(seed)
        made[name] = GPTNeoXForCausalLM(GPTNeoXConfig(**config | more))
        made[name].save_pretrained(home / name)
    write_adapter(home / "adapter", adapted(AutoModelForCausalLM.from_pretrained(home / "b")), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made["b"].parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    made["b"].save_pretrained(home / "child")
    np.save(home / "ids.npy", np.random.default_rng(0).integers(2, 40, 1500))
    (home / "weights.json").write_text('{"embed": 0.25, "0": [0.3, 0.7]}')
    os.chdir(home)
    for out, models in {"ab": ["a", "b"], "abc": ["a", "b", "child"], "al": ["a", "larger"]}.items():
        words = ["align", *models, *DATA, "--method", "weight", "--no-curves", "--quiet", "--out", out]
        assert main(words) == 0, out
    assert main([*RUN[:-1], str(expected), "--quiet"]) == 0
    pair = lmc.open_pair("a", "b")
    tokens, steps = lmc.read_tokens("ids.npy", pair.a, 16), []

    def stopped() -> bool:
        return len(steps) > 1

    def seen(at: Any) -> None:
        if at.stage == "learning" and at.step:
            steps.append(at.step)

    try:
        lmc.run(pair, tokens, "out", steps=3, batch=2, memory=4 << 30, curves=False, cancel=stopped, progress=seen)
    except lmc.Cancelled:
        return
    raise AssertionError("nothing was stopped")


def adapters(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of adapter_config.json and adapter_model.safetensors."""
    rng = random.Random(seed)
    file = "adapter/adapter_config.json"
    config = json.loads((home / file).read_text())
    for key in (*config, *(key for key in PEFT if key not in config)):
        for value in rng.sample(VALUES, 5):
            shown = "gone" if value is GONE else repr(value)[:40]
            yield Case("adapter", base, f"{key} = {shown}", set_value(file, (key,), value))
    for key in ("rank_pattern", "alpha_pattern"):
        for value in PATTERNS:
            yield Case("adapter", base, f"{key} = {value}", set_value(file, (key,), value))
    for name, change in (*odd_files(file), *odd_json(file)):
        yield Case("adapter", base, f"config is {name}", change)
    file = "adapter/adapter_model.safetensors"
    for name, change in (*odd_files(file), *header_changes(file, (home / file).read_bytes(), rng)):
        yield Case("adapter", base, f"factors: {name}", change)


def option_files(base: str, seed: int = 0) -> Iterator[Case]:
    """Changes of weights.json, an option file of merge."""
    rng, file = random.Random(seed), "weights.json"
    for name in ("embed", "head", "0", "1", "0-1", "1-0", "2", "-1", "00", "", "\u0661", "0-", "x", "0 - 1"):
        for value in (0.25, [0.5, 0.5], [1, 3], *rng.sample(VALUES, 3)):
            if value is not GONE:
                yield Case("option", base, f"{name!r} = {value!r:.40}", set_value(file, (name,), value))
    for name, change in (*odd_files(file), *odd_json(file)):
        yield Case("option", base, f"{file} is {name}", change)
    for text in ('{"0": 0.2, "0": 0.8}', '{"0": 0.2, "00": 0.8}', '{"0": 0.2, "0-1": 0.8}', '{"0": 1e400}'):
        yield Case("option", base, text, replaced(file, lambda f, text=text: f.write_text(text)))


def larger(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of the config of the model whose size another one is to get."""
    rng, file = random.Random(seed), "larger/config.json"
    config = json.loads((home / file).read_text())
    for key, value in config.items():
        near = (value + 1, value * 2, value * 3, value - 1) if type(value) is int else ()
        for other in (*near, *rng.sample(VALUES, 3)):
            shown = "gone" if other is GONE else repr(other)[:40]
            yield Case("grown", base, f"{key} = {shown}", set_value(file, (key,), other))


def unfinished(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of what a stopped run left in out.partial."""
    rng = random.Random(seed)
    for path in sorted((home / "out.partial").rglob("*")):
        if path.is_file():
            file = str(path.relative_to(home))
            for name, change in (*odd_files(file), *damaged_files(file, path.read_bytes(), rng, 5)):
                yield Case("unfinished", base, f"{file} is {name}", change)
    for name in ("thesis.tex", "store/thesis.tex", "state-1.safetensors", "result", "publishing", "store.partial"):
        yield Case("unfinished", base, f"{name} beside", lambda h, n=name: (h / "out.partial" / n).write_text("mine"))


def alignments(base: str, home: Path, seed: int = 0) -> Iterator[Case]:
    """Changes of the alignments of three models, and of models of two sizes."""
    rng = random.Random(seed)
    for name in ("abc", "al"):
        file = f"{name}/alignment.safetensors"
        content = (home / file).read_bytes()
        changes = (*odd_files(file), *damaged_files(file, content, rng, 8), *header_changes(file, content, rng))
        for told, change in rng.sample(changes, 60):
            yield Case("own", base, f"{file}: {told}", change)


def arguments(base: str, seed: int = 0) -> Iterator[Case]:
    """Every command, with something odd for a path, a number or an output."""
    rng = random.Random(seed)
    inputs, outputs = list(_odd_inputs()), list(_odd_outputs())
    for name, words in COMMANDS.items():
        for i, word in enumerate(words[1:], 1):
            if word in PATHS or word.endswith("alignment.safetensors"):
                chosen = rng.sample(inputs, 9)
            elif words[i - 1] in OPTIONS:
                chosen = [(value, _nothing) for value in rng.sample(OPTIONS[words[i - 1]], 6)]
            elif words[i - 1] == "--out":
                chosen = [
                    (value + Path(word).suffix if value else value, make) for value, make in rng.sample(outputs, 12)
                ]
            else:
                continue
            for value, make in chosen:
                yield _argument(base, f"{name}, {i}: {value!r:.40}", [*words[:i], value, *words[i + 1 :]], make)
        for value in rng.sample(WORDS, 3):
            yield _argument(base, f"{name}, device {value!r:.40}", [*words, "--device", value], _nothing)


def _argument(base: str, name: str, words: list[str], make: Change) -> Case:
    def change(home: Path) -> None:
        make(home)
        (home / "words.json").write_text(json.dumps(words))

    return Case("argument", base, name, change)


def _nothing(home: Path) -> None:
    pass


def _odd_inputs() -> Iterator[tuple[str, Change]]:
    for value in (
        "",
        ".",
        "..",
        "/",
        "x\ny",
        "\x1b[2Jx",
        "x\udcff",
        "\ud800",
        "n" * 300,
        "~nosuchuser/x",
        "a\0b",
        "a@main",
    ):
        yield value, _nothing
    for value in (
        "x/y@z",
        "hf://x/y",
        "x.gguf",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "/".join(["d" * 200] * 30),
    ):
        yield value, _nothing
    for value in ("ab", "adapter", "larger", "ids.npy", "weights.json", "ab/alignment.safetensors", "out.partial"):
        yield value, _nothing
    (home_file,) = ("odd",)
    for _, change in odd_files(home_file):
        yield home_file, _on_a_file(change)


def _on_a_file(change: Change) -> Change:
    def made(home: Path) -> None:
        (home / "odd").write_bytes(b"0123456789" * 9)
        change(home)

    return made


def _odd_outputs() -> Iterator[tuple[str, Change]]:
    for value in (
        "",
        ".",
        "..",
        "/",
        "x\ny",
        "x\udcff",
        "\ud800",
        "n" * 250,
        "~nosuchuser/x",
        "a",
        "a/x",
        "ab/x",
        "ids.npy",
    ):
        yield value, _nothing
    for value in ("ids.npy/x", "/dev/null", "/dev/null/x", "/proc/x", "deep/er/x", "new/../x", "out"):
        yield value, _nothing
    suffixes = ("", ".json")

    def each(make: Callable[[Path], object], below: str = "") -> Change:
        def change(home: Path) -> None:
            for suffix in suffixes:
                make(home / f"o{suffix}{below}")

        return change

    yield "o", each(os.mkfifo)
    yield "o", each(lambda p: p.symlink_to("nowhere"))
    yield "o", each(lambda p: p.symlink_to("ids.npy"))
    yield "o", each(lambda p: p.write_text("mine"))
    yield "o", each(os.mkfifo, ".partial")
    yield "o", each(lambda p: p.symlink_to("a"), ".partial")
    yield "o", each(lambda p: p.write_text("mine"), ".partial")
    for name, text in {"thesis.tex": "mine", "lock": "x", "lock ": "{}"}.items():

        def make(p: Path, name: str = name, text: str = text) -> None:
            p.mkdir()
            (p / name.strip()).write_text(text)

        yield "o", each(make, ".partial")
