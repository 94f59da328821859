"""Everything about a GPU that is promised, measured on the one at hand. docs/gpu.md says how.

Needs one NVIDIA GPU, torch, triton and transformers; installs nothing and needs no network. Runs again go on where the
last one stopped: a case that the same sources have measured on the same device is not measured again.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS, ROOT, Row, options, write_json
from benchmarks.gpu.promises import problems
from benchmarks.gpu.rows import Journal, latest, read_rows
from benchmarks.gpu.slices import EVERY, FIRST_LIGHT, SLICES
from benchmarks.gpu.summary import write_summary
from benchmarks.gpu.worker import CONTINUED, LOST, stamp

GRACE = 35.0  # seconds after its time that a process gets before it is killed
LEAST = 45.0  # seconds with which no process is started any more
NEEDED = ("transformers", "safetensors", "huggingface_hub", "numpy", "scipy")  # beside torch; Triton is for the kernels
BUILD_SECONDS = 240
MOST_PROCESSES = 8  # for one slice: that many may die


@dataclass(frozen=True)
class Invocation:
    """One invocation of the harness. end: of its time, by time.monotonic; commit: named where git does not know it."""

    out: Path
    scratch: Path
    device: str
    quick: bool
    end: float
    run: str
    commit: str = ""

    def command(self, name: str, seconds: float) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", name, "--out", self.out, "--scratch", self.scratch]
        command += ["--device", self.device, "--seconds", f"{seconds:.0f}", "--run", self.run, "--commit", self.commit]
        return [str(part) for part in command] + ["--quick"] * self.quick

    def journal(self, name: str) -> Journal:
        return Journal(self.out / f"{name}.jsonl", stamp(name, self.quick, self.device, self.run, self.commit))


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SLICES, default=list(SLICES), metavar="SLICE", help=str([*SLICES]))
    parser.add_argument("--first-light", action="store_true", help="the least, in eight minutes: first_light.py")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop cleanly before this time is over")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="rows and SUMMARY.md (default: %(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "lmc_fast_gpu", help="large files"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick")
    parser.add_argument("--commit", default="", help="of these sources, for rows made where there is no git")
    args = parser.parse_args()
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu only tries the harness itself; add --quick")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU; --quick --device cpu tries the harness without one")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} must be installed; this harness installs nothing")
    end, run = time.monotonic() + 60 * args.minutes, f"{int(time.time())}-{os.getpid()}"
    out = args.out.resolve()
    invocation = Invocation(out, args.scratch.resolve(), args.device, args.quick, end, run, args.commit)
    out.mkdir(parents=True, exist_ok=True)
    print(build_extension(), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes the slice's process along
    unfinished, troubles = [], []
    for name in FIRST_LIGHT if args.first_light else args.only:
        print(f"{name}: {EVERY[name].what}", flush=True)
        finished, trouble = run_slice(name, invocation)
        unfinished += [] if finished else [name]
        troubles += [trouble] if trouble else []
        rows = latest_rows(out, args.quick)
        write_summary(out, rows, args.quick)
    if args.json:
        write_json(args.json, rows)
    print(f"wrote {out / 'SUMMARY.md'}")
    if unfinished:
        print(f"to be continued: {', '.join(unfinished)}; the same command goes on")
    troubles += problems(rows)
    for text in troubles:
        print(f"problem: {text}")
    return 1 if args.check and troubles else 0


def latest_rows(out: Path, quick: bool) -> list[Row]:
    """Of all slices, whichever this invocation measures."""
    rows: list[Row] = []
    for name in EVERY:
        rows += latest(row for row in read_rows(out / f"{name}.jsonl") if row["quick"] == quick)
    return rows


def run_slice(name: str, invocation: Invocation) -> tuple[bool, str]:
    """Measures a slice in a process of its own, in another one where that dies: (whether all was tried, what failed).

    A case in which a process dies gets a row that says so, and is left to the next run.
    """
    least = 1.0 if invocation.quick else LEAST
    limit = min(time.monotonic() + 60 * EVERY[name].minutes, invocation.end - GRACE)
    running = invocation.out / f"{name}.running"
    running.unlink(missing_ok=True)
    for _ in range(MOST_PROCESSES):
        seconds = limit - time.monotonic()
        if seconds < least:
            return False, ""
        code = supervised(invocation.command(name, seconds), seconds + GRACE)
        if code in (0, CONTINUED):
            return code == 0, ""
        if code == LOST:  # its row is written
            continue
        why = "did not end in time and was killed" if code is None else f"ended with {code}"
        if not running.exists():
            return False, f"{name}: the process {why} outside of any case"
        case = running.read_text()
        running.unlink()
        print(f"  {case}: ERROR the process {why}", flush=True)
        invocation.journal(name).add(case, [{"key": case, "error": f"the process {why}"}])
    return False, f"{name}: {MOST_PROCESSES} processes died"


def supervised(command: list[str], seconds: float) -> int | None:
    """Exit code of a command; None where it took too long and was killed with all that it had started."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def build_extension() -> str:
    """Builds the C++ solvers in place unless they are newer than their sources. Returns what was done."""
    target = ROOT / "lmc_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    newest = max(s.stat().st_mtime for s in [*(ROOT / "csrc").glob("*"), ROOT / "setup.py"])
    if target.exists() and target.stat().st_mtime >= newest and _loads(target):
        return f"C++ solvers: {target.name} is there"
    missing = [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
    named = (os.environ.get("CXX"), "c++", "g++")
    compiler = next((found for name in named if name and (found := shutil.which(name))), None)
    if missing or compiler is None:
        lack = ", ".join([*missing, *(["a C++ compiler"] if compiler is None else [])])
        return f"C++ solvers: not built ({lack} missing); the torch formulation runs on the CPU"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"C++ solvers: not built after {BUILD_SECONDS} s; the torch formulation runs on the CPU"
    if done.returncode or not target.exists() or not _loads(target):
        return f"C++ solvers: not built; the torch formulation runs on the CPU\n{(done.stdout + done.stderr)[-1500:]}"
    return f"C++ solvers: built with {compiler}"


def _loads(file: Path) -> bool:
    """Whether a process can import the extension."""
    program = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("lmc_fast._C", {str(file)!r})
spec.loader.exec_module(module_from_spec(spec))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
