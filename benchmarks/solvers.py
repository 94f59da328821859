"""Cayley and expm against torch: time, orthogonality, error, and where torch's threaded batch is wrong.

One thread unless a row says otherwise, in process CPU time; with two threads, wall-clock time. Variants run in turns.
X is skew with spectral norm about 1. torch means torch.linalg.solve and torch.linalg.matrix_exp with their own backward
passes. The two-thread torch call prints errors of its own: that is part of what is shown. Rows of a GPU, where there is
one, are wall-clock with the device synchronised, and time the batched torch formulation beside the Triton kernels.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    Row,
    interleave,
    options,
    processor,
    provenance,
    quantiles,
    write_csv,
    write_json,
)
from lmc_fast.implementations import GPU_SOLVERS, backends
from lmc_fast.solvers import cayley, expm

SOURCES = (
    "csrc",
    "lmc_fast/solvers",
    "lmc_fast/implementations.py",
    "setup.py",
    "benchmarks/solvers.py",
    "benchmarks/common.py",
)
TURN = 0.03  # seconds of one thread at a time, where two are compared with it
ERROR_LIMIT = 2.0  # times the error of torch in the same dtype


@dataclass(frozen=True)
class Case:
    op: str
    n: int
    batch: int
    need: float | None  # promised ratio torch / ours
    backward: bool = True
    threads: int = 1
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"{self.op} {self.n} x {self.batch}" + (" GPU" if self.device == "cuda" else "")


CASES = [
    Case("cayley", 32, 1024, 8.0),
    Case("cayley", 64, 512, 8.0),
    Case("cayley", 128, 128, 5.5),
    Case("cayley", 512, 1, 2.7),
    Case("cayley", 1024, 1, 2.2),
    Case("expm", 32, 1024, 13.0),
    Case("expm", 64, 512, 15.0),
    Case("expm", 128, 128, 11.0),
    Case("expm", 512, 1, 8.0),
    Case("expm", 1024, 1, 8.0),
    Case("cayley", 4096, 1, 1.5, backward=False, threads=2),
]
FLOAT64 = [
    Case("cayley", 64, 256, None, dtype=torch.float64),
    Case("expm", 64, 256, None, dtype=torch.float64),
]
THREADS = [Case(op, n, batch, 1.7) for op in ("cayley", "expm") for n, batch in ((64, 512), (32, 1024))]
GPU = [Case("cayley", 64, 1024, 10.0, device="cuda"), Case("expm", 64, 1024, 10.0, device="cuda")]


def torch_cayley(X: Tensor) -> Tensor:
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return torch.linalg.solve(eye - X / 2, eye + X / 2)


OURS: dict[str, Callable[[Tensor], Tensor]] = {"cayley": cayley, "expm": expm}
TORCH: dict[str, Callable[[Tensor], Tensor]] = {"cayley": torch_cayley, "expm": torch.linalg.matrix_exp}


def skew_batch(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    """Skew Gaussian matrices of spectral norm about 1 (they fill a disc of radius 2 √(2n) before scaling)."""
    W = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    return (W - W.mT) / (2 * (2 * n) ** 0.5)


def run(f: Callable[[Tensor], Tensor], X: Tensor, G: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """f(X), and X's gradient for the output gradient G."""
    if G is None:
        return f(X), None
    leaf = X.detach().requires_grad_()
    Y = f(leaf)
    Y.backward(G)
    return Y.detach(), leaf.grad


def orthogonality(Q: Tensor) -> float:
    """The largest ‖QᵀQ - I‖ (Frobenius) of the batch, in float64 but for very large matrices."""
    Q = Q.double() if Q.shape[-1] <= 1024 else Q
    R = Q.mT @ Q
    R.diagonal(dim1=-2, dim2=-1).sub_(1)
    return float(torch.linalg.matrix_norm(R).max())


def batched(f: Callable[[Tensor], Tensor], X: Tensor, G: Tensor | None) -> None:
    """`run` with the torch formulation in place of the Triton kernels."""
    before = os.environ.get(GPU_SOLVERS)
    os.environ[GPU_SOLVERS] = "torch"
    try:
        run(f, X, G)
    finally:
        del os.environ[GPU_SOLVERS]
        if before is not None:
            os.environ[GPU_SOLVERS] = before


