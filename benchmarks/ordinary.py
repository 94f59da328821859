"""A step of learning with the default objective beside what users know: a training step of one model by transformers.

    python -m benchmarks.ordinary [--quick] [--json FILE] [--check]

A Llama of SmolLM2-135M's shape (width 576, 30 blocks, 49,152 tokens; random weights), float32, one thread, process
time, in turns, medians. Ordinary: forward, cross-entropy, backward, AdamW. Ours: `Learner.step`, update included, with
the endpoints' predictions (default) or the text as the objective. --check: what LIMITS promise.
"""

import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lmc_fast as lmc
from benchmarks.common import RESULTS, Row, interleave, options, provenance, write_csv, write_json
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.learner import Learner
from lmc_fast.symmetry import canonicalize

LENGTH = 128
LIMITS = {256: 1.4, 1024: 1.9}  # times the ordinary step, by tokens
REPEATS = 3


def build(seed: int, layers: int, vocabulary: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    shape = {"num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**shape, **sizes, tie_word_embeddings=False))


def measure(tokens: int, quick: bool) -> list[Row]:
    layers, vocabulary = (3, 4096) if quick else (30, 49152)
    model = build(1, layers, vocabulary)
    pair = lmc.open_pair(model, build(2, layers, vocabulary))
    source = Resident(*paired(*(canonicalize(member.load(torch.float32)) for member in pair.members)))
    data = torch.randint(vocabulary, (64, LENGTH), generator=torch.Generator().manual_seed(3))
    batch = tokens // LENGTH
    learners = {
        name: Learner(source, data, lmc.Schedule(batch=batch, objective=name, sides=2))
        for name in ("endpoints", "text")
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def ordinary() -> None:
        model(input_ids=data[:batch], labels=data[:batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {"ordinary": ordinary} | {name: learner.step for name, learner in learners.items()}
    times = {name: statistics.median(some) for name, some in interleave(calls, REPEATS, time.process_time).items()}
    return [
        {
            "tokens": tokens,
            "step": name,
            "route": "" if name == "ordinary" else learners[name].route,
            "seconds": round(some / 1e3, 3),
            "per ordinary": round(some / times["ordinary"], 3),
        }
        for name, some in times.items()
    ]


def main() -> int:
    args = options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    rows, bad = [], []
    for tokens, limit in LIMITS.items():
        for row in measure(tokens, args.quick):
            rows.append(row | provenance("lmc_fast", "csrc", "benchmarks"))
            print(*(f"{key} {value}" for key, value in row.items()), flush=True)
            if row["step"] == "endpoints" and row["per ordinary"] > limit:
                bad.append(f"{tokens} tokens: {row['per ordinary']} times an ordinary step > {limit}")
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        write_csv(RESULTS / "ordinary.csv", rows)
    for problem in bad:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
