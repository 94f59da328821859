"""Slice `kernels`: every Triton operation beside the best torch formulation, and the ways of interp_linear.

ratio: time of the best torch formulation / ours. A kernel is worth its use from WORTH on; below, its row says
"not used". Errors are the largest of CHECKED rows, relative to the largest entry, against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, quantiles
from benchmarks.gpu.contests import CHECKED, LAMBDA, MODELS, ONCE, OPERATIONS, Contest, Draw, Function, Inputs, Model
from benchmarks.gpu.device import release, runnable, timed
from benchmarks.gpu.rows import Case, Unmeasured, spread
from benchmarks.gpu.slices import Place
from lmc_fast.kernels.dispatch import choose
from lmc_fast.kernels.interp_linear import interp_linear
from lmc_fast.kernels.routes import ROUTES, interpolated, side_by_side

WORTH = 0.9
ERROR_LIMIT = 2.0  # times the error of the best torch formulation, plus two units in the last place
DIFFERENCE_LIMIT = 0.05  # between two ways to sum rounded gradients: what exceeds it is wrong, not rounded
TOKENS = (16384, 4096, 1024, 65536, 256)
LOSS_ROWS = 16384  # logits of more tokens are not held at a time
SUBSET = (4096, ("7B", "1B"))  # tokens and models of the other dtypes
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def cases(place: Place) -> Iterator[Case]:
    if place.quick:
        for dtype in ("float32", "bfloat16") if place.device.type == "cuda" else ("float32",):
            yield from _cases(place, "tiny", 64, dtype)
            yield from _once(place, "tiny", dtype)
        return
    for tokens in TOKENS:
        for model in ("7B", "1B", "13B"):
            yield from _cases(place, model, tokens, "bfloat16")
    for model in ("7B", "1B", "13B"):
        yield from _once(place, model, "bfloat16")
    tokens, models = SUBSET
    for dtype in ("float16", "float32"):
        for model in models:
            yield from _cases(place, model, tokens, dtype)
            yield from _once(place, model, dtype)


def _cases(place: Place, model: str, tokens: int, dtype: str) -> Iterator[Case]:
    for op in OPERATIONS:
        if not (op.endswith("_") and tokens > LOSS_ROWS):
            yield _case(place, op, model, tokens, dtype)
    key = f"interp_linear {model} T{tokens} {dtype}"
    yield Case(key, partial(interpolated_layer, key, place, MODELS[model], tokens, DTYPES[dtype]), seconds=20)


def _once(place: Place, model: str, dtype: str) -> Iterator[Case]:
    for op in ONCE:
        yield _case(place, op, model, 0, dtype)


def _case(place: Place, op: str, model: str, tokens: int, dtype: str) -> Case:
    key = f"{op} {model} T{tokens} {dtype}" if tokens else f"{op} {model} {dtype}"
    return Case(key, partial(contest, key, place, op, MODELS[model], tokens, DTYPES[dtype]), seconds=25)


def contest(key: str, place: Place, op: str, model: Model, tokens: int, dtype: torch.dtype) -> list[Row]:
    """One row for the forward pass, one for forward and backward; the losses do both at once."""
    made = (OPERATIONS | ONCE)[op](model, tokens, Draw(place.device, dtype))
    if not made.kernel and place.device.type == "cuda":
        raise Unmeasured("the kernel does not take this shape; the torch formulation runs")
    rows = []
    work = made.inputs if made.wanted else {name: t.clone() for name, t in made.inputs.items()}  # the losses overwrite
    with torch.no_grad():
        output = made.ours(work).shape
    slope = Draw(place.device, dtype)(*output)
    for backward in (False, True) if made.wanted else (False,):
        what = "f+b" if backward or not made.wanted else "f"
        row: Row = {"key": f"{key} {what}", "op": op, "model": model.name, "tokens": tokens, "pass": what}
        row |= {"dtype": str(dtype).removeprefix("torch.")}
        rivals = dict(made.rivals) if backward else {**made.rivals, **made.forward_only}
        calls = {
            name: _bound(f, work, made.wanted, backward, slope) for name, f in {"ours": made.ours, **rivals}.items()
        }
        row |= _compete(calls, place)
        rows.append(row | _errors(made, row.get("best", "reference"), backward, slope))
        if place.device.type != "cuda":
            rows[-1] = {"key": row["key"], "op": op, "unmeasured": "needs a GPU", **_checks(rows[-1])}
    return rows


def _bound(f: Function, inputs: Inputs, wanted: tuple[str, ...], backward: bool, slope: Tensor) -> Callable[[], object]:
    return partial(outcome, f, inputs, wanted, slope if backward else None)


def outcome(f: Function, inputs: Inputs, wanted: tuple[str, ...], slope: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """f of the inputs, and the gradients of those that are wanted where there is a slope."""
    if slope is None:
        with torch.no_grad():
            return f(inputs), []
    leaves = {name: inputs[name].detach().requires_grad_() for name in wanted}
    y = f({**inputs, **leaves})
    return y.detach(), list(torch.autograd.grad(y, list(leaves.values()), slope))


def _compete(calls: dict[str, Callable[[], object]], place: Place) -> Row:
    """Times of ours and of the rivals that find enough memory, and the ratio to the best of them."""
    fit, large = runnable(calls, place.device)
    if "ours" not in fit:
        raise torch.OutOfMemoryError("ours does not fit the device's memory")
    times = timed(fit, place.device, place.quick)
    medians = {name: quantiles(some)[1] for name, some in times.items()}
    row = spread("ours", times["ours"])
    for name in times.keys() - {"ours"}:
        row[f"{name}_ms"] = round(medians[name], 4)
    if large:
        row["out_of_memory"] = large
    rivals = {name: ms for name, ms in medians.items() if name != "ours"}
    if not rivals:
        return row
    best = min(rivals, key=rivals.__getitem__)
    ratio = round(rivals[best] / medians["ours"], 3)
    return row | {
        "best": best,
        **spread("best", times[best]),
        "ratio": ratio,
        "verdict": "used" if ratio >= WORTH else "not used",
    }


def _errors(made: Contest, best: str, backward: bool, slope: Tensor) -> Row:
    """Of ours and of the best rival against float64: output, and the gradients that belong to single rows (all, if none
    does). And how far all gradients of the two are apart, sums over every token included."""
    rivals = {**made.rivals, **made.forward_only}
    cut = {name: t[:CHECKED] if name in made.rows else t for name, t in made.inputs.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in cut.items()}
    some = tuple(name for name in made.wanted if name in made.rows) or made.wanted
    few = slope[:CHECKED] if made.rows else slope
    truth, true_gradients = outcome(made.truth, exact, some, few.double() if backward else None)
    row: Row = {}
    every: list[list[Tensor]] = []
    for name, f in (("ours", made.ours), ("best", rivals[best])):
        fresh = made.inputs if made.wanted else {k: t.clone() for k, t in made.inputs.items()}
        y, gradients = outcome(f, fresh, made.wanted, slope if backward else None)
        row[f"{name}_error"] = _relative(y, truth)
        if backward:
            of = dict(zip(made.wanted, gradients, strict=True))
            found = [_relative(of[key], t) for key, t in zip(some, true_gradients, strict=True)]
            row[f"{name}_gradient_error"] = max(found)
            every.append(gradients)
        del y, fresh
    if backward:
        row["gradient_difference"] = max(_relative(x, y.double()) for x, y in zip(*every, strict=True))
    close = all(
        row[f"ours_{kind}"] <= ERROR_LIMIT * row[f"best_{kind}"] + 2 * torch.finfo(slope.dtype).eps
        for kind in ("error", "gradient_error")
        if f"ours_{kind}" in row
    )
    return row | {"accurate": close and row.get("gradient_difference", 0.0) <= DIFFERENCE_LIMIT}


def _checks(row: Row) -> Row:
    return {name: value for name, value in row.items() if name.endswith(("error", "difference")) or name == "accurate"}


def _relative(value: Tensor, truth: Tensor) -> float:
    """The largest difference of the first rows, over the largest entry."""
    few = value[: len(truth)].double()
    return float(f"{float((few - truth).abs().max() / truth.abs().max()):.3g}")


def interpolated_layer(key: str, place: Place, m: Model, tokens: int, dtype: torch.dtype) -> list[Row]:
    """The FFN's up matrix in all ways, forward and backward, beside an ordinary layer whose weights get a gradient."""
    draw = Draw(place.device, dtype)
    a, b = draw.beside(m.ffn, m.width)
    inputs = {"x": draw(tokens, m.width), "right": draw(m.width, m.width, scale=m.width**-0.5)}
    slope = draw(tokens, m.ffn)
    assert side_by_side(a, b) is not None

    def by_route(route: str) -> Function:
        return lambda i: interp_linear(i["x"], a, b, LAMBDA, right=i["right"], route=route)

    def through_autograd(i: Inputs) -> Tensor:
        return F.linear(i["x"], interpolated(a, b, LAMBDA, None, i["right"]))

    ways = {**{p: by_route(p) for p in ROUTES}, "reference": through_autograd}
    calls: dict[str, Callable[[], object]] = {}
    for name, f in ways.items():
        calls[name] = partial(outcome, f, inputs, ("x", "right"), slope)
    plain = {"x": inputs["x"], "w": a.contiguous()}
    calls["ordinary"] = lambda: outcome(lambda i: F.linear(i["x"], i["w"]), plain, ("x", "w"), slope)
    fit, large = runnable(calls, place.device)
    times = timed(fit, place.device, place.quick)
    medians = {name: quantiles(some)[1] for name, some in times.items()}
    chosen = choose(tokens, m.width, dtype, place.device).route
    row: Row = {"key": key, "op": "interp_linear", "model": m.name, "tokens": tokens, "pass": "f+b"}
    row |= {"dtype": str(dtype).removeprefix("torch."), "chosen": chosen}
    for name, some in times.items():
        row |= spread(name, some)
        if "ordinary" in medians:
            row[f"{name}_per_ordinary"] = round(medians[name] / medians["ordinary"], 3)
    if large:
        row["out_of_memory"] = large
    of_routes = {p: medians[p] for p in ROUTES if p in medians}
    if chosen in of_routes:
        best = min(of_routes, key=of_routes.__getitem__)
        row |= {"best": best, "ratio": round(of_routes[best] / of_routes[chosen], 3)}
    release(place.device)
    exact = {"x": inputs["x"][:CHECKED].double(), "right": inputs["right"].double()}
    weights = interpolated(a.double(), b.double(), LAMBDA, None, exact["right"])
    truth = exact["x"] @ weights.mT
    for route in of_routes:
        with torch.no_grad():
            row[f"{route}_error"] = _relative(ways[route](inputs), truth)
    if place.device.type != "cuda":
        row = {"key": key, "op": "interp_linear", "unmeasured": "needs a GPU", **_checks(row)}
    return [row]