def device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


def measure(case: Case, repeats: int) -> Row:
    torch.set_num_threads(case.threads)
    X = skew_batch(case.batch, case.n, case.dtype).to(case.device)
    G = torch.randn_like(X) if case.backward else None
    variants = {"torch": TORCH[case.op], "ours": OURS[case.op]}
    clock = time.process_time if case.threads == 1 else time.perf_counter
    calls: dict[str, Callable[[], object]] = {name: lambda f=f: run(f, X, G) for name, f in variants.items()}
    if case.device == "cuda":
        calls["batched"] = lambda: batched(OURS[case.op], X, G)
        clock = device_clock
    times = interleave(calls, repeats, clock)
    row: Row = {
        "case": case.name,
        "pass": "f+b" if case.backward else "f",
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": case.threads,
    }
    few = slice(None) if case.n < 32 else slice(0, 16)
    torch.set_num_threads(1)
    truth: tuple[Tensor | None, Tensor | None] = (None, None)
    if case.dtype == torch.float32 and case.n <= 1024:
        truth = run(variants["torch"], X[few].double(), None if G is None else G[few].double())
    for name, f in variants.items():
        p20, p50, p80 = quantiles(times[name])
        Y, grad = run(f, X[few], None if G is None else G[few])
        row |= {f"{name}_p20_ms": round(p20, 3), f"{name}_ms": round(p50, 3), f"{name}_p80_ms": round(p80, 3)}
        row[f"{name}_orthogonality"] = orthogonality(Y)
        if truth[0] is not None:
            row[f"{name}_error"] = relative_error(Y, truth[0])
        if truth[1] is not None and grad is not None:
            row[f"{name}_grad_error"] = relative_error(grad, truth[1])
    if "batched" in times:
        row["batched_ms"] = round(quantiles(times["batched"])[1], 3)
        row |= {"gpu_solvers": backends().gpu_solvers, "device": torch.cuda.get_device_name()}
    row["ratio"] = round(row["torch_ms"] / row["ours_ms"], 2)
    row["need"] = case.need
    row["ok"] = (case.need is None or row["ratio"] >= case.need) and errors_ok(row)
    return row


def errors_ok(row: Row) -> bool:
    return all(
        row[f"ours_{kind}"] <= ERROR_LIMIT * row[f"torch_{kind}"] + 1e-7
        for kind in ("error", "grad_error")
        if f"ours_{kind}" in row
    )


def measure_threads(cases: list[Case], repeats: int) -> list[Row]:
    """Our forward + backward with two threads against one: wall-clock at its best, in turns of TURN seconds.

    Not single calls: a second core that idles between them takes long to wake. At its best: other load, which is rarely
    on both cores for long, only ever makes a turn longer.
    """
    turns: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    for case in cases:
        X = skew_batch(case.batch, case.n, case.dtype)
        G = torch.randn_like(X)

        def turn(threads: int, calls: int, case: Case = case, X: Tensor = X, G: Tensor = G) -> None:
            torch.set_num_threads(threads)
            for _ in range(calls):
                run(OURS[case.op], X, G)

        turn(1, 1)
        start = time.perf_counter()
        turn(1, 1)
        calls[case.name] = math.ceil(TURN / (time.perf_counter() - start))
        for threads in (1, 2):
            turns[f"{case.name} {threads}"] = partial(turn, threads, calls[case.name])
    times = interleave(turns, repeats)
    rows = []
    for case in cases:
        one, two = (min(times[f"{case.name} {threads}"]) / calls[case.name] for threads in (1, 2))
        rows.append(
            {
                "case": f"{case.name}, 2 threads : 1",
                "pass": "f+b",
                "dtype": "float32",
                "threads": 2,
                "one_thread_ms": round(one, 3),
                "ours_ms": round(two, 3),
                "ours_orthogonality": orthogonality(OURS[case.op](skew_batch(16, case.n, case.dtype))),
                "ratio": round(one / two, 2),
                "need": case.need,
                "ok": case.need is None or one / two >= case.need,
            }
        )
    return rows


