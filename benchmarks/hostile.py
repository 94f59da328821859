"""Bad inputs by the thousand: each is refused in one sentence, or computes what transformers computes.

Tiny checkpoints of many families, their tokenizers, data for them, and files of our own are damaged one at a time
(benchmarks.mutants, benchmarks.mutant_data), and given to the command as a user gives them. What it accepts is compared
with transformers', numpy's or the undamaged file's answer. Counted as faults: tracebacks ("this is a bug"), hangs (more
than LIMIT_SECONDS), memory (more than LIMIT_BYTES), messages that are not one printable line, and silent differences.

    python -m benchmarks.hostile --check            # all, about half an hour on one core
    python -m benchmarks.hostile --check --quick    # 300 of them, under 3 minutes
"""

from __future__ import annotations

import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import judges, judges_commands
from benchmarks.common import RESULTS, ROOT, Row, options, provenance, read_csv, write_csv, write_json

SOURCES = (
    "lmc_fast",
    *(
        f"benchmarks/{name}.py"
        for name in (
            "hostile",
            "mutants",
            "mutant_data",
            "mutant_pickles",
            "mutant_commands",
            "judges",
            "judges_commands",
        )
    ),
)
LIMIT_SECONDS = 20.0
LIMIT_BYTES = 1 << 30  # above what the worker had before
QUICK = 300
PROMISED = {"config": 2000, "safetensors": 300, "pickled": 100, "index, tokenizer, data": 300, "own": 100}
FAULTS = ("traceback", "hang", "memory", "message", "silent")


JUDGES: dict[str, Callable[[Path, str, str], None]] = {
    **dict.fromkeys(("config", "safetensors", "index", "pickled"), judges.checkpoint),
    "tokenizer": judges.tokenizer,
    "data": judges.text,
    "images": judges.images,
    "own": judges.own,
    "adapter": judges_commands.adapter,
    "option": judges_commands.option,
    "grown": judges_commands.grown,
    "unfinished": judges_commands.unfinished,
    "argument": judges_commands.argument,
}


def prepare(home: Path) -> None:
    """The good checkpoints and files that every case is a change of."""
    _paths()
    import torch
    import zoo
    from checkpoints_tiny import save_tokenizer

    from benchmarks import mutant_commands
    from benchmarks.mutants import FAMILIES
    from lmc_fast import Schedule, align, open_pair

    for name in FAMILIES:
        zoo.write(name, home / name)
    zoo.write("neox", home / "other", 2)
    model = zoo.ZOO["neox"]()
    model.save_pretrained(home / "sharded", max_shard_size="10KB")
    shutil.copytree(home / "neox", home / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(model.state_dict(), home / "pickled" / "pytorch_model.bin")
    shutil.copytree(home / "neox", home / "text")
    save_tokenizer(home / "text")
    (home / "text" / "text.txt").write_text(" ".join(f"w{i % 40}" for i in range(2, 400)))
    shutil.copytree(home / "vit", home / "images")
    shutil.copytree(home / "neox", home / "own")
    tokens = torch.arange(60).view(3, 20) % 40
    pair, state = open_pair(home / "neox", home / "other"), home / "own" / "state.safetensors"
    found = align(pair, tokens, validation=tokens, schedule=Schedule(steps=2, batch=1), state_file=state)
    found.save(home / "own" / "alignment.safetensors")
    mutant_commands.prepare(home / "tiny", home / "tiny-expected")


def cases(home: Path) -> list[Any]:
    """Every case, in an order that does not depend on anything but the seed."""
    from benchmarks import mutant_commands, mutant_data, mutant_pickles, mutants

    bases = {name: home / name for name in mutants.FAMILIES}
    found = [
        *mutants.configs(bases),
        *mutants.safetensors(bases),
        *mutants.indexes({"sharded": home / "sharded"}),
        *mutant_pickles.pickles("pickled", home / "pickled"),
        *mutant_data.tokenizers("text", home / "text"),
        *mutant_data.texts("text"),
        *mutant_data.images("images"),
        *mutant_data.own("own", home / "own"),
        *mutant_commands.alignments("tiny", home / "tiny"),
        *(mutant_commands.adapters("tiny", home / "tiny") if judges_commands.HAS_PEFT else ()),
        *mutant_commands.option_files("tiny"),
        *mutant_commands.larger("tiny", home / "tiny"),
        *mutant_commands.unfinished("tiny", home / "tiny"),
        *mutant_commands.arguments("tiny"),
    ]
    random.Random(1).shuffle(found)
    return found


def _paths() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["LMC_FAST_ROUTE"] = "weight"  # which is faster is measured; the bits of two runs would hang on the load
    sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "symmetry", "families")]


