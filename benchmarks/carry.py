"""What one endpoint learned, carried over to the other: a fine-tune and a LoRA adapter of b of examples/pair, for a.

    python -m benchmarks.carry [--quick] [--json FILE] [--check] [--rank R]

b is trained on for 150 steps on Python code (examples/fine_tune.py: the interpreter's own library, of which nothing is
kept), all weights once, and once by an adapter of rank 16. `lmc-fast carry` brings both to a, with an alignment from
weights alone, one from activations on that code, and one learned on documentation; for that one also with --evenly, in
the aligned basis, and the fine-tune of one kind of matrix at a time. The share that a receives is how much its loss on
code falls, in parts of how much b's fell. All losses are measured by transformers in float32; the adapter is loaded by
peft where that is installed, and else by hooks that add what peft would.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks.common import RESULTS, ROOT, Row, lmc_fast, options, provenance, write_csv, write_json

sys.path[:0] = [str(ROOT / part) for part in (".", "tests", "tests/symmetry", "tests/families")]

import zoo  # noqa: E402
from carried import BIASED, PLAIN, error  # noqa: E402

from examples.fine_tune import PAIR, documentation, fine_tune, measured, python_code, train  # noqa: E402

SHARE, RISE = 0.35, 0.2  # of b's gain on code that a receives at least; nats that a may lose on documentation
SAME = 0.02  # how far an adapter may be from the full difference of the same adapter, in parts of the gain
EXACT = 1e-10
WEIGHTS = (0.75, 1.0)  # of what is added to a
ADAPTER_RATE = 1e-3  # chosen by another pair of the same shape: at 3e-3 ten times less of the gain arrives
WAYS = {"evenly": ["--evenly"], "evenly, aligned basis": ["--evenly", "--basis", "aligned"]}
PARTS = {  # how the names of tensors end, of transformers' GPT-NeoX
    "embedding": ("embed_in.weight",),
    "head": ("embed_out.weight", "lm_head.weight"),  # as older and newer versions of transformers call it
    "queries, keys, values": ("query_key_value.weight", "query_key_value.bias"),
    "attention's outputs": ("attention.dense.weight", "attention.dense.bias"),
    "into FFN units": ("dense_h_to_4h.weight", "dense_h_to_4h.bias"),
    "out of FFN units": ("dense_4h_to_h.weight", "dense_4h_to_h.bias"),
}
MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
ALPHA = 32
ALIGNMENTS = {  # how b is aligned to a
    "weights": ["--method", "weight"],
    "activations": ["--method", "activation"],  # on the code that the child is trained on
    "learned": ["--steps", "250"],
}


class Lora(nn.Module):
    """A linear layer of which two factors are trained, as peft does it."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.mT) @ self.up.mT * self.scaling


