"""The planner: never over budget, better with more memory, honest about the smallest budget."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from lmc_fast.architectures import FAMILIES
from lmc_fast.budget.demand import ACTIVATION, WEIGHT, Demand, Job
from lmc_fast.budget.devices import PROFILES, Device, profile
from lmc_fast.budget.planner import plan, residency
from lmc_fast.budget.stages import Stages, TooSmall
from lmc_fast.engine.attention import Positions
from lmc_fast.engine.block import block
from lmc_fast.engine.passes import visit_order
from lmc_fast.errors import LmcError
from lmc_fast.places import simplex_places
from lmc_fast.sizes import parse_bytes, show_bytes
from lmc_fast.streaming.layout import segment_bytes, slot_shapes
from lmc_fast.streaming.schedule import steady_loads

SLOW = Device("slow disk", "cpu", torch.float32, 1 << 40, 1e12, 1e9, "disk", base=300 << 20)
NARROW = {"num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024, "hidden_size": 256}
SPECS = {
    "gpt_neox": GPTNeoXConfig(vocab_size=9000, **NARROW),
    "llama": LlamaConfig(vocab_size=9000, num_key_value_heads=2, **NARROW),
    "gpt2": GPT2Config(vocab_size=9000, n_embd=256, n_layer=6, n_head=8),
    "mixtral": MixtralConfig(vocab_size=9000, num_key_value_heads=4, num_local_experts=4, **NARROW),
}


def spec_of(name):
    return FAMILIES[name].spec(SPECS[name])


def smallest_of(spec, job, device):
    with pytest.raises(TooSmall) as refused:
        plan(spec, job, device, 1)
    return refused.value.smallest


@pytest.mark.parametrize("device", [SLOW, *PROFILES.values()], ids=lambda d: d.name)
@pytest.mark.parametrize("name", SPECS)
def test_more_memory_never_hurts_and_no_budget_is_exceeded(name, device):
    spec, job = spec_of(name), Job(2048, 128)
    least = smallest_of(spec, job, device)
    before = None
    for budget in (least + step * (least // 5) for step in range(25)):
        found = plan(spec, job, device, budget)
        assert found.total <= budget == found.budget
        always = sum(item.bytes for item in found.items if item.phase == "always")
        assert found.total == always + max(found.phase(part) for part in ("block", "head", "update"))
        assert all(item.bytes > 0 for item in found.items)
        if before is not None:
            assert found.step_seconds <= before.step_seconds and found.share > 0
        before = found
    # everything stays: resident, or in the slots, where what is left fits into them
    assert len(before.resident) + before.buffers >= before.layers + before.head_parts
    assert before.moved == 0 and before.share == 1 and before.tokens_to_hide == 0


@pytest.mark.parametrize("tokens", [1, 100, 4096])
@pytest.mark.parametrize("device", [SLOW, PROFILES["t4"]], ids=lambda d: d.name)
@pytest.mark.parametrize("name", SPECS)
def test_the_smallest_budget_works_and_one_byte_less_does_not(name, device, tokens):
    spec, job = spec_of(name), Job(tokens, 64, sides=1)
    least = smallest_of(spec, job, device)
    found = plan(spec, job, device, least)
    assert least == max(found.total, *found.stages.values())
    with pytest.raises(TooSmall) as refused:
        plan(spec, job, device, least - 1)
    assert refused.value.smallest == least
    written = next(word for word in str(refused.value).split() if word.endswith("MiB") and word[0].isdigit())
    assert plan(spec, job, device, parse_bytes(written)).total <= parse_bytes(written) < least + (1 << 20)


@pytest.mark.parametrize("name", SPECS)
def test_moved_bytes_are_those_of_the_schedule(name):
    spec, job = spec_of(name), Job(512, 64)
    least = smallest_of(spec, job, SLOW)
    segments = segment_bytes(spec, 4)
    for budget in (least, least * 5 // 4, least * 3 // 2):
        found = plan(spec, job, SLOW, budget)
        loads = steady_loads(visit_order(found.layers, found.head_parts, learn=True), found.buffers, found.resident)
        assert found.moved == sum(segments[segment] * count for segment, count in loads.items())
        assert found.loads == sum(loads.values())
        assert found.transfer_seconds == found.moved / SLOW.bandwidth


def test_at_the_predicted_number_of_tokens_transfers_are_hidden(monkeypatch):
    monkeypatch.setattr(Stages, "all", lambda *_, **__: {"verifying": 0})  # learning alone decides
    spec, device = spec_of("llama"), replace(SLOW, bandwidth=2e9)
    found = plan(spec, Job(256, 64), device, smallest_of(spec, Job(256, 64), device))
    assert found.share < 1 and found.step_seconds == found.transfer_seconds > found.compute_seconds
    assert found.tokens_to_hide > 256
    many = Job(-(-found.tokens_to_hide // 64 + 2) * 64, 64)
    assert plan(spec, many, device, 1 << 36).share == 1


@pytest.mark.parametrize(("layers", "segments"), [(1, 2), (2, 3), (5, 8), (8, 9), (33, 40)])
def test_residents_are_spread(layers, segments):
    order = residency(layers, segments)
    assert sorted(order) == list(range(segments)) and order[layers:] == list(range(layers, segments))
    for count in range(2, layers + 1):
        places = sorted(order[:count])
        gaps = [y - x for x, y in itertools.pairwise(places)]
        assert max(gaps) <= 2 * -(-layers // count) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_a_blocks_activations_are_not_underestimated(name, dtype):
    """Against what autograd really saves; gradients on their way back come on top."""
    spec = replace(spec_of(name), layers=1)
    demand = Demand(spec, Job(512, 128), dtype.itemsize)
    generator = torch.Generator().manual_seed(2)
    shapes = slot_shapes(spec)[1]
    w = {n: (torch.randn(s, generator=generator) * 0.02).to(dtype).requires_grad_() for n, s in shapes.items()}
    x = torch.randn(4, 128, spec.width, generator=generator).to(dtype).requires_grad_()
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(spec, w, x, Positions.of(spec, 128, dtype, "cpu"), 0)
    assert y.isfinite().all()
    weights = {t.untyped_storage().data_ptr() for t in w.values()}
    found = sum(size for place, size in saved.items() if place not in weights)
    expected = 512 * demand.block_floats(WEIGHT) * dtype.itemsize
    assert found < expected < 2 * found
    assert demand.block_floats(ACTIVATION) > demand.block_floats(WEIGHT)


def test_ways_of_computing():
    """The weight route needs fewer operations for many tokens, the activation route for few (crossover near 0.9 d)."""
    spec = replace(spec_of("gpt_neox"), vocab=64)
    for tokens, cheaper in ((64, ACTIVATION), (1024, WEIGHT)):
        demand = Demand(spec, Job(tokens, 64), 4)
        macs = {route: demand.macs(route, demand.job.sequences) for route in (ACTIVATION, WEIGHT)}
        assert min(macs, key=macs.get) == cheaper


def test_a_seven_billion_pair_on_one_gpu():
    spec = FAMILIES["llama"].spec(LlamaConfig())
    found = plan(spec, Job(16_384, 512), profile("h100-80gb"), parse_bytes("8GiB"))
    assert found.total <= 8 << 30 and found.share >= 0.9 and found.strategy.boundaries_on_host
    everything = plan(spec, Job(16_384, 512), profile("h100-80gb"), parse_bytes("80GB"))
    assert everything.buffers == 0 and not everything.strategy.boundaries_on_host


def test_what_is_shown():
    found = plan(spec_of("llama"), Job(2048, 128), PROFILES["rtx4090"], 1 << 30)
    text = "\n".join(found.table())
    for item in found.items:
        assert item.name in text
    for word in ("rtx4090", "budget 1 GiB", "2,048 tokens", "in-memory speed", "hidden from", "assumed"):
        assert word in text
    value = json.loads(json.dumps(found.to_json()))
    assert value["total"] == found.total and value["device"]["dtype"] == "bfloat16"
    assert sum(item["bytes"] for item in value["items"] if item["phase"] == "always") < value["total"]


def test_profiles():
    at_hand = profile("here")
    assert at_hand.kind == "cpu" and at_hand.flops > 1e8 and 0 < at_hand.base < at_hand.memory
    assert "assumed" in at_hand.source
    with pytest.raises(LmcError, match="'abacus' is unknown; choose here, h100-80gb"):
        profile("abacus")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("3GB", 3 * 10**9),
        ("512MiB", 512 << 20),
        ("1.5g", 3 << 29),
        (" 7 kib ", 7168),
        ("12345", 12345),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "much", "-3GiB", "3XB", "0", "0GiB", "1.5", "1e9", "nan", "GiB", "3 GiB now", "9" * 99, "9" * 5000 + "TiB"],
)
def test_what_is_no_size(text):
    with pytest.raises(LmcError, match="memory"):
        parse_bytes(text)


def test_sizes_are_shown():
    assert [show_bytes(n) for n in (5, 2048, 3 << 30, 1 << 52)] == ["5 bytes", "2 KiB", "3 GiB", "4,096 TiB"]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_portions_of_measurements(name, aligned):
    stages = Stages(spec_of(name), 64, 300 << 20)
    line = stages.measuring(11, aligned, held=True), lambda budget: stages.portions_of_line(11, budget, aligned)
    for least, portions in (line, (stages.verifying(held=True), stages.portions_of_comparison)):
        assert portions(1) == portions(least)  # never refused, however little there is
        before = portions(least)
        assert before.batch == 1 <= before.rows
        for budget in (least * 2, least * 8, 1 << 40):
            found = portions(budget)
            assert found.batch <= found.rows and found.batch <= 32 and found.logits <= 1 << 24
            assert found.batch >= before.batch and found.rows >= before.rows and found.logits >= before.logits
            before = found


def test_all_places_between_many_are_planned_for():
    pair, four = (Stages(spec_of("gpt_neox"), 64, members=members) for members in (2, 4))
    assert pair.all()["measuring"] == pair.measuring(11)
    assert four.all()["measuring"] == four.measuring(len(simplex_places(4, 11))) > four.measuring(11)


@pytest.mark.parametrize("members", [2, 3, 4, 6])
def test_streams_of_all_places_fit_whatever_the_inputs_at_work_leave(members):
    """Between many models there are so many places that one input's streams outweigh its way through a block."""
    spec = spec_of("gpt_neox")
    stages, places = Stages(spec, 64, members=members), len(simplex_places(members, 11)) if members > 2 else 11
    each = 2 * places * 64 * spec.width * 4  # the stream at each place, and what the head reads of it
    least = stages.measuring(places, held=True)
    for budget in range(least, 3 * least, least // 20):
        found = stages.portions_of_line(places, budget, True)
        assert found.rows >= found.batch and (found.rows - 1) * each <= budget - least


@pytest.mark.parametrize("name", SPECS)
def test_the_smallest_budget_is_that_of_all_stages(name):
    """One number, that of whichever stage needs most; a run that goes on has matched already."""
    spec, job = spec_of(name), Job(64, 64)
    stages = Stages(spec, 64, SLOW.base).all()
    assert list(stages) == ["matching", "preparing", "measuring", "writing", "verifying"]
    least = smallest_of(spec, job, SLOW)
    found = plan(spec, job, SLOW, least)
    assert found.stages == stages and least == max(found.total, *stages.values())
    assert "matching" not in plan(spec, job, SLOW, least, found.strategy).stages
    with pytest.raises(TooSmall) as refused:
        plan(spec, job, replace(SLOW, uncertain=5 << 20), 1)
    assert refused.value.smallest == least and f"{-(-least // (1 << 20)) + 5}MiB" in str(refused.value)
    assert "writing" not in Stages(spec, 64).all("cuda")
