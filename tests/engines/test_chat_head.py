"""The product that gives the logits, in blocks, into memory that is kept."""

import resource
import threading

import pytest
import torch

from tests.engines.test_chat_forward import built
from tests.engines.test_chat_split import split_runner
from tests.engines.tiny_chat import CONFIGS, save_model
from workers.engines.chat.model import head as head_module
from workers.engines.chat.model.fused_decoder import FusedDecoder
from workers.engines.chat.model.head import KEPT, Head
from workers.engines.chat.sequence import Chunk


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_give_the_whole_product(
    dtype: torch.dtype, with_bias: bool, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "BLOCK", 100)
    torch.manual_seed(1)
    weight, x = torch.randn(250, 16).to(dtype), torch.randn(5, 16).to(dtype)
    bias = torch.randn(250).to(dtype) if with_bias else None
    out = torch.full((5, 250), torch.nan) if given else None
    logits = Head(weight, bias, torch.float32)(x, out)
    assert logits.dtype == torch.float32
    assert out is None or logits is out
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    torch.testing.assert_close(logits, expected, rtol=2**-7, atol=2**-5 if dtype != torch.float32 else 1e-5)


def test_memory_is_kept_up_to_a_bound() -> None:
    head = Head(torch.randn(128 * 1024, 4), None, torch.float32)
    one, other = head(torch.randn(7, 4), None), head(torch.randn(3, 4), None)
    assert one.data_ptr() == other.data_ptr() == head.room(1).data_ptr()
    most = KEPT // (4 * 128 * 1024)
    assert head.room(most).data_ptr() == one.data_ptr()
    assert head.room(most + 1).data_ptr() != one.data_ptr()
    assert head.room(most + 1).shape == (most + 1, 128 * 1024)


def test_a_step_waits_for_no_new_pages() -> None:
    """In a thread, as an engine's: there the allocator gives more memory back to the system."""
    head, x = Head(torch.randn(128 * 1024, 8), None, torch.float32), torch.randn(72, 8)
    pages = []

    def steps() -> None:
        for _ in range(6):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            head(x, None)
            pages.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    # the logits have 9,216 pages of 4 KiB, and one block of them 1,152
    assert sum(pages[1:]) < 5 * 9216 // 2


def test_both_halves_of_a_step_write_to_one_memory(tmp_path) -> None:
    parts = built(save_model(tmp_path, CONFIGS["llama"]()), torch_threads=2)
    runner = split_runner(parts)
    decoder = runner._first.model_forward
    assert isinstance(decoder, FusedDecoder)
    chunks = []
    for tokens in ([5], [7], [3, 4, 9], [8, 2]):
        slot = parts.cache.take_slot()
        parts.cache.grow(slot, len(tokens))
        chunks.append(Chunk(slot, 0, tokens, tokens != [7], len(tokens) == 3))
    try:
        logits = runner.forward(chunks)
        assert len(logits) == sum(chunk.logit_rows for chunk in chunks) == 5
        assert logits.data_ptr() == decoder.head.room(5).data_ptr()
        together = logits.clone()
        alone = [runner._first.forward([chunk]).clone() for chunk in chunks if chunk.logit_rows]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    finally:
        parts.free()
