"""Operations of a pipeline call: each is observed, and large attention runs in pieces with the same
result."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.engines.images import operations
from workers.engines.images.operations import ObservedOperations


def test_each_operation_is_observed_and_an_exception_ends_the_call():
    seen: list[None] = []
    with ObservedOperations(lambda: seen.append(None)):
        (torch.ones(2) + 1).relu()
    assert len(seen) == 3

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError), ObservedOperations(stop):
        torch.ones(2)


@pytest.mark.parametrize("mask", [None, (1, 1, 1, 40), (2, 1, 50, 40)], ids=["none", "keys", "both"])
def test_attention_in_pieces_has_the_same_result_and_is_observed(monkeypatch, mask):
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 40, 8)
    attn_mask = None if mask is None else torch.rand(mask) > 0.3
    whole = scaled_dot_product_attention(query, key, key, attn_mask=attn_mask, scale=0.5)
    monkeypatch.setattr(operations, "_PIECE", 2 * 3 * 40 * 7)
    seen: list[None] = []
    with ObservedOperations(lambda: seen.append(None)):
        pieces = scaled_dot_product_attention(query, key, key, attn_mask=attn_mask, scale=0.5)
    torch.testing.assert_close(pieces, whole)
    assert len(seen) > 8


def test_causal_attention_is_left_whole(monkeypatch):
    monkeypatch.setattr(operations, "_PIECE", 1)
    query = torch.randn(1, 1, 6, 4)
    expected = scaled_dot_product_attention(query, query, query, is_causal=True)
    with ObservedOperations(lambda: None):
        assert (scaled_dot_product_attention(query, query, query, is_causal=True) == expected).all()
