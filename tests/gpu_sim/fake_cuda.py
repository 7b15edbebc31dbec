"""Fake CUDA tensors that pass the autograd engine, on a torch without CUDA. Import it before torch: torch looks for its
CUDA hooks when it starts.

The small library behind it (`hooks.cpp`) is compiled once for each installation of torch, into the folder of temporary
files; that takes a C++ compiler and some seconds.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("hooks.cpp")


def compiler() -> str | None:
    """The C++ compiler of this machine, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


def library() -> Path:
    """The compiled hooks. A name of its own for each source, torch, its place and user: another one's file is never
    loaded, nor one that looks for the libraries of an environment that is gone."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    versions = (importlib.metadata.version("torch"), sys.version, str(torch_folder))
    about = SOURCE.read_bytes() + "".join(versions).encode()
    folder = Path(tempfile.gettempdir()) / f"maskvlm-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    built = folder / f"hooks-{hashlib.sha256(about).hexdigest()[:16]}.so"
    if not built.exists():
        include, lib = torch_folder / "include", torch_folder / "lib"
        headers = (include, include / "torch/csrc/api/include", sysconfig.get_paths()["include"])
        part = built.with_suffix(f".{os.getpid()}.so")
        command = [compiler() or "g++", "-std=c++20", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(part)]
        command += [f"-I{folder}" for folder in headers] + [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        os.replace(part, built)  # two test processes may compile at once
    return built


def install() -> None:
    """Load the hooks. Raises RuntimeError where torch is loaded already."""
    if "torch" in sys.modules:
        raise RuntimeError("import fake_cuda and call install() before torch")
    hooks = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  (reads the hooks)

    hooks.install_device()
