"""Experiments of the literature, on tiny models that are trained here: one command each, minutes on one core.

    python -m benchmarks.experiments [NAME ...] [--quick] [--json FILE] [--check]

    features     layer-wise feature connectivity along a line: as it is, matched, learned (examples/pair)
    width        the naive line of pairs of width 64, 128, 256, its middle at the best temperature, the matched line
    asymmetric   pairs with a shared, fixed part of every matrix: the naive line, without any alignment
    schemes      four seeds: mergemany, universe, hierarchical, joint
    experts      a pair of Mixtrals: experts before and after matching, the line
    masked       a pair of BERTs that guess masked tokens: the line

What came out is discussed in docs/experiments.md. Barriers are measured by transformers alone on test text. Rows
replace those of the same experiment in benchmarks/results/experiments.csv. --check: no matched middle is above the
naive one, no learned middle above the matched one. A larger pair: benchmarks.medium.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    logging,
)

import lmc_fast as lmc
from benchmarks.common import RESULTS, Row, options, provenance, read_csv, write_csv, write_json
from benchmarks.tiny import (
    DATA,
    LENGTH,
    VOCABULARY,
    aligned,
    average,
    excesses,
    fresh,
    loss_of,
    masked,
    text,
    train,
)

TARGET = RESULTS / "experiments.csv"
WIDTHS = (64, 128, 256)
HELD = (0.0, 0.5, 0.9)  # of the entries of every matrix, fixed and shared
HELD_SIZE = 2.0  # times what initial weights have
STEPS = 600  # of training
LEARN = 100  # steps of alignment, of 16 sequences
TOLERANCE = 0.01  # nats
SAMPLE = 32  # sequences that features are measured on


def neox(width: int) -> GPTNeoXForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * width}
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, rope_parameters=rope, **sizes)
    return GPTNeoXForCausalLM(config)


def mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY + 1, max_position_embeddings=LENGTH, **sizes))


def line(case: str, a: PreTrainedModel, b: PreTrainedModel, test: Tensor | lmc.Examples) -> Row:
    barrier, middle = excesses(a, b, test)
    return {"case": case, "barrier": round(barrier, 4), "middle": round(middle, 4)}


def lines(a: PreTrainedModel, b: PreTrainedModel, data: Tensor | lmc.Examples, test: Tensor | lmc.Examples, steps: int):
    """(pair, alignment, rows of the line as it is, matched and learned)."""
    pair = lmc.open_pair(a, b)
    found = lmc.align(pair, data, steps=steps)
    ends = {"loss_a": round(loss_of(a, test), 4), "loss_b": round(loss_of(b, test), 4)}
    rows = [line("naive", a, b, test) | ends]
    rows += [line(case, *aligned(pair, found, case == "matched"), test) for case in ("matched", "learned")]
    return pair, found, rows


def matched_only(found: lmc.Alignment) -> lmc.Alignment:
    return lmc.Alignment(*found.matched, matched=found.matched)


def features(quick: bool) -> Iterator[Row]:
    pair = lmc.open_pair(DATA / "a", DATA / "b")
    tokens, test = (lmc.read_tokens(DATA / f"{part}.npy", pair.a, 128) for part in ("train", "test"))
    found = lmc.align(pair, tokens, steps=2 if quick else LEARN)
    for case, alignment in (("naive", None), ("matched", matched_only(found)), ("learned", found)):
        seen = lmc.diagnose(pair, test, alignment, sequences=4 if quick else SAMPLE)
        yield {"case": case, "middle": round(seen.excess, 4)}
        for i, block in enumerate(seen.blocks):
            figures = {"cosine": block.cosine, "distance": block.distance, "variance": block.variance, "own": block.own}
            figures |= {"share_a": block.share_a, "share_b": block.share_b, "stream": block.stream}
            yield {"case": f"{case}, block {i}"} | {name: round(x, 4) for name, x in figures.items()}


def width(quick: bool) -> Iterator[Row]:
    tokens, test = text("train"), text("test")[: 32 if quick else None]
    for d in WIDTHS[:1] if quick else WIDTHS:
        steps = 20 if quick else STEPS
        a, b = (train(fresh(lambda d=d: neox(d), seed), tokens, steps, seed, 2e-3) for seed in (1, 2))
        pair = lmc.open_pair(a, b)
        found = lmc.align(pair, tokens[:2000], steps=0)
        for case, alignment in (("naive", None), ("matched", found)):
            ends = (a, b) if alignment is None else aligned(pair, found)
            seen = lmc.diagnose(pair, test, alignment, sequences=SAMPLE)
            calibrated = seen.losses["calibrated"] - (seen.losses["a"] + seen.losses["b"]) / 2
            more = {"temperature": round(seen.temperature, 2), "calibrated": round(calibrated, 4)}
            yield line(f"width {d}, {case}", *ends, test) | more | {"loss_a": round(loss_of(a, test), 4)}


def held_of(model: PreTrainedModel, share: float) -> dict[str, Tensor]:
    """Which entries of every matrix of the blocks are fixed: places by chance, the same for every model."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.rand(p.shape, generator=generator) < share
        for name, p in model.named_parameters()
        if p.dim() == 2 and ".layers." in name
    }


