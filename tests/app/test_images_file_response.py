"""Image links are read from a real Redis in pieces."""

from typing import Any

import pytest

from app.http.connection import Connection
from app.images import file_response
from app.images.file_response import image_file_response
from protocol.image_store import ImageStore
from protocol.names import Keys

PNG = bytes(range(256)) * 5


@pytest.fixture
def store(redis_client: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    monkeypatch.setattr(file_response, "PIECE_BYTES", 500)
    return ImageStore(redis_client, keys, ttl_s=60, capacity_bytes=10_000)


def put(store: ImageStore) -> str:
    name = store.new_name()
    store.put(name, PNG)
    return name


def test_an_image_is_sent_in_pieces(store: ImageStore) -> None:
    response = image_file_response(store, put(store), Connection({}))
    assert response is not None and response.content_length == len(PNG)
    pieces = list(response.iter_encoded())
    assert [len(piece) for piece in pieces] == [500, 500, 280] and b"".join(pieces) == PNG


@pytest.mark.parametrize("name", ["a" * 43, "#sizes", "../x"])
def test_there_is_no_response_for_an_unknown_name(store: ImageStore, name: str) -> None:
    assert image_file_response(store, name, Connection({})) is None


def test_an_image_that_expires_while_it_is_sent_breaks_the_connection(
    store: ImageStore, redis_client: Any, keys: Keys
) -> None:
    name = put(store)
    response = image_file_response(store, name, Connection({}))
    assert response is not None
    pieces = response.iter_encoded()
    assert next(pieces) == PNG[:500]
    redis_client.delete(keys.image(name))
    with pytest.raises(ConnectionResetError):
        next(pieces)
