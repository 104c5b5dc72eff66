"""Sampling on a stand-in for a GPU: the CPU's tokens, one wait for the device a step, bounded memory."""

from functools import partial

import pytest
import torch

from tests.engines.sampling_cases import KINDS, masks_of, row_of
from tests.gpu_stand_ins import StandInGpu
from workers.engines.chat.sampling.sampler import Sampler, Samples
from workers.engines.chat.sequence import Sequence
from workers.engines.chat.step_executor import with_copies

LARGE = 128_256
MIB = 1 << 20


def advance(rows: list[Sequence], samples: Samples) -> None:
    for row, token in zip(rows, samples.tokens, strict=True):
        row.append(token)


def rows_of(kinds: list[str], count: int, vocabulary: int) -> list[Sequence]:
    return [row_of(kinds[slot % len(kinds)], slot, vocabulary) for slot in range(count)]


@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), list(KINDS)], ids=" ".join)
@torch.inference_mode()
def test_a_step_waits_once_and_gives_the_tokens_of_a_cpu(kinds):
    """Also a step with new rows, among them one in the slot of a row that has left."""
    torch.manual_seed(3)
    vocabulary, count, tokens = 1000, 64, 990
    rows, same = rows_of(kinds, count, vocabulary), rows_of(kinds, count, vocabulary)
    on_cpu = Sampler(vocabulary, count, torch.device("cpu"), tokens)
    with StandInGpu() as gpu:
        sampler = Sampler(vocabulary, count, torch.device("cuda"), tokens)
        for step in range(4):
            running = slice(0, 50) if step < 2 else slice(4, 64)
            if step == 3:
                rows[7], same[7] = (row_of(kinds[1 % len(kinds)], 7, vocabulary) for _ in range(2))
            logits = torch.randn(len(rows[running]), vocabulary) * 3
            on_gpu = logits.to("cuda")
            masks = masks_of(rows[running], vocabulary)
            cost = gpu.measure(partial(sampler.sample, on_gpu, rows[running], masks=masks))
            expected = on_cpu.sample(logits, same[running], masks=masks)
            assert len(cost.waits) == 1, cost.waits
            assert cost.result.tokens == expected.tokens
            assert cost.result.logprobs.keys() == expected.logprobs.keys()
            for place, logprobs in expected.logprobs.items():
                assert cost.result.logprobs[place].own == pytest.approx(logprobs.own, abs=1e-5)
                assert [token for token, _ in cost.result.logprobs[place].top] == [
                    token for token, _ in logprobs.top
                ]
            advance(rows[running], cost.result)
            advance(same[running], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "operations", "peak"),
    [
        ("greedy", 3, 32),
        ("temperature", 40, 96),
        ("all filters", 260, 132),
        ("mask", 60, 164),
        ("repetition penalty", 180, 164),
        ("logprobs of 20", 170, 164),
    ],
)
@torch.inference_mode()
def test_a_step_of_64_rows_and_a_large_vocabulary_stays_small(kind, operations, peak):
    """Operations cost a few microseconds each on the host. peak: MiB, 31 of them for the logits."""
    with StandInGpu() as gpu:
        sampler = Sampler(LARGE, 64, torch.device("cuda"))
        rows = rows_of([kind], 64, LARGE)
        logits = torch.randn(64, LARGE).to("cuda")
        for _ in range(2):
            masks = masks_of(rows, LARGE)
            cost = gpu.measure(partial(sampler.sample, logits, rows, masks=masks))
            advance(rows, cost.result)
        assert len(cost.waits) == 1
        assert cost.operations <= operations
        assert cost.peak_bytes <= peak * MIB


@torch.inference_mode()
def test_memory_beside_the_logits_does_not_grow_with_the_rows():
    peaks = []
    with StandInGpu() as gpu:
        for count in (64, 192):
            sampler = Sampler(LARGE, count, torch.device("cuda"))
            rows = rows_of(["all filters"], count, LARGE)
            logits = torch.zeros(count, LARGE, device="cuda")
            cost = gpu.measure(partial(sampler.sample, logits, rows))
            peaks.append(cost.peak_bytes - logits.nbytes)
            del logits, cost
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


@torch.inference_mode()
def test_the_logits_of_further_choices_are_copied_without_a_wait():
    with StandInGpu() as gpu:
        logits = torch.randn(3, 20)
        on_gpu = logits.to("cuda")
        cost = gpu.measure(partial(with_copies, on_gpu, [0, 2, 2]))
        assert cost.waits == [] and cost.operations == 1
        assert torch.equal(cost.result.cpu(), logits[[0, 1, 2, 0, 2, 2]])
