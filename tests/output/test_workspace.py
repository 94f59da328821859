"""Directories of our own: proved by their lock file, and nothing else is touched."""

import json
import os
import signal
import threading

import pytest

from lmc_fast.errors import LmcError
from lmc_fast.output import (
    MARKERS,
    OWNER,
    Workspace,
    atomic_directory,
    atomic_file,
    marker,
    remove_own,
    was_published,
    workspace_names,
)

NAMES = {"a": {"config.json": None, "model-*.bin": None}, "report.json": None}


def tree(directory):
    """Every path below, with what it is and what it holds."""
    found = {}
    for path in sorted(directory.rglob("*")):
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(directory))] = link or (path.read_bytes() if path.is_file() else path.is_dir())
    return found


def killed(target, work=None, result=NAMES, **options):
    """Calls `work` with the workspace of another process, which is killed then."""
    child = os.fork()
    if child == 0:
        try:
            with Workspace(target, result, **options) as workspace:
                if work:
                    work(workspace)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_it_leaves_what_is_finished_and_nothing_else(tmp_path):
    target = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError), Workspace(target, NAMES) as work:
        (work.result / "report.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with Workspace(target, NAMES) as work:
        (work.result / "report.json").write_text("{}")
        work.publish()
        assert was_published(target)
    assert tree(tmp_path) == {"new": True, "new/out": True, "new/out/report.json": b"{}"}


def _directory(path):
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _link(path):
    _directory(path.with_name("home"))
    path.symlink_to("home")


def _dangling(path):
    path.symlink_to("nowhere")


def _file(path):
    path.write_text("mine")


def _fifo(path):
    os.mkfifo(path)


def _lock_of_others(path):
    path.mkdir()
    (path / "lock").write_text('{"pid": 5}')


def _linked_lock(path):
    path.mkdir()
    path.with_name("precious").write_bytes(marker(names={}, kept=[]))
    (path / "lock").symlink_to("../precious")


def _hard_linked_lock(path):
    path.mkdir()
    path.with_name("precious").write_text("")
    os.link(path.with_name("precious"), path / "lock")


def _fifo_lock(path):
    path.mkdir()
    os.mkfifo(path / "lock")


def _directory_lock(path):
    (path / "lock").mkdir(parents=True)


def _own_with_more(path):
    killed(path.with_suffix(""))
    (path / "result" / "a").mkdir()
    (path / "result" / "a" / "notes.txt").write_text("mine")


def _own_with_a_link(path):
    killed(path.with_suffix(""))
    _directory(path.with_name("home"))
    (path / "result" / "a").symlink_to("../../home")


def _own_with_a_linked_file(path):
    killed(path.with_suffix(""))
    path.with_name("precious").write_text("mine")
    (path / "result" / "report.json").symlink_to("../../precious")


def _odd_names(path):
    path.mkdir()
    (path / "lock").write_bytes(marker(names={"lock": None, "x": 5}, kept=[]))


def _odd_kept(path):
    path.mkdir()
    (path / "lock").write_bytes(marker(names={"lock": None}, kept=7))


@pytest.mark.parametrize(
    "make",
    [
        _odd_names,
        _odd_kept,
        _directory,
        _link,
        _dangling,
        _file,
        _fifo,
        _lock_of_others,
        _linked_lock,
        _hard_linked_lock,
        _fifo_lock,
        _directory_lock,
        _own_with_more,
        _own_with_a_link,
        _own_with_a_linked_file,
    ],
)
def test_what_is_not_ours_is_refused_and_stays(make, tmp_path):
    target = tmp_path / "out"
    make(tmp_path / "out.partial")
    names = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(LmcError, match="move it away"):
        Workspace(target, NAMES).require_free()
    with pytest.raises(LmcError, match="move it away"), Workspace(target, NAMES):
        pass
    with pytest.raises(LmcError, match="move it away"), atomic_directory(target):
        pass
    assert sorted(str(p) for p in tmp_path.rglob("*")) == names
    for path in tmp_path.rglob("*"):
        if path.name in ("thesis.tex", "notes.txt") or (path.name == "precious" and make is _own_with_a_linked_file):
            assert path.read_text() == "mine"
    if make is _hard_linked_lock:
        assert (tmp_path / "precious").read_text() == ""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    target = tmp_path / "out"

    def half(work):
        (work.result / "a").mkdir()
        (work.result / "a" / "model-1.bin").write_text("x")

    killed(target, half)
    assert (tmp_path / "out.partial" / "result" / "a" / "model-1.bin").exists()
    with atomic_directory(target) as work:
        assert not list(work.iterdir())
    assert tree(tmp_path) == {"out": True}
    for stage in ((), ("lock",)):  # killed before anything was written
        (tmp_path / "two.partial").mkdir()
        for name in stage:
            (tmp_path / "two.partial" / name).touch()
        with Workspace(tmp_path / "two", NAMES):
            pass
    assert tree(tmp_path) == {"out": True}


def test_what_an_unfinished_run_keeps_needs_resume(tmp_path):
    target, options = tmp_path / "out", {"more": {"state": None, "store": {"b-*": None}}, "kept": ("state", "store")}

    def half(work):
        (work.path / "state").write_text("kept")
        (work.result / "report.json").touch()

    killed(target, half, **options)
    with pytest.raises(LmcError, match=r"unfinished run; continue it with --resume"), Workspace(target, NAMES):
        pass
    with pytest.raises(LmcError, match="unfinished run"), atomic_directory(target):
        pass
    with Workspace(target, NAMES, resume=True, **options) as work:
        assert (work.path / "state").read_text() == "kept" and not list(work.result.iterdir())
    assert set(tree(tmp_path)) == {"out.partial", "out.partial/lock", "out.partial/state"}
    with Workspace(target, NAMES, resume=True, **options) as work:
        work.publish()
    assert set(tree(tmp_path)) == {"out"}


def test_only_leftovers_of_a_finished_run(tmp_path):
    target = tmp_path / "out"

    def all_but_leaving(work):
        (work.path / "state").touch()
        work.publish()

    killed(target, all_but_leaving, more={"state": None}, kept=("state",))
    assert was_published(target) and (tmp_path / "out.partial" / "state").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").mkdir()
    assert not was_published(target)


def test_one_at_a_time_and_a_live_run_is_never_called_one_to_remove(tmp_path):
    target = tmp_path / "out"
    with Workspace(target, NAMES, {"state": None}, ("state",)) as work:
        (work.path / "state").touch()
        for other in (Workspace(target, NAMES), Workspace(target, NAMES, resume=True)):
            with pytest.raises(LmcError, match="another run is writing"):
                other.require_free()
            with pytest.raises(LmcError, match="another run is writing"), other:
                pass


def test_coming_and_going_at_the_same_moment(tmp_path):
    """Every visit either works alone in the directory or is told that another one does."""
    inside, worst, outcomes = [], [], []

    def visit():
        for _ in range(60):
            try:
                with Workspace(tmp_path / "out", NAMES) as work:
                    inside.append(1)
                    worst.append(len(inside))
                    (work.result / "report.json").write_text("x")
                    inside.pop()
                outcomes.append("done")
            except LmcError as error:
                outcomes.append("told" if "another run" in str(error) else str(error))

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) == 1 and set(outcomes) <= {"done", "told"} and "done" in outcomes
    assert not list(tmp_path.iterdir())


