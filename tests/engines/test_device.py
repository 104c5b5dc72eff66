"""The GPU that an engine is given: usable, or refused in a line that says why."""

from functools import partial

import pytest
import torch

from catalogue import ChatModelEntry
from workers.engines import LazyEngine
from workers.engines.base import EngineLoadError, TemporaryLoadError
from workers.engines.device import half_precision, require_gpus

ENTRY = ChatModelEntry.model_validate({"name": "m", "tasks": ["chat"], "weights": "/nowhere"})
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build of torch for CUDA, with an H100."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ARCHITECTURES)
    return monkeypatch


def fail_at_start(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def init() -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_driver_that_is_too_old_is_named(cuda: pytest.MonkeyPatch) -> None:
    fail_at_start(cuda, "The NVIDIA driver on your system is too old (found version 12040).\nPlease update")
    with pytest.raises(
        EngineLoadError, match=r"driver on your system is too old .found version 12040"
    ) as caught:
        LazyEngine(ENTRY, gpus=["GPU-1"]).load(lambda gained: None)
    assert type(caught.value) is EngineLoadError
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_lost_may_come_back(cuda: pytest.MonkeyPatch) -> None:
    fail_at_start(cuda, "CUDA unknown error")
    with pytest.raises(TemporaryLoadError, match="CUDA unknown error"):
        LazyEngine(ENTRY, gpus=["GPU-1"]).load(lambda gained: None)


def test_a_build_of_torch_for_the_cpu_is_refused_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EngineLoadError, match="is a build for the CPU"):
        require_gpus(["GPU-1"])
    require_gpus([])


def test_several_gpus_are_refused_and_not_left_idle() -> None:
    with pytest.raises(EngineLoadError, match="this worker has 2 GPUs, and its engine uses one"):
        require_gpus(["GPU-1", "GPU-2"])


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)])
def test_gpus_that_torch_has_code_for(cuda: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    cuda.setattr(torch.cuda, "get_device_capability", lambda: capability)
    require_gpus(["GPU-1"])


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (11, 0)])
def test_gpus_that_torch_has_no_code_for(cuda: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    cuda.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(EngineLoadError, match=r"no kernels for NVIDIA H100.*built for sm_75, sm_80"):
        require_gpus(["GPU-1"])


@pytest.mark.parametrize(
    ("entry", "runs_on", "not_on"),
    [
        ("sm_90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("sm_100a", [(10, 0)], [(9, 0), (10, 3)]),
        ("compute_100a", [(10, 0)], [(10, 3), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_90", [(9, 0), (10, 3), (12, 1)], [(8, 9)]),
        ("gfx90a", [], [(9, 0)]),
    ],
)
def test_code_for_one_architecture_or_family_runs_on_no_other(
    cuda: pytest.MonkeyPatch, entry: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    cuda.setattr(torch.cuda, "get_arch_list", lambda: [entry])
    for capability in runs_on + not_on:
        cuda.setattr(torch.cuda, "get_device_capability", partial(tuple, capability))
        if capability in runs_on:
            require_gpus(["GPU-1"])
        else:
            with pytest.raises(EngineLoadError, match=f"it was built for {entry}"):
                require_gpus(["GPU-1"])


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_half_precision_is_what_the_gpu_computes_in(
    cuda: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    cuda.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert half_precision() is dtype
