"""The picture store on a real Redis."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from protocol.image_store import ImageStore, ImageTooLarge, is_name
from protocol.names import Keys


@pytest.fixture
def prefix(keys: Keys) -> str:
    return keys.prefix


@pytest.fixture
def store(redis_client: Any, prefix: str) -> Callable[..., ImageStore]:
    def make(*, ttl_s: float = 60, capacity: int = 1000) -> ImageStore:
        return ImageStore(redis_client, prefix, ttl_s, capacity)

    return make


def put(pictures: ImageStore, size: int) -> str:
    name = pictures.new_name()
    pictures.put(name, b"x" * size)
    return name


def test_what_was_put_is_there_until_deleted(store):
    pictures = store()
    name = pictures.new_name()
    pictures.put(name, b"\x89PNG\x00\xff")
    assert pictures.get(name) == b"\x89PNG\x00\xff"
    pictures.delete(name)
    pictures.delete(name)
    assert pictures.get(name) is None
    put(pictures, 1000)


def test_names_can_not_be_guessed_or_made_up(store):
    pictures = store()
    names = {pictures.new_name() for _ in range(100)}
    assert len(names) == 100 and all(is_name(name) for name in names)
    put(pictures, 5)
    for name in ("", "#sizes", "#expiry", "../x", "a" * 42, "a" * 43 + "\n", "é" * 43):
        assert pictures.get(name) is None
        with pytest.raises(ValueError, match="name"):
            pictures.put(name, b"x")


def test_the_oldest_go_when_room_is_needed(store):
    pictures = store(capacity=1000)
    names = [put(pictures, 300) for _ in range(4)]
    assert [pictures.get(name) is not None for name in names] == [False, True, True, True]
    last = put(pictures, 700)
    assert [pictures.get(name) is not None for name in [*names, last]] == [False, False, False, True, True]


def test_a_picture_larger_than_the_store_is_refused_and_nothing_goes(store):
    pictures = store(capacity=1000)
    name = put(pictures, 1000)
    with pytest.raises(ImageTooLarge):
        put(pictures, 1001)
    assert pictures.get(name) is not None


def test_putting_again_replaces_without_counting_twice(store):
    pictures = store(capacity=1000)
    name = put(pictures, 400)
    for _ in range(5):
        pictures.put(name, b"y" * 400)
    other = put(pictures, 600)
    assert pictures.get(name) == b"y" * 400 and pictures.get(other) is not None


def test_expired_pictures_are_not_counted(redis_client, prefix, store):
    pictures = store(ttl_s=60, capacity=1000)
    kept = put(pictures, 500)
    short = store(ttl_s=0.05)
    gone = put(short, 100)
    until = time.monotonic() + 10
    while redis_client.exists(f"{prefix}image:{gone}") and time.monotonic() < until:
        pass
    assert pictures.get(gone) is None
    newcomer = put(pictures, 400)
    assert pictures.get(kept) is not None and pictures.get(newcomer) is not None
    names = {kept.encode(), newcomer.encode()}
    assert set(redis_client.zrange(f"{prefix}image:#expiry", 0, -1)) == names
    assert set(redis_client.hkeys(f"{prefix}image:#sizes")) == {*names, b"total"}


def test_every_key_has_the_prefix_and_a_ttl(redis_client, prefix, store):
    pictures = store(ttl_s=60)
    for _ in range(3):
        put(pictures, 10)
    found = redis_client.keys(f"{prefix}*")
    assert len(found) == 5
    assert all(key.startswith(f"{prefix}image:".encode()) for key in found)
    assert all(0 < redis_client.pttl(key) <= 60_000 for key in found)


def test_many_writers_never_exceed_the_capacity(redis_client, prefix, store):
    pictures = store(capacity=10_000)

    def total() -> int:
        return sum(
            redis_client.strlen(key) for key in redis_client.keys(f"{prefix}image:*") if b"#" not in key
        )

    with ThreadPoolExecutor(8) as writers:
        names = list(writers.map(lambda size: put(pictures, size), [100 + 37 * (i % 50) for i in range(200)]))
    largest = 100 + 37 * 49
    assert 10_000 - largest < total() <= 10_000
    assert int(redis_client.hget(f"{prefix}image:#sizes", "total")) == total()
    for name in names:
        pictures.delete(name)
    assert int(redis_client.hget(f"{prefix}image:#sizes", "total")) == 0
