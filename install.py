"""Sets up what `make demo` and `make test` need: `python3 install.py .venv` makes .venv and installs into it.

Says in one line what is downloaded, and in one line what to install where something is missing. Written for any
Python 3.6, to say so where it is too old.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 10)  # requires-python of pyproject.toml
SIZES = {  # to download and on disk, with what `make test` and `make lint` need, GB
    "a CPU build of torch": (0.5, 2),
    "torch for macOS": (0.25, 1),
    "torch with CUDA": (3, 6),
}


def stop(sentence):
    sys.exit(f"install.py: {sentence}")


def python_of(venv):
    """The interpreter of `venv`, which is made where it is not there or has no pip."""
    python = venv / "bin" / "python"
    if works(python, "-m", "pip", "--version"):
        return python
    version = ".".join(map(str, sys.version_info[:2]))
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        stop(
            f"{sys.executable} has no module {missing[0]}, which makes virtual environments; "
            f"install it (Debian, Ubuntu: apt install python{version}-venv) or name another: PYTHON=python3.12"
        )
    try:
        done = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
    except OSError as error:
        stop(f"{sys.executable} does not start: {error}")
    if done.returncode:
        stop(f"no virtual environment can be made in {venv}; the reason is above. VENV=/another/place chooses another")
    return python


def works(*command):
    try:
        return subprocess.run([str(c) for c in command], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def torch_build(python):
    """Which of SIZES pip will take, from the registry's list of versions alone."""
    if sys.platform == "darwin":
        return "torch for macOS"
    pins = dict(line.split()[0].split("==") for line in (ROOT / "constraints.txt").open() if "==" in line)
    listed = output(python, "-m", "pip", "index", "versions", "torch")
    return "a CPU build of torch" if pins["torch"] + "+cpu" in listed else "torch with CUDA"


def output(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False).stdout


def install(python, venv):
    if works(python, "-c", "import torch, transformers, scipy, pytest"):
        print(f"{venv}: bringing it up to date", flush=True)
    else:
        build = torch_build(python)
        download, disk = SIZES[build]
        free = shutil.disk_usage(venv).free / 1e9
        print(
            f"{venv}: installing {build}, transformers and what the tests need; about {download} GB to download "
            f"(less where pip has some of it already) and {disk} GB on disk",
            flush=True,
        )
        if free < disk:
            stop(f"{venv} has room for {free:.1f} GB only; VENV=/another/place chooses another")
    quiet = [] if sys.stdout.isatty() else ["--quiet"]  # a terminal gets pip's progress bars
    patient = [] if "timeout" in output(python, "-m", "pip", "config", "list") else ["--timeout", "60"]
    command = [python, "-m", "pip", "install", *quiet, *patient, "--constraint", ROOT / "constraints.txt"]
    if subprocess.run([*map(str, command), "--editable", f"{ROOT}[test,lint]"], check=False).returncode:
        stop("pip could not install everything; the reason is above. Once it is dealt with, the same command goes on")


def say_what_is_slow(python):
    """The C++ solvers are optional: without a compiler the package installs without them."""
    if not works(python, "-c", "import lmc_fast._C"):
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            "install.py: the C++ solvers were not built, so that slower ones in torch are used and their tests skip; "
            "for them, install a C++17 compiler and Python's headers (Debian, Ubuntu: apt install g++ "
            f"python{version}-dev; macOS: xcode-select --install), then {python} -m pip install --editable .",
            flush=True,
        )


def main():
    if sys.version_info < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        stop(f"{sys.executable} is Python {sys.version.split()[0]}, and {oldest} is needed: PYTHON=python{oldest}")
    if not os.access(ROOT, os.W_OK):
        stop(f"{ROOT} cannot be written to; copy the project to where it can")
    venv = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv")
    python = python_of(venv)
    install(python, venv)
    say_what_is_slow(python)


if __name__ == "__main__":
    main()