def train_adapter(model: Path, out: Path, ids: Tensor, steps: int, rank: int) -> Path:
    """An adapter for all linear layers of the blocks, trained on ids, as peft stores it."""
    torch.manual_seed(0)
    child = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    adapted = [name for name, m in child.named_modules() if isinstance(m, nn.Linear) and name.endswith(MODULES)]
    for name in adapted:
        parent, _, last = name.rpartition(".")
        setattr(child.get_submodule(parent), last, Lora(child.get_submodule(name), rank))
    train(child, ids, steps, ADAPTER_RATE)
    tensors = {}
    for name in adapted:
        layer = child.get_submodule(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.down.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.up.detach()
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA, "bias": "none"}
    config |= {"target_modules": list(MODULES), "base_model_name_or_path": str(model), "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def with_adapter(model: Path, adapter: Path) -> tuple[nn.Module, str]:
    """A checkpoint with an adapter, and who put it there."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    try:
        from peft import PeftModel
    except ImportError:
        return _hooked(base, adapter), "hooks"
    return PeftModel.from_pretrained(base, adapter), "peft"


def _hooked(model: nn.Module, adapter: Path) -> nn.Module:
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling, tensors = config["lora_alpha"] / config["r"], load_file(adapter / "adapter_model.safetensors")
    for key, up in tensors.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            bias = tensors.get(f"{stem}.lora_B.bias", torch.zeros(len(up)))
            layer = model.get_submodule(stem.removeprefix("base_model.model."))
            layer.register_forward_hook(_adding(tensors[f"{stem}.lora_A.weight"], up, bias, scaling))
    return model


def _adding(down: Tensor, up: Tensor, bias: Tensor, scaling: float) -> Callable[..., Tensor]:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (inputs[0] @ down.mT @ up.mT + bias) * scaling

    return add


def unaligned(a: Path, b: Path, child: Path) -> nn.Module:
    """a + (child - b), all three as they are."""
    model = AutoModelForCausalLM.from_pretrained(a, dtype=torch.float32)
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in (b, child))
    model.load_state_dict({name: t + after[name] - before[name] for name, t in model.state_dict().items()})
    return model


def part_of(child: Path, base: Path, names: tuple[str, ...], out: Path) -> Path:
    """The child of which only tensors with such names differ from its base."""
    model, trained = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (base, child))
    chosen = {name: t for name, t in trained.state_dict().items() if name.endswith(names)}
    if not chosen:
        raise SystemExit(f"no tensor of {child} ends with {' or '.join(names)}")
    model.load_state_dict(chosen, strict=False)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def run(*arguments: object) -> str:
    """What a command says, which must succeed."""
    status, _, text, errors = lmc_fast(*arguments)
    if status:
        raise SystemExit(f"lmc-fast {arguments[0]} failed: {errors}")
    return text


def exact(quick: bool) -> list[Row]:
    """How far a carried adapter's function is from the original's in float64, for random models of each family."""
    rows = []
    for name in (*PLAIN[::4], *BIASED[::4]) if quick else (*PLAIN, *BIASED):
        with tempfile.TemporaryDirectory() as home:
            zoo.write(name, Path(home) / "b")
            off, done, report = error(name, Path(home) / "b", Path(home))
        rows.append({"case": f"random adapter, float64: {name}", "error": f"{off:.1e}", "change": f"{done:.2f}"})
        rows[-1] |= {"modules": report["modules"], "biases": report["biases"]}
    worst = max(float(row["error"]) for row in rows)
    print(f"adapters of {len(rows)} random models, carried, in float64: at most {worst:.1e} off")
    return rows


class Measurement:
    """Losses on documentation and code, and what a receives of b's gain."""

    def __init__(self, quick: bool):
        train_ids, code = python_code(PAIR / "b")
        every = 8 if quick else 1
        self.train, self.code, self.documentation = train_ids, code[::every], documentation()[::every]
        self.rows: list[Row] = []
        self.a, self.b = (self.losses(PAIR / name) for name in "ab")

    def losses(self, model: nn.Module | Path) -> tuple[float, float]:
        return measured(model, self.documentation), measured(model, self.code)

    def add(self, case: str, alignment: str, model: nn.Module | Path, gain: float | None = None, by: str = "") -> Row:
        text, code = self.losses(model)
        row: Row = {"case": case, "alignment": alignment, "documentation": round(text, 4), "code": round(code, 4)}
        if gain is not None:
            row |= {"share": round((self.a[1] - code) / gain, 4), "rise": round(text - self.a[0], 4)}
        self.rows.append(row | {"by": by or "transformers"})
        shown = f"{row['share']:8.0%}{row['rise']:+9.3f}" if gain is not None else ""
        print(f"{case:42}{alignment:12}{text:15.3f}{code:8.3f}{shown}", flush=True)
        return self.rows[-1]


def measure(args: argparse.Namespace, scratch: Path) -> list[Row]:
    steps, began = 15 if args.quick else 150, time.perf_counter()
    found = Measurement(args.quick)
    print(f"{'':42}{'alignment':12}{'documentation':>15}{'code':>8}{'share':>8}{'rise':>9}")
    found.add("a", "-", PAIR / "a")
    found.add("b", "-", PAIR / "b")
    child = fine_tune(PAIR / "b", scratch / "child", found.train, steps)
    adapter = train_adapter(PAIR / "b", scratch / "adapter", found.train, steps, args.rank)
    gain = found.b[1] - found.add("b, fine-tuned", "-", child)["code"]
    adapted, by = with_adapter(PAIR / "b", adapter)
    lora_gain = found.b[1] - found.add("b with adapter", "-", adapted, by=by)["code"]
    found.add("a + fine-tune", "none", unaligned(PAIR / "a", PAIR / "b", child), gain)
    code = scratch / "code.npy"
    np.save(code, found.train[: 64 if args.quick else 512].numpy())
    for name, how in ALIGNMENTS.items():
        aligned = scratch / name
        data = ["--data", code if name == "activations" else PAIR / "train.npy", "--val", PAIR / "val.npy"]
        how = ["--steps", "10", "--batch", "4"] if args.quick and name == "learned" else how
        options = ["--dtype", "float32", "--no-curves", "--quiet", "--out", aligned]
        run("align", PAIR / "a", PAIR / "b", *data, *how, *options)
        carry = ["carry", aligned / "alignment.safetensors"]
        more = ["--from", "b", "--onto", aligned / "a", "--endpoint", PAIR / "b"]
        for weight in WEIGHTS:
            out = scratch / f"{name}-{weight}"
            run(*carry, child, *more, "--weight", weight, "--out", out)
            found.add(f"a + {weight:g} x fine-tune", name, out, gain)
        if name == "learned":
            for way, flags in WAYS.items():
                run(*carry, child, *more, *flags, "--out", scratch / way)
                found.add(f"a + 1 x fine-tune, {way}", name, scratch / way, gain)
            for part, names in PARTS.items():
                alone = part_of(child, PAIR / "b", names, scratch / f"{part} alone")
                run(*carry, alone, *more, "--out", scratch / part)
                found.add(f"a + 1 x {part} alone", name, scratch / part, gain)
        run(*carry, adapter, *more, "--full", "--out", scratch / f"{name}-full")
        found.add("a + full difference of adapter", name, scratch / f"{name}-full", lora_gain)
        run(*carry, adapter, *more, "--out", scratch / f"{name}-adapter")
        loaded, by = with_adapter(aligned / "a", scratch / f"{name}-adapter")
        found.add("a with adapter", name, loaded, lora_gain, by)
    print(f"share: of b's gain on code that a receives; rise: on documentation; {time.perf_counter() - began:.0f} s")
    return found.rows


def missed(rows: list[Row], quick: bool) -> list[str]:
    """The promises that are broken."""
    problems = [f"{row['case']}: {row['error']} off" for row in rows if float(row.get("error", 0)) > EXACT]
    found = {(row["case"], row.get("alignment")): row for row in rows}
    for name in ALIGNMENTS:
        full, loaded = (found[case, name]["share"] for case in ("a + full difference of adapter", "a with adapter"))
        if abs(loaded - full) > SAME * max(abs(full), 0.05):
            problems.append(f"{name}: the adapter gives {loaded:.1%} of the gain, its full difference {full:.1%}")
    default = found["a + 1 x fine-tune", "learned"]  # what `align` and `carry` make without an option
    if default["share"] < (0.1 if quick else SHARE) or default["rise"] > RISE:
        problems.append(f"a receives {default['share']:.0%} and loses {default['rise']:.2f} nats on documentation")
    best = max(row["share"] for (case, _), row in found.items() if case.endswith("x fine-tune"))
    if best <= found["a + fine-tune", "none"]["share"]:
        problems.append("alignment is of no use")
    return problems


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = exact(args.quick) + measure(args, Path(scratch))
    rows = [row | provenance("lmc_fast", "benchmarks", "examples") for row in rows]
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        write_csv(RESULTS / "carry.csv", rows)
    problems = missed(rows, args.quick)
    for problem in problems:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