@torch.no_grad()
def hold(model: PreTrainedModel, held: dict[str, Tensor]) -> PreTrainedModel:
    """Gives the fixed entries their shared values."""
    generator = torch.Generator().manual_seed(12)
    for name, p in model.named_parameters():
        if name in held:
            shared = HELD_SIZE * model.config.initializer_range * torch.randn(p.shape, generator=generator)
            p[held[name]] = shared[held[name]]
    return model


def asymmetric(quick: bool) -> Iterator[Row]:
    tokens, test = text("train"), text("test")[: 32 if quick else None]
    for share in HELD[:2] if quick else HELD:
        made = []
        for seed in (1, 2):
            model = fresh(lambda: neox(128), seed)
            held = held_of(model, share) if share else {}
            made.append(train(hold(model, held), tokens, 20 if quick else STEPS, seed, 2e-3, held))
        a, b = made
        yield line(f"{share:.0%} fixed", a, b, test) | {
            "loss_a": round(loss_of(a, test), 4),
            "loss_b": round(loss_of(b, test), 4),
        }


def schemes(quick: bool) -> Iterator[Row]:
    tokens, test = text("train"), text("test")[: 32 if quick else None]
    made = [train(fresh(lambda: neox(64), seed), tokens, 20 if quick else STEPS, seed) for seed in range(1, 5)]
    own = sum(loss_of(model, test) for model in made) / len(made)
    models, steps = lmc.open_models(made), 2 if quick else LEARN
    shares = [1 / len(made)] * len(made)
    yield {"case": "naive", "middle": round(loss_of(average(made, shares), test) - own, 4)}
    for scheme in ("mergemany", "universe", "hierarchical", "joint"):
        learned = {} if scheme in ("mergemany", "universe") else {"steps": steps * (3 if scheme == "joint" else 1)}
        found = lmc.align(models, tokens[:4000], scheme=scheme, **learned)
        yield {"case": scheme, "middle": round(loss_of(average(aligned(models, found), shares), test) - own, 4)}


def experts(quick: bool) -> Iterator[Row]:
    tokens, test = text("train"), text("test")[: 32 if quick else None]
    a, b = (train(fresh(mixtral, seed), tokens, 20 if quick else STEPS, seed) for seed in (1, 2))
    pair, found, rows = lines(a, b, tokens[:4000], test, 2 if quick else LEARN)
    yield from rows
    seen = lmc.diagnose(pair, test, matched_only(found), sequences=SAMPLE)
    for i, block in enumerate(seen.blocks):
        kinds = {"before": block.matched_before, "after": block.matched}
        cosines = {name: round(kind["experts"], 4) for name, kind in kinds.items() if "experts" in kind}
        yield {"case": f"experts of block {i}"} | cosines | {"moved": round(block.moved.get("experts", 0.0), 4)}


def guessing(quick: bool) -> Iterator[Row]:
    tokens, test = text("train"), masked(text("test")[: 32 if quick else None])
    a, b = (train(fresh(bert, seed), tokens, 20 if quick else 3 * STEPS, seed, hide=True) for seed in (1, 2))
    yield from lines(a, b, masked(tokens[:4000]), test, 2 if quick else LEARN)[2]


EXPERIMENTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "features": features,
    "width": width,
    "asymmetric": asymmetric,
    "schemes": schemes,
    "experts": experts,
    "masked": guessing,
}


def problems(rows: list[Row]) -> Iterator[str]:
    """What is worse than what it began from."""
    middles = {(row["experiment"], row["case"]): row["middle"] for row in rows if "middle" in row}
    for (name, case), middle in middles.items():
        for better, worse in (("matched", "naive"), ("learned", "matched")):
            before = middles.get((name, case.replace(better, worse)), middle) if better in case else middle
            if middle > before + TOLERANCE:
                yield f"{name}: {case} {middle}, {worse} {before}"


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; by default all")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows: list[Row] = []
    for name in args.names or EXPERIMENTS:
        print(name, flush=True)
        for row in EXPERIMENTS[name](args.quick):
            rows.append({"experiment": name} | row | provenance("lmc_fast", "benchmarks", "examples"))
            print("   ", *(f"{key} {value}" for key, value in row.items()), flush=True)
        if not args.quick:
            old = [row for row in read_csv(TARGET) if row["experiment"] != name]
            write_csv(TARGET, old + [row for row in rows if row["experiment"] == name])
    if args.json:
        write_json(args.json, rows)
    found = list(problems(rows))
    for problem in found:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