def judged(case: Any, home: Path, scratch: Path) -> tuple[str, str]:
    """(outcome, detail) of one case."""
    from lmc_fast import LmcError

    os.chdir(home)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(home / case.base, scratch / "bad")
    (scratch / "good").symlink_to(home / case.base)
    (scratch / "other").symlink_to(home / "other")
    case.change(scratch / "bad")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        JUDGES[case.group](scratch / "bad", case.base, case.name)
        outcome, detail = "equal", ""
    except (judges.Refused, LmcError) as error:
        outcome, detail = "refused", str(error)
        if "this is a bug" in detail:
            outcome = "traceback"
        elif not detail.isprintable() or not detail or len(detail) > 1500:
            outcome = "message"
    except AssertionError as error:
        outcome, detail = "silent", str(error)
    except BaseException as error:
        import traceback

        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = any("lmc_fast" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        outcome = "traceback" if ours else "silent"  # what transformers or numpy refuses, we must not accept
        detail = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > LIMIT_BYTES:
        outcome = "memory"
    return outcome, detail


def work(home: Path, numbers: list[int]) -> None:
    """A worker: judges cases, and says before and after each where it stands."""
    _paths()
    import torch
    import transformers

    import lmc_fast.cli  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    said = os.fdopen(os.dup(1), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 30), held + (8 << 30)))
    every = cases(home)
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers:
            said.write(json.dumps({"begin": number}) + "\n")
            outcome, detail = judged(every[number], home, Path(scratch) / "case")
            said.write(json.dumps({"end": number, "outcome": outcome, "detail": detail[:600]}) + "\n")


def run(home: Path, numbers: list[int], report: Callable[[int, str, str], None]) -> None:
    """All cases in workers, each of which is replaced when it hangs, dies or has taken too much memory."""
    left = list(numbers)
    while left:
        command = [sys.executable, "-m", "benchmarks.hostile", "--worker", str(home)]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert worker.stdin and worker.stdout
        worker.stdin.write(json.dumps(left))
        worker.stdin.close()
        current, ended = None, False
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(LIMIT_SECONDS if current is not None else 300):
                    report(left.pop(0), "hang", "") if current is not None else sys.exit("a worker does not start")
                    break
                line = worker.stdout.readline()
                if not line:
                    ended = True
                    break
                said = json.loads(line)
                if "begin" in said:
                    current = said["begin"]
                    continue
                current = None
                report(left.pop(0), said["outcome"], said["detail"])
                if said["outcome"] == "memory":
                    break
        worker.kill()
        worker.wait()
        if ended and current is not None:
            report(left.pop(0), "traceback", "the process died")
        elif ended and left and worker.returncode not in (0, -9):
            sys.exit(f"a worker fails: {worker.stderr.read()[-2000:] if worker.stderr else ''}")


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), json.load(sys.stdin))
        return 0
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", help="groups of cases")
    parser.add_argument("--list", type=Path, metavar="FILE", help="write every case with its outcome here")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "good"
        prepare(home)
        every = cases(home)
        numbers = [i for i, case in enumerate(every) if not args.only or case.group in args.only]
        if args.quick:  # as many of each group, as far as there are
            ranks: Counter[str] = Counter()
            order = {}
            for i in numbers:
                order[i] = ranks[every[i].group] = ranks[every[i].group] + 1
            numbers = sorted(numbers, key=order.__getitem__)[:QUICK]
        counts: dict[str, Counter[str]] = {}
        lines = []

        def report(number: int, outcome: str, detail: str) -> None:
            case = every[number]
            counts.setdefault(case.group, Counter())[outcome] += 1
            lines.append(
                {"group": case.group, "base": case.base, "case": case.name, "outcome": outcome, "said": detail}
            )
            if outcome in FAULTS:
                print(f"{outcome}: {case.group}, {case.base}, {case.name!r}: {detail!r}", flush=True)

        run(home, numbers, report)
    rows: list[Row] = []
    for group, found in sorted(counts.items()):
        row: Row = {"group": group, "cases": found.total(), "refused": found["refused"], "equal": found["equal"]}
        rows.append(row | {fault: found[fault] for fault in FAULTS} | provenance(*SOURCES))
        print({k: v for k, v in rows[-1].items() if k in ("group", "cases", "refused", "equal", *FAULTS)})
    print(f"{len(numbers)} cases in {time.monotonic() - began:.0f} s")
    if args.json:
        write_json(args.json, rows)
    if args.list:
        write_json(args.list, lines)
    if not args.quick:  # in the place of earlier rows of the same groups
        kept = [row for row in read_csv(RESULTS / "hostile.csv") if row["group"] not in counts]
        write_csv(RESULTS / "hostile.csv", sorted(kept + rows, key=_group))
    faults = sum(row[fault] for row in rows for fault in FAULTS)
    short = {
        part: most
        for part, most in PROMISED.items()
        if not args.quick and not args.only and _count(counts, part) < most
    }
    return int(args.check and bool(faults or short))


def _group(row: Row) -> str:
    return str(row["group"])


def _count(counts: dict[str, Counter[str]], part: str) -> int:
    return sum(counts[group].total() for group in part.split(", ") if group in counts)


if __name__ == "__main__":
    sys.exit(main())
