"""The stand-in for a GPU: results are real, and what makes a host wait is counted."""

import gc

import numpy as np
import pytest
import torch

from tests.gpu_stand_ins import StandInGpu

WAITS = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 3).any()),
    "numpy": lambda x: x.cpu().numpy(),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 3],
    "a list as index": lambda x: x[[0, 2]],
    "torch.tensor": lambda x: torch.tensor([1, 2], device="cuda"),
    "an array": lambda x: torch.from_numpy(np.ones(4)).to("cuda"),
    "not pinned": lambda x: torch.ones(4).to("cuda", non_blocking=True),
    "pinned, but blocking": lambda x: torch.ones(4).pin_memory().to("cuda"),
    "copy_ to the host": lambda x: torch.zeros(3, 4).copy_(x),
}
DOES_NOT_WAIT = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1).sum(),
    "in place": lambda x: x.add_(1)[:, 1:].mul_(2),
    "made there": lambda x: torch.arange(3, device="cuda") + torch.zeros_like(x[0, :3]),
    "a tensor as index": lambda x: x[x[:, 0].argsort()],
    "pinned": lambda x: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
    "made in pinned memory": lambda x: torch.ones(4, pin_memory=True).to("cuda", non_blocking=True),
    "copy_ from pinned memory": lambda x: x.copy_(torch.ones(3, 4).pin_memory(), non_blocking=True),
}


def numbers() -> torch.Tensor:
    return torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", WAITS)
def test_what_waits_is_counted_once_with_its_line(kind, inference):
    with torch.inference_mode(inference), StandInGpu() as gpu:
        x = numbers().to("cuda")
        cost = gpu.measure(lambda: WAITS[kind](x))
        assert len(cost.waits) == 1 and cost.waits[0].startswith("test_gpu_stand_ins.py:"), cost.waits


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", DOES_NOT_WAIT)
def test_what_does_not_wait_has_the_result_of_a_cpu(kind, inference):
    with torch.inference_mode(inference), StandInGpu() as gpu:
        x = numbers().to("cuda")
        cost = gpu.measure(lambda: DOES_NOT_WAIT[kind](x))
        assert cost.waits == [] and cost.operations >= 1 and cost.result.device.type == "cuda"
        found = cost.result.tolist()
        if "pinned" not in kind and kind != "made there":
            assert found == DOES_NOT_WAIT[kind](numbers()).tolist()


def test_views_are_no_operations_and_share_their_memory():
    with StandInGpu() as gpu:
        x = numbers().to("cuda")
        cost = gpu.measure(lambda: x[1].view(2, 2).T)
        assert (cost.operations, cost.waits) == (0, [])
        cost.result.fill_(0)
        assert x.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [8, 9, 10, 11]]


def test_inference_mode_may_change_an_ordinary_tensor():
    with StandInGpu():
        x = numbers().to("cuda")
        with torch.inference_mode():
            x[1, [0, 2]] = -1
        assert x.tolist()[1] == [-1, 5, -1, 7]


def test_devices_can_not_be_mixed():
    with StandInGpu():
        x = numbers().to("cuda")
        assert (x + torch.tensor(1.0)).tolist() == (numbers() + 1).tolist()
        with pytest.raises(RuntimeError, match="same device"):
            x + numbers()


def test_the_peak_counts_what_lives_at_once():
    with StandInGpu() as gpu:
        x = torch.zeros(1000, device="cuda")

        def one_after_another() -> None:
            for _ in range(5):
                x + 1

        def all_at_once() -> list[torch.Tensor]:
            return [x + 1 for _ in range(5)]

        gc.collect()
        assert gpu.measure(one_after_another).peak_bytes == 2 * 4000
        assert gpu.measure(all_at_once).peak_bytes == 6 * 4000
        assert gpu.measure(lambda: None).peak_bytes == 4000


def test_afterwards_there_is_no_gpu():
    with StandInGpu():
        x = numbers().to("cuda")
    with pytest.raises(RuntimeError, match="inside"):
        x + 1
