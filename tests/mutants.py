"""Breaks the code on purpose, one place at a time, and checks that a test notices: scripts/mutants [NAME …].

tests/mutants.toml lists the mutants: a text of one file, what stands in its place, and the tests of which one
must fail. They work on copies of the checkout. A mutant that survives needs a test, or the code is not
needed; one that can't be noticed has a `reason`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "mutants.toml"
TIMEOUT_S = 180
NO_FAILURE, FAILURES = 0, 1  # exit statuses of pytest


class Mutant(NamedTuple):
    """`reason`: why no test can notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    reason: str = ""


def read_table() -> list[Mutant]:
    return [Mutant(**row) for row in tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutants"]]


@contextmanager
def mutated(copy: Path, mutant: Mutant) -> Iterator[None]:
    """Apply a mutant to a copy of the checkout."""
    path = copy / mutant.file
    before = path.read_text(encoding="utf-8")
    count = before.count(mutant.old)
    if count != 1:
        raise SystemExit(
            f"{mutant.name}: {mutant.file} has this text {count} times, not once: {mutant.old!r}"
        )
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def run_tests(
    copy: Path, tests: Iterable[str], timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the checkout up to the first failure. Raises subprocess.TimeoutExpired."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
    )


def require_passing(copy: Path, mutants: Iterable[Mutant]) -> None:
    """End the process unless all tests pass without a mutant: a test that always fails would kill each
    one."""
    run = run_tests(copy, sorted({test for mutant in mutants for test in mutant.tests}))
    if run.returncode != NO_FAILURE:
        raise SystemExit(f"the tests fail without a mutant:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def is_killed(copy: Path, mutant: Mutant) -> bool:
    """Whether one of the mutant's tests fails, or they do not end."""
    with mutated(copy, mutant):
        try:
            run = run_tests(copy, mutant.tests, TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{mutant.name}: the tests did not end within {TIMEOUT_S} s", flush=True)
            return True
    if run.returncode not in (NO_FAILURE, FAILURES):
        raise SystemExit(f"{mutant.name}: the tests could not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == FAILURES


def copy_checkout(target: Path) -> Path:
    """Copy the tracked files, as they are now."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to((ROOT / ".venv").resolve())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; all by default")
    parser.add_argument("-j", "--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [mutant for mutant in read_table() if not options.names or mutant.name in options.names]
    with tempfile.TemporaryDirectory() as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.processes):
            free.put(copy_checkout(Path(folder, str(number))))
        copy = free.get()
        require_passing(copy, chosen)
        free.put(copy)

        def judge(mutant: Mutant) -> bool:
            copy = free.get()
            try:
                killed = is_killed(copy, mutant)
            finally:
                free.put(copy)
            word = (
                "killed"
                if killed
                else f"survives, as expected: {mutant.reason}"
                if mutant.reason
                else "SURVIVES"
            )
            print(f"{mutant.name}: {word}", flush=True)
            return killed

        with ThreadPoolExecutor(options.processes) as pool:
            results = list(pool.map(judge, chosen))
    survivors = [m.name for m, killed in zip(chosen, results, strict=True) if not killed and not m.reason]
    print(f"{sum(results)} of {len(chosen)} mutants are killed")
    sys.exit(f"survivors: {', '.join(survivors)}" if survivors else 0)


if __name__ == "__main__":
    main()
