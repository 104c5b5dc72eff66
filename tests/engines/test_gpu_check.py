"""What scripts/gpu-check does: for real on the CPU, and that it sees wrong attention."""

import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from benchmarks.gpu_check import chat, images, load, rows
from benchmarks.gpu_check.context import Context, load_engine
from benchmarks.gpu_check.models import Target, chat_entry, read_target
from benchmarks.gpu_check.report import Report, Skipped, judged
from benchmarks.gpu_check.streams import Streams
from config import ConfigurationError
from tests.deployment import ROOT
from tests.engines.tiny_chat import CONFIGS, save_model
from tests.gpu_stand_ins.flash_attention import FlashAttentionStandIn
from workers.engines.chat import backend
from workers.engines.chat.attention import flash
from workers.engines.chat.model.layers import LayerOperations


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CONFIGS["llama"]())


def report_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("gpu-check-*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_on_a_cpu_all_that_needs_no_gpu_passes(weights, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", weights, "--results", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=340, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report_of(tmp_path)
    assert found["model"] == weights.name
    statuses = {name: outcome["status"] for name, outcome in found["checks"].items()}
    passed = {"reference", "load", "dtype", "attention", "KV cache", "rows together", "greedy"}
    passed |= {"1 streams", "16 streams", "64 streams", "256 streams", "out of memory"}
    assert {name for name, status in statuses.items() if status == "PASS"} == passed
    assert "FAIL" not in statuses.values()
    # each check has its line, in the same order
    lines = [line for line in done.stdout.splitlines() if line[:4] in ("PASS", "FAIL", "SKIP")]
    assert [line[:4] for line in lines] == list(statuses.values())
    values = {name: outcome["values"] for name, outcome in found["checks"].items()}
    assert values["greedy"]["equal"] == 50
    for count in (1, 16, 64, 256):
        speed = values[f"{count} streams"]
        assert speed["streams"] == count and speed["tokens_per_s"] > 0 and speed["first_token_ms"] > 0


MANY_HEADS = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.2,
)
"""torch's kernel would split the contexts of 2 to 6 of its sequences."""


class SplittingKernel(FlashAttentionStandIn):
    """Splits contexts by itself once `forgets` is set, whatever it is asked for."""

    forgets = False

    def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
        return super().__call__(*args, **options | ({"num_splits": None} if self.forgets else {}))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SplittingKernel:
    made = SplittingKernel()
    monkeypatch.setattr(flash, "varlen_attn", made)
    monkeypatch.setattr(backend, "wants_flash", lambda loaded: True)
    # the compiled operations are for the CPU's attention
    monkeypatch.setattr(backend, "kinds_of_operations", lambda device, attention: [LayerOperations])
    return made


@pytest.fixture
def context(kernel: SplittingKernel, tmp_path: Path) -> Iterator[Context]:
    """A loaded engine whose attention is FlashAttention's stand-in, and its reference."""
    folder = save_model(tmp_path / "model", MANY_HEADS)
    options = {"max_batch_size": 16, "kv_cache_tokens": 16384, "torch_threads": 1, "compile": False}
    made = Context(Target(chat=chat_entry("many heads", folder, **options)), tmp_path)
    made.work = made.work._replace(prompts=6, new_tokens=8)
    try:
        chat.reference(made)
        made.load()
        yield made
    finally:
        made.close()


def test_the_rows_that_torchs_kernel_mixes_up_are_found(context, kernel, tmp_path):
    right = rows.rows_together(context)
    assert right.status == "PASS", right.figure
    assert set(right.values["differences"]) == {f"{n} rows" for n in (1, 2, 3, 4, 6, 8, 16)} | {
        "rows and a prompt"
    }
    kernel.forgets = True
    report = Report()
    report.run("rows together", lambda: rows.rows_together(context))
    outcome = report.outcomes["rows together"]
    assert outcome.status == "FAIL"
    wrong = {
        name for name, value in outcome.values["differences"].items() if not value <= outcome.values["limit"]
    }
    assert {"2 rows", "3 rows", "4 rows", "6 rows"} <= wrong
    assert not {"1 rows", "8 rows", "16 rows"} & wrong
    assert report.exit_status == 1
    report.write(tmp_path / "gpu-check-none.json")
    assert report_of(tmp_path)["checks"]["rows together"]["status"] == "FAIL"


def test_answers_that_are_not_those_of_generate_are_found(context):
    right = chat.greedy(context)
    assert right.status == "PASS" and right.values["equal"] == 6, right.figure
    attention = context.loaded.engine.parts.attention
    real = attention.attend
    # one layer of the model attends with a scale that is 30 % too large
    attention.attend = lambda layer, query, *rest: real(layer, query * (1.3 if layer else 1.0), *rest)
    wrong = chat.greedy(context)
    assert wrong.status == "FAIL"
    assert max(wrong.values["margins"]) > wrong.values["limit"]