def threaded_torch(n: int, batch: int = 8) -> Row:
    """Residual of torch's batched solve with two threads, and of ours."""
    torch.set_num_threads(2)
    X = skew_batch(batch, n, torch.float32)
    eye = torch.eye(n)

    def residual(Q: Tensor) -> float:
        return float(((eye - X / 2) @ Q - (eye + X / 2)).abs().max())

    row: Row = {"case": f"cayley {n} x {batch}", "pass": "f", "dtype": "float32", "threads": 2}
    try:
        Q = torch_cayley(X)
        row |= {"torch_residual": residual(Q), "torch_orthogonality": orthogonality(Q)}
    except RuntimeError as error:
        row |= {"torch_residual": float("nan"), "torch_failure": str(error).splitlines()[0]}
    Q = cayley(X)
    row |= {"ours_residual": residual(Q), "ours_orthogonality": orthogonality(Q)}
    row["ok"] = row["ours_residual"] < 1e-5
    return row


def show(row: Row) -> None:
    need = f"{row['need']:5.1f}" if row.get("need") else "    -"
    errors = ""
    if "ours_error" in row:
        errors = f"{row['ours_error']:9.1e}/{row['torch_error']:7.1e}"
    if "ours_grad_error" in row:
        errors += f" {row['ours_grad_error']:9.1e}/{row['torch_grad_error']:7.1e}"
    if "batched_ms" in row:
        errors += f"  {row['gpu_solvers']}; batched torch formulation {row['batched_ms']:.2f} ms"
    print(
        f"{row['case']:26} {row['pass']:4} {row['dtype']:8} {row['threads']:2} {row['torch_ms']:10.2f} "
        f"{row['torch_orthogonality']:8.1e} {row['ours_ms']:9.2f} {row['ours_orthogonality']:8.1e} "
        f"{row['ratio']:6.2f} {need} {'ok' if row['ok'] else 'MISSED':6} {errors}",
        flush=True,
    )


HEADER = (
    f"{'case':26} {'pass':4} {'dtype':8} th {'torch ms':>10} {'|QtQ-I|':>8} {'ours ms':>9} {'|QtQ-I|':>8} "
    " ratio  need        error: ours/torch  of gradient: ours/torch"
)


def repeats(case: Case, quick: bool) -> int:
    """Enough for a median, fewer where torch takes seconds."""
    if case.n == 4096:
        return 1 if quick else 3
    if quick:
        return (1 if case.n >= 512 else 2) if case.op == "expm" else 5
    return 5 if case.op == "expm" and case.n >= 64 else 15


def main() -> int:
    arguments = options(__doc__).parse_args()
    active = backends()
    machine = {"device": processor(), "isa": active.isa, "cores": len(os.sched_getaffinity(0))}
    source = provenance(*SOURCES) | machine
    print(f"{source['commit']}  torch {source['torch']}  {source['device']}  {active.cpu}\n{HEADER}")
    rows = []
    gpu = GPU if torch.cuda.is_available() else []
    for case in CASES + ([] if arguments.quick else FLOAT64) + gpu:
        rows.append(measure(case, repeats(case, arguments.quick)))
        show(rows[-1])
    for row in measure_threads(THREADS, 15 if arguments.quick else 41):
        rows.append(row)
        print(
            f"{row['case']:36} {row['one_thread_ms']:8.2f} -> {row['ours_ms']:8.2f} ms  {row['ratio']:.2f}x of "
            f"{row['need']}  |QtQ-I| {row['ours_orthogonality']:.1e}"
        )
    print("residual |(I - X/2) Q - (I + X/2)| with two threads: torch.linalg.solve on a batch, and ours", flush=True)
    for n in (128, 160, 192, 256):
        row = threaded_torch(n)
        rows.append(row)
        verdict = "" if row["torch_residual"] < 1e-4 else f"   torch is wrong {row.get('torch_failure', '')}"
        print(
            f"{row['case']:26} torch {row['torch_residual']:8.1e}   ours {row['ours_residual']:8.1e}{verdict}",
            flush=True,
        )
    rows = [source | row for row in rows]
    if arguments.json:
        write_json(arguments.json, rows)
    if not arguments.quick:
        write_csv(RESULTS / "solvers.csv", rows)
    missed = [row["case"] for row in rows if not row["ok"]]
    if missed:
        print("missed: " + "; ".join(missed))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
