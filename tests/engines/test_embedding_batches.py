"""The choice of the inputs of a pass."""

import random

from tests.engines.tiny_embedding import job
from workers.engines.embedding.batches import BatchQueue, Item, Request


def request(name: str, *lengths: int) -> Request:
    return Request(job(name, *["x"] * len(lengths)), [[0] * length for length in lengths], 8)


def lengths(batch: list[Item]) -> list[int]:
    return [item.length for item in batch]


def test_inputs_of_similar_length_go_together() -> None:
    queue = BatchQueue(1000, pass_cost=10)
    queue.add(request("a", 200, 40, 190, 45, 8, 195))
    assert [lengths(queue.next_batch()) for _ in range(3)] == [[190, 195, 200], [40, 45], [8]]
    assert queue.next_batch() == [] and len(queue) == 0


def test_padding_is_accepted_where_another_pass_would_cost_more() -> None:
    for pass_cost, expected in ((10, [[80, 100], [70]]), (25, [[70, 80, 100]]), (0, [[100], [80], [70]])):
        queue = BatchQueue(1000, pass_cost)
        queue.add(request("a", 70, 100, 80))
        found = []
        while batch := queue.next_batch():
            found.append(lengths(batch))
        assert found == expected, pass_cost


def test_longer_inputs_of_others_are_added_too() -> None:
    queue = BatchQueue(1000, pass_cost=10)
    queue.add(request("a", 10))
    queue.add(request("b", 18, 12, 40))
    assert lengths(queue.next_batch()) == [10, 12, 18]


def test_an_input_above_the_bound_has_a_pass_of_its_own() -> None:
    queue = BatchQueue(100)
    queue.add(request("a", 150, 140))
    assert [lengths(queue.next_batch()) for _ in range(3)] == [[150], [140], []]


def test_requests_take_turns() -> None:
    queue = BatchQueue(100)
    queue.add(request("large", *[100] * 50))
    queue.add(request("small", 10))
    queue.add(request("other", 50, 50, 50))
    order = [{item.request.job.id for item in queue.next_batch()} for _ in range(4)]
    assert order == [{"large"}, {"small"}, {"other"}, {"large"}]


def test_what_is_discarded_is_in_no_pass() -> None:
    queue = BatchQueue(100, pass_cost=20)
    kept, gone = request("kept", 10, 20), request("gone", 10, 20, 30)
    queue.add(gone)
    queue.add(kept)
    queue.discard(gone.job)
    assert {item.request for item in queue.next_batch()} == {kept}
    assert queue.next_batch() == []


def test_each_input_is_in_exactly_one_pass_and_padding_is_bounded() -> None:
    draw = random.Random(1)
    queue = BatchQueue(512, pass_cost=20)
    requests = [
        request(str(n), *(draw.randint(1, 400) for _ in range(draw.randint(1, 60)))) for n in range(30)
    ]
    for one in requests:
        queue.add(one)
    seen: list[Item] = []
    while batch := queue.next_batch():
        longest = max(lengths(batch))
        assert len(batch) == 1 or len(batch) * longest <= 512
        assert len(batch) * longest - sum(lengths(batch)) <= 40
        seen += batch
    assert len(seen) == len(set(seen)) == sum(len(one.items) for one in requests)
