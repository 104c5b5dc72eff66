"""What becomes of the events of an engine before they are sent: images go into the store."""

from typing import Any

from protocol.events import Failed, Finished, ImagePreview, ImageReady
from protocol.image_store import ImageStore
from protocol.names import Keys
from workers.image_keeper import PREVIEW_TTL_S, keep_image


def test_an_image_is_stored_and_its_event_has_a_name_instead(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=1000)
    sent = keep_image(store, ImageReady(index=2, seed=7, width=64, height=32, png=b"PNG"))
    assert isinstance(sent, ImageReady) and store.get(sent.name) == b"PNG"
    assert sent == ImageReady(index=2, seed=7, width=64, height=32, name=sent.name)
    assert keep_image(store, sent) is sent


def test_an_image_larger_than_the_store_fails_its_request(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=10)
    sent = keep_image(store, ImageReady(index=0, seed=7, width=64, height=32, png=b"x" * 11))
    assert isinstance(sent, Failed) and sent.code == "engine_error" and "smaller" in sent.message


def test_a_store_without_memory_fails_the_request_for_a_while(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=1000)
    used = redis_client.info("memory")["used_memory"]
    redis_client.config_set("maxmemory", int(used * 1.1))
    try:
        sent = keep_image(store, ImageReady(index=0, seed=7, width=64, height=32, png=b"x"))
    finally:
        redis_client.config_set("maxmemory", 0)
    assert isinstance(sent, Failed) and sent.code == "overloaded"


def test_other_events_are_not_changed(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=10)
    event = Finished()
    assert keep_image(store, event) is event


def test_a_preview_is_stored_for_a_short_time(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=3600, capacity_bytes=1000)
    sent = keep_image(store, ImagePreview(index=1, number=2, width=64, height=32, jpeg=b"JPEG"))
    assert isinstance(sent, ImagePreview) and store.get(sent.name) == b"JPEG"
    assert sent == ImagePreview(index=1, number=2, width=64, height=32, name=sent.name)
    assert redis_client.ttl(keys.image(sent.name)) <= PREVIEW_TTL_S
    assert keep_image(store, sent) is sent


def test_a_preview_makes_room_before_the_images_do(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=3600, capacity_bytes=25)
    image = keep_image(store, ImageReady(index=0, seed=7, width=64, height=32, png=b"x" * 10))
    first, second = (
        keep_image(store, ImagePreview(index=0, number=number, width=64, height=32, jpeg=b"x" * 10))
        for number in range(2)
    )
    assert isinstance(image, ImageReady) and store.get(image.name)
    assert isinstance(first, ImagePreview) and store.get(first.name) is None
    assert isinstance(second, ImagePreview) and store.get(second.name)


def test_a_preview_without_room_fails_nothing(redis_client: Any, keys: Keys) -> None:
    store = ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=10)
    sent = keep_image(store, ImagePreview(index=0, number=0, width=64, height=32, jpeg=b"x" * 11))
    assert sent == ImagePreview(index=0, number=0, width=64, height=32)
