"""Learning never ends worse than matching: twelve tiny pairs of all kinds, on text that nothing was chosen by.

    python -m benchmarks.never_worse [--quick] [--json FILE] [--check]

Two families times six kinds: the same model twice, a planted symmetry, two models trained apart, both fine-tuned apart
from one, one endpoint that was never trained, both overfitted. Each is trained here on the text of examples/pair, then
aligned with the defaults and STEPS steps. --check: on the test text, the mean excess of three points of the line is not
above that after matching by more than two standard errors of their difference.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import RESULTS, ROOT, Row, options, provenance, write_csv, write_json
from lmc_fast import Alignment, Pair, align, open_pair
from lmc_fast.engine.evaluate import line_scores
from lmc_fast.engine.source import Resident
from lmc_fast.symmetry import canonicalize

BLOCK, BATCH = 64, 16
STEPS = 60
TRAINED, TUNED = 250, 60  # steps
POINTS = (0.25, 0.5, 0.75)
DATA = ROOT / "examples" / "pair"


def neox() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = GPTNeoXConfig(vocab_size=1024, max_position_embeddings=BLOCK, rope_parameters=rope, **sizes)
    return GPTNeoXForCausalLM(config)


def llama() -> PreTrainedModel:
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = LlamaConfig(vocab_size=1024, max_position_embeddings=BLOCK, num_key_value_heads=2, **sizes)
    return LlamaForCausalLM(config)


def train(model: PreTrainedModel, tokens: Tensor, steps: int, seed: int, rate: float = 3e-3) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,), generator=generator)]
        logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def fresh(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return build()


def copy_of(build: Callable[[], PreTrainedModel], model: PreTrainedModel) -> PreTrainedModel:
    other = build()
    other.load_state_dict(model.state_dict())
    return other


def permuted(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with the FFN units of every block in another order."""
    order = torch.randperm(model.config.intermediate_size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("dense_h_to_4h", "gate_proj", "up_proj")):
                weight.copy_(weight[order])
            elif ("dense_4h_to_h" in name or "down_proj" in name) and weight.dim() == 2:
                weight.copy_(weight[:, order])
    return model


def make(kind: str, build: Callable[[], PreTrainedModel], tokens: Tensor) -> tuple[PreTrainedModel, PreTrainedModel]:
    halves = tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]
    few = tokens[:40]
    a = train(fresh(build, 1), few if kind == "overfitted" else tokens, TRAINED, 1)
    if kind == "identical":
        return a, copy_of(build, a)
    if kind == "planted":
        return a, permuted(copy_of(build, a))
    if kind == "fine-tuned":
        return train(copy_of(build, a), halves[0][:200], TUNED, 3), train(copy_of(build, a), halves[1][:200], TUNED, 4)
    if kind == "broken":
        return a, fresh(build, 2)
    return a, train(fresh(build, 2), few if kind == "overfitted" else tokens, TRAINED, 2)


KINDS = ("identical", "planted", "independent", "fine-tuned", "broken", "overfitted")


def excesses(pair: Pair, test: Tensor, alignment: Alignment) -> Tensor:
    """Of every input of `test` (n,): mean excess over the line at POINTS, in nats per token."""
    a, b = (canonicalize(model.load(torch.float32)) for model in (pair.a, pair.b))
    scores = line_scores(Resident(*alignment.apply(a, b)), test, (0.0, *POINTS, 1.0))
    first, *inside, last = (score.inputs[:, 0] / score.inputs[:, 1] for score in scores)
    line = [(1 - lam) * first + lam * last for lam in POINTS]
    return torch.stack([x - y for x, y in zip(inside, line, strict=True)]).mean(0)


def measure(family: str, kind: str, folder: Path, train_tokens: Tensor, calibration: Tensor, test: Tensor) -> Row:
    paths = [folder / name for name in "ab"]
    for model, path in zip(make(kind, {"neox": neox, "llama": llama}[family], train_tokens), paths, strict=True):
        model.save_pretrained(path)
    pair = open_pair(*paths)
    found = align(pair, calibration, steps=STEPS)
    matched = excesses(pair, test, Alignment(*found.matched, found.matched))
    learned = excesses(pair, test, found)
    change = learned - matched
    return {
        "family": family,
        "kind": kind,
        "matched": round(matched.mean().item(), 4),
        "learned": round(learned.mean().item(), 4),
        "error": round((change.std() / len(change) ** 0.5).item(), 4),
        "step": found.info["exported_step"],
        "objective": found.info.get("objective", "-"),
        "turns": len(found.info["history"]["turns"]),
    }


def main() -> int:
    args = options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    blocks = {}
    for name in ("train", "test"):
        ids = torch.from_numpy(np.load(DATA / f"{name}.npy").astype(np.int64))
        blocks[name] = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    tokens, calibration = blocks["train"][:6000], blocks["train"][5000:8000]  # some of it the endpoints have seen
    cases = [(family, kind) for family in ("neox", "llama") for kind in KINDS]
    rows, bad = [], []
    print(f"{'family':8}{'kind':13}{'matched':>9}{'learned':>9}{'± of both':>11}{'step':>6}  objective")
    for family, kind in cases[2:5] if args.quick else cases:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(family, kind, Path(folder), tokens, calibration, blocks["test"])
        rows.append(row | provenance("lmc_fast", "benchmarks", "examples"))
        print(
            f"{family:8}{kind:13}{row['matched']:+9.4f}{row['learned']:+9.4f}{row['error']:11.4f}{row['step']:6}  "
            f"{row['objective']}",
            flush=True,
        )
        if row["learned"] > row["matched"] + 2 * row["error"] + 1e-4:
            bad.append(f"{family}, {kind}: {row['learned']} after learning, {row['matched']} after matching")
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        write_csv(RESULTS / "never_worse.csv", rows)
    for problem in bad:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
