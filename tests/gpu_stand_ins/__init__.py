"""A GPU for tests on a machine without one. It computes on the CPU what is asked of device "cuda".

    with StandInGpu() as gpu:
        logits = torch.randn(64, 512).to("cuda")
        cost = gpu.measure(lambda: sampler.sample(logits, rows))
    assert len(cost.waits) == 1 and cost.operations < 100 and cost.peak_bytes < 2**24

The results are real; how long a GPU would take can't be told from it. docs/testing.md says what is counted.
"""

from tests.gpu_stand_ins.gpu import Cost, StandInGpu

__all__ = ["Cost", "StandInGpu"]
