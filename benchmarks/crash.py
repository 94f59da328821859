"""Kills and full disks at every file operation and at random moments: nothing is lost, and runs go on to the same bits.

Commands run in forks of this process, on a tiny pair that transformers wrote. After each fault: inputs and strangers'
files are as before, the output is absent, old or complete, standard error holds a sentence and no traceback, and the
same command (with --resume where there is a state) ends well, with the very files of a run without a fault and nothing
else beside them.

    kill      SIGKILL at every file operation
    moment    SIGKILL at random times
    signal    SIGINT and SIGTERM at random times
    full      no room on the disk from the n-th operation on
    limit     files larger than a limit are refused by the system (ulimit -f)
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.common import Row, options, provenance, write_json
from benchmarks.faults import Faults
from lmc_fast.cli import main as lmc_fast
from lmc_fast.pipeline import align

DATA = ["a", "b", "--data", "ids.npy", "--block", "16", "--quiet"]
LEARN = ["align", *DATA, "--steps", "3", "--batch", "2", "--out", "out"]
COMMANDS = {
    "align": LEARN,
    "align --memory": [*LEARN, "--memory", "4GiB"],
    "align --method weight": ["align", *DATA, "--method", "weight", "--out", "out"],
    "merge": ["merge", "a", "b", "--quiet", "--out", "out"],
    "barrier": ["barrier", *DATA, "--points", "3", "--out", "c.json", "c.png"],
}
OLDER = ["barrier", "b", "a", *DATA[2:], "--points", "5", "--out"]  # curves that are there already
PROMISED = {"kill": 100, "moment": 60, "full": 40}  # points at least, over all commands
Files = dict[str, str]
Inject = Callable[[Path, list[str]], "Ended"]


@dataclass
class Ended:
    """Exit code, or minus the signal; standard error; number of file operations, if the command came to its end."""

    code: int
    errors: str
    operations: int = 0


@dataclass
class Bench:
    """Inputs, and what each command makes of them where nothing goes wrong."""

    home: Path
    pick: random.Random = field(default_factory=partial(random.Random, 0))
    expected: dict[str, Files] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def create(home: Path) -> "Bench":
        bench = Bench(home)
        config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config |= {"intermediate_size": 24, "max_position_embeddings": 32}
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(GPTNeoXConfig(**config)).save_pretrained(home / "inputs" / name)
        np.save(home / "inputs" / "ids.npy", np.random.default_rng(0).integers(2, 40, 3000))
        (home / "inputs" / "thesis.tex").write_text("mine")
        (home / "inputs" / "out.partial.tex").write_text("mine")
        return bench

    def prepare(self, command: str) -> None:
        """Runs a command without a fault."""
        with self.place() as place:
            began = time.monotonic()
            ended = run(place, COMMANDS[command])
            self.seconds[command] = time.monotonic() - began
            assert ended.code == 0, ended.errors
            self.expected[command], self.operations[command] = digests(place), ended.operations
            if command == "barrier":
                older = [*OLDER, *COMMANDS[command][-2:]]
                assert run(place, older).code == 0
                (self.home / "older").mkdir()
                for name in older[-2:]:
                    shutil.copy(place / name, self.home / "older" / name)

    @contextmanager
    def place(self, at: Path | None = None) -> Iterator[Path]:
        place = (at or self.home) / "work"
        shutil.copytree(self.home / "inputs", place)
        try:
            yield place
        finally:
            shutil.rmtree(place)

    def fault(self, command: str, inject: Inject, codes: set[int]) -> list[str]:
        """What is wrong after one fault and a second try."""
        with self.place() as place:
            if command == "barrier":  # over older curves
                shutil.copytree(self.home / "older", place, dirs_exist_ok=True)
            before = digests(place)
            ended = inject(place, COMMANDS[command])
            return [*self._after(command, place, ended, before, codes), *self._again(command, place)]

    def _after(self, command: str, place: Path, ended: Ended, before: Files, codes: set[int]) -> list[str]:
        wrong = []
        if ended.code not in codes:
            wrong.append(f"exit code {ended.code}: {ended.errors[-300:]}")
        if "Traceback" in ended.errors or "bug" in ended.errors:
            wrong.append(f"a traceback: {ended.errors[-300:]}")
        lines = [line for line in ended.errors.splitlines() if not line.startswith("lmc-fast: warning: ")]
        if ended.code == 2 and (len(lines) != 1 or not lines[0].startswith("lmc-fast: error: ")):
            wrong.append(f"not one sentence: {ended.errors}")
        now, expected = digests(place), self.expected[command]
        for name, digest in before.items():
            if now.get(name) not in (digest, expected.get(name)):
                wrong.append(f"{name} was lost or changed")
        made = {name: digest for name, digest in expected.items() if name.startswith("out/")}
        if any(name.startswith("out/") for name in now) and {name: now.get(name) for name in made} != made:
            wrong.append("the output is neither absent nor complete")
        return wrong

    def _again(self, command: str, place: Path) -> list[str]:
        words = COMMANDS[command]
        published = (place / "out").exists()
        if (place / "out.partial" / "state.safetensors").exists() or (published and command.startswith("align")):
            words = [*words, "--resume"]
        ended = run(place, words)
        done = published and ("not empty" in ended.errors or "nothing to resume" in ended.errors)
        if ended.code and not done:
            return [f"the next run ends with {ended.code}: {ended.errors}"]
        now, expected = digests(place), self.expected[command]
        wrong = sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
        if published and done:  # a last leftover, which the next run for another place would not see
            wrong = [name for name in wrong if not name.startswith("out.partial/")]
        return [f"the next run differs in {', '.join(wrong)}"] if wrong else []


def run(
    place: Path,
    command: list[str],
    faults: Callable[[], Faults] = Faults,
    during: Callable[[int], None] | None = None,
) -> Ended:
    """A command in a fork, in `place`; `during` is given its process id."""
    errors, counts = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors[1], 2)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            os.chdir(place)
            align.SAVE_SECONDS = align.SAVE_SHARE = 0  # a state after every step
            counting = faults()
            code = lmc_fast(command)
            sys.stderr.flush()
            counting.how = "count"
            os.write(counts[1], str(counting.count).encode())
        finally:
            os._exit(code)
    for _, end in (errors, counts):
        os.close(end)
    if during:
        during(child)
    with os.fdopen(errors[0], "rb") as said, os.fdopen(counts[0], "rb") as counted:
        text, count = said.read().decode(errors="replace"), counted.read()
    status = os.waitpid(child, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), text, int(count or 0))


def digests(place: Path) -> Files:
    """Every file below, told by its content; what a report says of time and memory counts for nothing."""
    found = {}
    for file in sorted(place.rglob("*")):
        if file.is_symlink() or not file.is_file():
            continue
        content = file.read_bytes()
        if file.name == "report.json":
            report = json.loads(content)
            report.pop("costs")
            content = json.dumps(report).encode()
        found[str(file.relative_to(place))] = hashlib.sha256(content).hexdigest()
    return found


def at_operation(point: int, how: str) -> Inject:
    return partial(run, faults=partial(Faults, point, how))


def signalled_after(seconds: float, number: int) -> Inject:
    def during(child: int) -> None:
        time.sleep(seconds)
        os.kill(child, number)

    return partial(run, during=during)


def limited_to(size: int) -> Inject:
    def limited() -> Faults:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return Faults()

    return partial(run, faults=limited)


def points(kind: str, bench: Bench, command: str, share: float) -> list[tuple[Inject, set[int]]]:
    """Faults of a kind for a command, and the exit codes that they may end with."""
    operations, seconds, pick = bench.operations[command], bench.seconds[command], bench.pick

    def some(most: int) -> list[int]:
        count = max(2, round(most * share))
        return sorted(pick.sample(range(1, operations + 1), min(count, operations)))

    if kind == "kill":
        return [(at_operation(n, "kill"), {-signal.SIGKILL}) for n in some(operations)]
    if kind == "full":
        return [(at_operation(n, "full"), {0, 2}) for n in some(operations)]
    if kind == "limit":
        return [(limited_to(2**power), {0, 2}) for power in range(4, 18, max(1, round(1 / (3 * share))))]
    count = max(2, round(20 * share))
    moments = [pick.uniform(0, seconds) for _ in range(count)]
    if kind == "moment":
        return [(signalled_after(at, signal.SIGKILL), {0, -signal.SIGKILL}) for at in moments]
    both = (signal.SIGINT, signal.SIGTERM)
    ends = {0, 130, 143, -signal.SIGINT, -signal.SIGTERM}  # before the command has handlers, the signal's own
    return [(signalled_after(at, both[i % 2]), ends) for i, at in enumerate(moments)]


def measure(share: float, commands: list[str] | None = None, kinds: list[str] | None = None) -> list[Row]:
    """One row for each command and kind. share: of all points."""
    rows = []
    with tempfile.TemporaryDirectory() as home:
        bench = Bench.create(Path(home))
        for command in commands or list(COMMANDS):
            bench.prepare(command)
            for kind in kinds or ("kill", "moment", "signal", "full", "limit"):
                found = [bench.fault(command, *point) for point in points(kind, bench, command, share)]
                wrong = [line for lines in found for line in lines]
                rows.append({"command": command, "kind": kind, "points": len(found), "wrong": len(wrong)})
                print(f"{command:22} {kind:7} {len(found):4} points, {len(wrong)} wrong", flush=True)
                for line in wrong[:5]:
                    print(f"    {line}", flush=True)
    return rows


def main() -> int:
    parser = options(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(0.03 if args.quick else 1.0)
    if args.json:
        origin = provenance("lmc_fast", "benchmarks/crash.py", "benchmarks/faults.py")
        write_json(args.json, [origin | row for row in rows])
    wrong = sum(row["wrong"] for row in rows)
    few = [
        kind
        for kind, least in PROMISED.items()
        if not args.quick and sum(row["points"] for row in rows if row["kind"] == kind) < least
    ]
    for kind in few:
        print(f"fewer points of kind {kind} than promised")
    return 1 if args.check and (wrong or few) else 0


if __name__ == "__main__":
    sys.exit(main())
