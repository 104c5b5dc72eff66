"""Teaches a CPU build of torch that tensors may be on device "cuda", with one line of C++ (guard.cpp)."""

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")
TORCH = Path(torch.__file__).parent


@functools.cache
def load_guard() -> None:
    """Compile the guard, which takes some seconds once for each version of torch, and load it."""
    if torch.version.cuda is not None:
        return
    version = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = SOURCE.parent / "__pycache__" / f"guard-{version}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            paths = [f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}"]
            command = ["g++", "-shared", "-fPIC", "-std=c++20", *paths, str(SOURCE), "-lc10", "-o", str(made)]
            subprocess.run(command, check=True)
            # at once: another test process may load it now
            os.replace(made, library)
    torch.ops.load_library(library)
