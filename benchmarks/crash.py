"""Kills and full disks at every file operation and at random moments: nothing is lost, and runs go on to the same bits.

Commands run in forks of this process, on tiny models that transformers wrote. After each fault: inputs and strangers'
files are as before, the output is absent, old or complete, standard error holds a sentence and no traceback, and the
same command (with --resume where there is a state) ends well, with the very files of a run without a fault and nothing
else beside them.

    kill      SIGKILL at every file operation (of the writes to one open file in a row: the first, middle and last)
    moment    SIGKILL at random times
    signal    SIGINT, SIGTERM and SIGHUP at random times
    full      no room on the disk from the n-th operation on
    limit     files larger than a limit are refused by the system (ulimit -f)

python -m benchmarks.crash [--quick] [--only COMMAND...] [--kinds KIND...] [--most N] [--check]: a row of
benchmarks/results/crash.csv for each command and kind, in the place of an earlier one; those that are there for this
commit are not measured again, so that it can be run in pieces.
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
from importlib import import_module
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.common import RESULTS, Row, options, provenance, read_csv, write_csv, write_json
from benchmarks.faults import Faults
from lmc_fast.cli import main as lmc_fast
from lmc_fast.pipeline import align, heal

SOURCES = ("lmc_fast", "benchmarks/crash.py", "benchmarks/faults.py")
DATA = ["--data", "ids.npy", "--block", "16", "--quiet"]
FEW = [*DATA, "--steps", "2", "--batch", "2", "--out", "out"]
LEARN = ["align", "a", "b", *DATA, "--steps", "3", "--batch", "2", "--out", "out"]
CARRY = ["carry", "ab/alignment.safetensors", "child", "--from", "b", "--endpoint", "b", "--quiet", "--out", "out"]
COMMANDS = {
    "align": LEARN,
    "align --memory": [*LEARN, "--memory", "4GiB"],
    "align --method weight": ["align", "a", "b", *DATA, "--method", "weight", "--out", "out"],
    "align of three, in levels": ["align", "a", "b", "child", "--scheme", "hierarchical", *FEW, "--no-curves"],
    "merge": ["merge", "a", "b", "--quiet", "--out", "out"],
    "merge on a base": ["merge", "a", "child", "--base", "b", "--weights", "1", "1", "--quiet", "--out", "out"],
    "barrier": ["barrier", "a", "b", *DATA, "--points", "3", "--out", "c.json", "c.png"],
    "diagnose": ["diagnose", "a", "b", *DATA, "--sequences", "4", "--out", "c.json", "c.png"],
    "heal": ["heal", "child", "--from", "a", "b", *FEW],
    "carry": CARRY,
    "carry --onto": [*CARRY, "--onto", "ab/a", "--weight", "0.5"],
    "grow": ["grow", "a", "--like", "larger", "--quiet", "--out", "out"],
}
RESUMED = ("align", "heal")
PROMISED = {"kill": 300, "moment": 60, "full": 40}  # points at least, over all commands
KINDS = ("kill", "moment", "signal", "full", "limit")
Files = dict[str, str]
Inject = Callable[[Path, list[str]], "Ended"]


@dataclass
class Ended:
    """Exit code, or minus the signal; standard error. facts: JSON, whole where a command came undisturbed to its end:
    its file operations, each with the number of the open file that it wrote to or 0, and the modules it imported.
    """

    code: int
    errors: str
    facts: bytes = b""


@dataclass
class Bench:
    """Inputs, and what each command makes of them where nothing goes wrong."""

    home: Path
    pick: random.Random = field(default_factory=partial(random.Random, 0))
    expected: dict[str, Files] = field(default_factory=dict)
    operations: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def create(home: Path) -> "Bench":
        bench, inputs = Bench(home), home / "inputs"
        config = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config |= {"intermediate_size": 24, "max_position_embeddings": 32}
        for seed, name in enumerate("ab"):
            _model(seed, config).save_pretrained(inputs / name)
        child = _model(1, config)
        with torch.no_grad():
            for parameter in child.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
        child.save_pretrained(inputs / "child")
        _model(2, config | {"intermediate_size": 32}).save_pretrained(inputs / "larger")
        np.save(inputs / "ids.npy", np.random.default_rng(0).integers(2, 40, 1500))
        (inputs / "thesis.tex").write_text("mine")
        (inputs / "out.partial.tex").write_text("mine")
        ended = run(inputs, ["align", "a", "b", *DATA, "--method", "weight", "--no-curves", "--out", "ab"])
        assert ended.code == 0, ended.errors
        return bench

    def prepare(self, command: str) -> None:
        """Runs a command without a fault, twice: the second time as every fork after it, with all imported."""
        for _ in range(2):
            with self.place() as place:
                began = time.monotonic()
                ended = run(place, COMMANDS[command])
                self.seconds[command] = time.monotonic() - began
                assert ended.code == 0, ended.errors
                self.operations[command], modules = json.loads(ended.facts)
                self.expected[command] = digests(place)
            for name in modules:
                if name.split(".")[0] in ("lmc_fast", "transformers", "matplotlib", "safetensors", "tqdm", "scipy"):
                    import_module(name)
        files = COMMANDS[command][-2:]
        shutil.rmtree(self.home / "older", ignore_errors=True)
        (self.home / "older").mkdir()
        if files == ["c.json", "c.png"]:  # there are older ones
            with self.place() as place:
                name, *rest = COMMANDS[command]
                assert run(place, [name, "b", "a", *rest[2:]]).code == 0
                for file in files:
                    shutil.copy(place / file, self.home / "older" / file)

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
        published, kept = (place / "out").exists(), place / "out.partial"
        states = [kept / "store", *kept.glob("state*.safetensors")]
        if any(state.exists() for state in states) or (published and words[0] in RESUMED):
            words = [*words, "--resume"]
        ended = run(place, words)
        done = published and "not empty" in ended.errors
        if ended.code and not done:
            return [f"the next run ends with {ended.code}: {ended.errors}"]
        now, expected = digests(place), self.expected[command]
        wrong = sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
        if published and done:  # a last leftover, which the next run for another place would not see
            wrong = [name for name in wrong if not name.startswith("out.partial/")]
        return [f"the next run differs in {', '.join(wrong)}"] if wrong else []


def _model(seed: int, config: dict[str, int]) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config))


def run(
    place: Path,
    command: list[str],
    faults: Callable[[], Faults] = Faults,
    during: Callable[[int], None] | None = None,
) -> Ended:
    """A command in a fork, in `place`; `during` is given its process id."""
    errors, told = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(errors[1], 2)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            os.chdir(place)
            for module in (align, heal):
                module.SAVE_SECONDS = module.SAVE_SHARE = 0  # a state after every step
            counting = faults()
            code = lmc_fast(command)
            sys.stderr.flush()
            counting.how = "count"
            for end in (2, errors[1]):  # else who reads of errors to the end waits for who waits to be read
                os.close(end)
            with open(told[1], "w") as facts:
                json.dump([counting.written, sorted(sys.modules)], facts)
        finally:
            os._exit(code)
    for _, end in (errors, told):
        os.close(end)
    if during:
        during(child)
    with os.fdopen(errors[0], "rb") as said, os.fdopen(told[0], "rb") as facts:
        text, found = said.read().decode(errors="replace"), facts.read()
    status = os.waitpid(child, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), text, found)


def digests(place: Path) -> Files:
    """Every file below, told by its content; what a report says of time and memory counts for nothing."""
    found = {}
    for file in sorted(place.rglob("*")):
        if file.is_symlink() or not file.is_file():
            continue
        content = file.read_bytes()
        if file.name == "report.json":
            report = json.loads(content)
            report.pop("costs", None)
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


def places_of(operations: list[int]) -> list[int]:
    """Which operations to put a fault at, counted from 1: all, but of writes to one open file in a row three."""
    found, done = [], 0
    for file, group in groupby(operations):
        count = len(list(group))
        chosen = {0, count // 2, count - 1} if file else range(count)
        found += [done + 1 + k for k in sorted(chosen)]
        done += count
    return found


def points(kind: str, bench: Bench, command: str, share: float, most: int) -> list[tuple[Inject, set[int]]]:
    """Faults of a kind for a command, `most` at most, and the exit codes that they may end with."""
    places, seconds, pick = places_of(bench.operations[command]), bench.seconds[command], bench.pick

    def some(wanted: int) -> list[int]:
        count = min(most, max(2, round(wanted * share)))
        return sorted(pick.sample(places, min(count, len(places))))

    if kind == "kill":
        return [(at_operation(n, "kill"), {-signal.SIGKILL}) for n in some(len(places))]
    if kind == "full":
        return [(at_operation(n, "full"), {0, 2}) for n in some(min(15, len(places)))]
    if kind == "limit":
        return [(limited_to(2**power), {0, 2}) for power in range(4, 18, max(2, round(1 / (3 * share))))]
    count = max(2, round(6 * share))
    moments = [pick.uniform(0, seconds) for _ in range(count)]
    if kind == "moment":
        return [(signalled_after(at, signal.SIGKILL), {0, -signal.SIGKILL}) for at in moments]
    sent = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ends = {0, *(128 + number for number in sent), *(-number for number in sent)}  # the latter before it has handlers
    return [(signalled_after(at, sent[i % 3]), ends) for i, at in enumerate(moments)]


def measure(
    share: float, commands: list[str] | None = None, kinds: list[str] | None = None, most: int = sys.maxsize
) -> Iterator[Row]:
    """A row for each command and kind. share: of all points; most: of one kind."""
    with tempfile.TemporaryDirectory() as home:
        bench = Bench.create(Path(home))
        for command in commands or list(COMMANDS):
            bench.prepare(command)
            for kind in kinds or KINDS:
                began = time.monotonic()
                found = [bench.fault(command, *point) for point in points(kind, bench, command, share, most)]
                wrong = [line for lines in found for line in lines]
                seconds = time.monotonic() - began
                print(f"{command:26} {kind:7} {len(found):4} points, {len(wrong)} wrong, {seconds:.0f} s", flush=True)
                for line in wrong[:5]:
                    print(f"    {line}", flush=True)
                counts = {"operations": len(bench.operations[command]), "points": len(found), "wrong": len(wrong)}
                yield {"command": command, "kind": kind, **counts}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, metavar="COMMAND", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}"
    )
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="points of one kind and command")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted, origin, kept = args.only or list(COMMANDS), provenance(*SOURCES), RESULTS / "crash.csv"
    rows = [] if args.quick else _measured(kept)
    for command in wanted:
        done = [] if args.quick or "dirty" in origin["commit"] else [_what(r) for r in rows if _same(r, origin)]
        left = [kind for kind in args.kinds if (command, kind) not in done]
        for row in measure(0.03 if args.quick else 1.0, [command], left, args.most) if left else ():
            rows = [other for other in rows if _what(other) != _what(row)] + [row | origin]
            if not args.quick:
                write_csv(kept, rows)
    if args.json:
        write_json(args.json, rows)
    asked = [row for row in rows if row["command"] in wanted]
    few = [
        kind
        for kind, least in PROMISED.items()
        if not args.quick and not args.only and sum(row["points"] for row in asked if row["kind"] == kind) < least
    ]
    for kind in few:
        print(f"fewer points of kind {kind} than promised")
    return 1 if args.check and (few or any(row["wrong"] for row in asked)) else 0


def _measured(file: Path) -> list[Row]:
    numbers = ("operations", "points", "wrong")
    return [row | {key: int(row[key]) for key in numbers} for row in read_csv(file)]


def _what(row: Row) -> tuple[str, str]:
    return row["command"], row["kind"]


def _same(row: Row, origin: Row) -> bool:
    return bool(row["commit"] == origin["commit"])


if __name__ == "__main__":
    sys.exit(main())