def test_a_target_that_is_taken_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(LmcError, match="not empty"), Workspace(target, NAMES) as work:
        _directory(target)
        work.publish()
    assert tree(tmp_path) == {"out": True, "out/thesis.tex": b"mine"}


def test_files_that_come_during_the_work_stay(tmp_path):
    with Workspace(tmp_path / "out", NAMES) as work:
        (work.path / "thesis.tex").write_text("mine")
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "mine"


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "curve.png"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as new:
        assert new.suffix == ".png"
        new.write_text("half")
        raise ZeroDivisionError
    assert tree(tmp_path) == {"curve.png": b"old"}
    with atomic_file(file) as new:
        new.write_text("whole")
    assert tree(tmp_path) == {"curve.png": b"whole"}
    (tmp_path / "link.png").symlink_to("curve.png")
    with pytest.raises(LmcError, match="link"), atomic_file(tmp_path / "link.png"):
        pass


def test_a_directory_that_outlives_its_workspace(tmp_path):
    names = {OWNER: None, "b-*": None}
    store = tmp_path / "store"
    with atomic_directory(store, names) as work:
        (work / OWNER).write_bytes(marker())
        (work / "b-1").touch()
    (store / "mine").touch()
    with pytest.raises(LmcError, match="holds mine"):
        remove_own(store, names)
    assert len(tree(store)) == 3
    (store / "mine").unlink()
    (store / OWNER).rename(tmp_path / "kept")
    with pytest.raises(LmcError, match="did not make"):
        remove_own(store, names)
    (tmp_path / "kept").rename(store / OWNER)
    remove_own(store, names)
    remove_own(store, names)
    assert not list(tmp_path.iterdir())


def test_a_half_written_marker_of_a_result_is_removed_with_it(tmp_path):
    names = {OWNER: None, "b-*": None}
    outer = tmp_path / "out"
    with (
        pytest.raises(ZeroDivisionError),
        Workspace(outer, NAMES, workspace_names("store", names)) as work,
        atomic_directory(work.path / "store", names) as inner,
    ):
        (inner / OWNER).write_bytes(marker()[:20])
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_directory_that_stays_keeps_its_marker(tmp_path):
    outer = tmp_path / "out"
    with Workspace(outer, NAMES, workspace_names("store", {})) as work:
        with Workspace(work.path / "store", {}) as inner:
            (inner.path / "thesis.tex").write_text("mine")
        assert (inner.path / "lock").exists()
    assert (tmp_path / "out.partial" / "store.partial" / "thesis.tex").read_text() == "mine"
    with pytest.raises(LmcError, match=r"holds store.partial/thesis.tex"), Workspace(outer, NAMES):
        pass


def test_names_of_a_nested_workspace_are_what_it_holds(tmp_path):
    outer = tmp_path / "out"

    def half(work):
        with Workspace(work.path / "x.json", None) as inner:
            inner.result.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    killed(outer, half, more=workspace_names("x.json", None))
    assert (tmp_path / "out.partial" / "x.json.partial" / "new.json").exists()
    with Workspace(outer, NAMES):
        pass
    assert not list(tmp_path.iterdir())
    assert "lock" in MARKERS and json.loads(marker(a=1))["a"] == 1
