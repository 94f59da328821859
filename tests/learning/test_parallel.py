"""Two processes take what one does with the whole batch."""

import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lmc_fast.checkpoints import Model
from lmc_fast.engine.source import Resident
from lmc_fast.errors import LmcError
from lmc_fast.learning import parallel
from lmc_fast.learning.learner import Chunking, Learner
from lmc_fast.learning.schedule import Schedule
from lmc_fast.symmetry import canonicalize


def learn(directories, steps):
    """Of the first two models, and of all."""
    torch.set_num_threads(1)
    members = [canonicalize(Model(d).load(torch.float64)) for d in directories]
    tokens = torch.randint(40, (9, 12), generator=torch.Generator().manual_seed(3))
    found = {}
    for some in (members[:2], members):
        learner = Learner(Resident(*some), tokens, Schedule(steps=steps, batch=5, warmup=2), Chunking(2))
        for _ in range(steps):
            learner.step()
        found[f"loss of {len(some)}"] = torch.tensor(learner.history.loss)
        found |= {f"{name} of {len(some)}": t.detach() for name, t in learner.chart.tensors.items()}
    return found


def one_of_two(rank, port, directories, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(learn(directories, 4), Path(out) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_learn_what_one_does(make_checkpoint):
    """Five blocks of a batch: three go to one process, two to the other; of two models and of three."""
    directories = [str(make_checkpoint("neox", seed)) for seed in (1, 2, 3)]
    alone = learn(directories, 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        mp.spawn(one_of_two, (port, directories, out), nprocs=2)
        first, second = (torch.load(Path(out) / f"{rank}.pt") for rank in (0, 1))
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - expected).abs().max() <= 1e-9 * expected.abs().max(), name


def test_a_batch_smaller_than_the_group_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "place", lambda: (2, 3))
    with pytest.raises(LmcError, match="--batch"):
        parallel.share(torch.arange(2))


def test_each_process_has_its_own_gpu(monkeypatch):
    assert parallel.own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [parallel.own_device(d) for d in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_processes_that_do_not_meet_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LmcError, match="torchrun"), parallel.together("cpu"):
        raise AssertionError("there is no group")
