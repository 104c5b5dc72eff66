"""The image store on a real Redis."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from protocol.image_store import ImageStore, ImageTooLarge, StoreFull, is_name
from protocol.names import Keys
from tests.deployment import RedisServer


@pytest.fixture
def new_store(redis_client: Any, keys: Keys) -> Callable[..., ImageStore]:
    def make(*, ttl_s: float = 60, capacity: int = 1000) -> ImageStore:
        return ImageStore(redis_client, keys, ttl_s, capacity)

    return make


def put(store: ImageStore, size: int) -> str:
    """Store an image of `size` bytes and return its name."""
    name = store.new_name()
    store.put(name, b"x" * size)
    return name


def test_an_image_is_returned_as_it_was_put(new_store):
    store = new_store()
    name = store.new_name()
    assert store.get(name) is None
    store.put(name, b"\x89PNG\x00\xff")
    assert store.get(name) == b"\x89PNG\x00\xff"


def test_names_are_random_and_other_names_are_refused(new_store):
    store = new_store()
    names = {store.new_name() for _ in range(100)}
    assert len(names) == 100 and all(is_name(name) for name in names)
    put(store, 5)
    for name in ("", "#sizes", "#expiry", "../x", "a" * 42, "a" * 43 + "\n", "é" * 43):
        assert store.get(name) is None
        with pytest.raises(ValueError, match="name"):
            store.put(name, b"x")


def test_the_oldest_images_are_removed_when_room_is_needed(new_store):
    store = new_store(capacity=1000)
    names = [put(store, 300) for _ in range(4)]
    assert [store.get(name) is not None for name in names] == [False, True, True, True]
    last = put(store, 700)
    assert [store.get(name) is not None for name in [*names, last]] == [False, False, False, True, True]


def test_an_image_larger_than_the_store_is_refused_and_none_is_removed(new_store):
    store = new_store(capacity=1000)
    name = put(store, 1000)
    with pytest.raises(ImageTooLarge):
        put(store, 1001)
    assert store.get(name) is not None


def test_putting_a_name_again_replaces_the_image_without_counting_it_twice(new_store):
    store = new_store(capacity=1000)
    name = put(store, 400)
    for _ in range(5):
        store.put(name, b"y" * 400)
    other = put(store, 600)
    assert store.get(name) == b"y" * 400 and store.get(other) is not None


def test_expired_images_are_not_counted(redis_client, keys, new_store):
    store = new_store(ttl_s=60, capacity=1000)
    kept = put(store, 500)
    expired = put(new_store(ttl_s=0.05), 100)
    give_up_at = time.monotonic() + 10
    while redis_client.exists(keys.image(expired)) and time.monotonic() < give_up_at:
        pass
    assert store.get(expired) is None
    added = put(store, 400)
    assert store.get(kept) is not None and store.get(added) is not None
    names = {kept.encode(), added.encode()}
    assert set(redis_client.zrange(keys.image_expiry, 0, -1)) == names
    assert set(redis_client.hkeys(keys.image_sizes)) == {*names, b"total"}


def test_every_key_has_the_prefix_and_a_ttl(redis_client, keys, new_store):
    store = new_store(ttl_s=60)
    for _ in range(3):
        put(store, 10)
    found = redis_client.keys(f"{keys.prefix}*")
    assert len(found) == 5
    assert all(key.startswith(f"{keys.prefix}image:".encode()) for key in found)
    assert all(0 < redis_client.pttl(key) <= 60_000 for key in found)


def test_many_writers_never_exceed_the_capacity(redis_client, keys, new_store):
    store = new_store(capacity=10_000)
    sizes = [100 + 37 * (i % 50) for i in range(200)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda size: put(store, size), sizes))
    stored = sum(redis_client.strlen(key) for key in redis_client.keys(keys.image("*")) if b"#" not in key)
    assert 10_000 - max(sizes) < stored <= 10_000
    assert int(redis_client.hget(keys.image_sizes, "total")) == stored


@pytest.fixture
def small_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of its own whose maxmemory is about 20 MB above what it uses."""
    server = RedisServer(tmp_path)
    server.start()
    used = server.client.info("memory")["used_memory"]
    server.client.config_set("maxmemory", used + 20_000_000)
    yield server
    server.stop()


def test_images_leave_a_share_of_the_memory_of_redis(small_redis, keys):
    store = ImageStore(small_redis.client, keys, ttl_s=60, capacity_bytes=2**30)
    names = [put(store, 1_000_000) for _ in range(40)]
    assert store.get(names[0]) is None and store.get(names[-1]) is not None
    memory = small_redis.client.info("memory")
    assert 0.5 < memory["used_memory"] / memory["maxmemory"] < 0.8
    small_redis.client.set("chat", b"x" * 2_000_000)


def fill(client: Any, size: int) -> list[str]:
    """Write other data of `size` bytes and return its keys."""
    names = [f"other{number}" for number in range(size // 100_000)]
    for name in names:
        client.set(name, b"x" * 100_000)
    return names


def test_images_give_way_to_other_data_and_are_refused_when_there_is_no_room(small_redis, keys):
    store = ImageStore(small_redis.client, keys, ttl_s=60, capacity_bytes=2**30)
    name = put(store, 1_000_000)
    others = fill(small_redis.client, 15_000_000)
    with pytest.raises(StoreFull):
        put(store, 1_000_000)
    assert store.get(name) is None
    small_redis.client.delete(*others)
    assert store.get(put(store, 1_000_000)) is not None


def test_a_full_redis_takes_an_image_in_place_of_older_ones(small_redis, keys):
    store = ImageStore(small_redis.client, keys, ttl_s=60, capacity_bytes=2**30)
    for _ in range(9):
        put(store, 1_000_000)
    small_redis.client.config_set("maxmemory", small_redis.client.info("memory")["used_memory"] // 2)
    name = store.new_name()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        small_redis.client.set("other", b"x")
    store.put(name, b"x" * 1000)
    assert store.get(name) is not None
    small_redis.client.set("other", b"x")