def test_a_request_that_fails_is_found(context):
    assert load.out_of_memory(context).status == "PASS"

    def broken(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    context.loaded.engine.parts.runner.forward = broken
    assert chat.greedy(context).status == "FAIL"
    assert load.out_of_memory(context).values["failed"] == 6
    assert load.out_of_memory(context).status == "FAIL"


def test_streams_without_room_are_skipped(context):
    with pytest.raises(Skipped, match="max_batch_size is 16"):
        load.speed(context, 17)
    context.work = context.work._replace(window=5000)
    with pytest.raises(Skipped, match="KV cache of 16,384"):
        load.speed(context, 8)


def test_a_dtype_other_than_the_right_one_fails(context, monkeypatch):
    assert chat.dtype(context).status == "PASS"
    monkeypatch.setattr(Context, "dtype", torch.float16)
    assert chat.dtype(context).status == "FAIL"


def test_images_of_one_colour_and_of_one_seed_that_differ_are_found(tmp_path, monkeypatch):
    context = Context(Target(), tmp_path)
    right = images.image(context)
    assert right.status == "PASS", right.figure
    assert (right.values["width"], right.values["height"], right.values["difference"]) == (64, 64, 0)
    flat, other = np.full((8, 8, 3), 7.0), np.zeros((8, 8, 3))
    other[0] = 255
    for drawn, words in (([flat, flat], "all pixels are alike"), ([other, flat], "gave another image")):
        shutil.rmtree(tmp_path / "sdxl")
        results = iter(drawn)
        monkeypatch.setattr(images, "_draw", lambda *_, results=results: (next(results), 1.0))
        wrong = images.image(context)
        assert wrong.status == "FAIL" and words in wrong.figure


def test_what_a_check_raises_is_its_result_and_the_next_one_runs():
    lines: list[str] = []
    report = Report(lines.append)

    def broken() -> Any:
        raise RuntimeError("first line\nsecond line")

    def impossible() -> Any:
        raise Skipped("no GPU")

    report.run("impossible", impossible)
    assert report.exit_status == 0
    report.run("broken", broken)
    report.run("right", lambda: judged(True, "1.5 s", seconds=1.5))
    assert [line.split() for line in lines] == [
        ["SKIP", "impossible", "no", "GPU"],
        ["FAIL", "broken", "RuntimeError:", "first", "line"],
        ["PASS", "right", "1.5", "s"],
    ]
    assert report.exit_status == 1


def test_waits_are_counted_in_all_threads_by_place(monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    with load.counted_waits() as found:
        assert modes == ["warn"]
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        wait()
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert modes == ["warn", "default"]
    assert list(found.values()) == [2]
    assert next(iter(found)).startswith("test_gpu_check.py:")


def test_a_target_is_a_catalogue_or_a_folder(weights, tmp_path):
    catalogue = tmp_path / "models.toml"
    model = '[[models]]\nname = "{}"\ntasks = ["{}"]\nweights = "{}"\n'
    parts = [
        model.format(*fields) for fields in (("a", "generation", "x"), ("b", "chat", "y"), ("c", "chat", "z"))
    ]
    catalogue.write_text('project = "P"\n' + "".join(parts))
    chosen = read_target(catalogue)
    assert chosen.chat is not None and chosen.image is not None
    assert (chosen.chat.name, chosen.image.name) == ("b", "a")
    chosen = read_target(catalogue, "c")
    assert chosen.chat is not None and (chosen.chat.name, chosen.image) == ("c", None)
    with pytest.raises(ConfigurationError, match="no model 'd'"):
        read_target(catalogue, "d")
    folder = read_target(weights)
    assert folder.chat is not None and folder.chat.weights == str(weights)
    (tmp_path / "model_index.json").write_text("{}")
    assert read_target(tmp_path).image is not None
    assert read_target(None) == Target()


def test_an_engine_is_followed_from_its_load_to_its_last_token(weights):
    loaded = load_engine(chat_entry("tiny", weights, torch_threads=1))
    try:
        assert any("loaded in" in record.getMessage() for record in loaded.log)
        with Streams(loaded.engine, loaded.recorder, loaded.texts, 3, 20, 8) as streams:
            assert loaded.engine.status().running == 3
            found = streams.speed()
        assert loaded.engine.status().running == 0
        assert 20 <= found.mean_context <= 200
        assert 0 < found.first_token_ms <= found.last_first_token_ms
        assert not loaded.recorder.failures()
    finally:
        loaded.engine.close()
