"""The Celery message that queues one request, as kombu's Redis transport keeps it in a list.

Celery makes the message once for each queue; for a request only the id is put in. Publishing through Celery
costs a request more than all of the rest of its way into the queue, and it is a second command that can fail
by itself: the message goes into the list in the same script that admits the job (protocol/queue.py).
"""

import base64
import json
from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu import Connection

from protocol.names import GENERATE_TASK

PLACEHOLDER = "placeholder-of-the-request-id"
TAG = "placeholder-of-the-delivery-tag"


class TaskMessages:
    """Makes the messages of one Celery app. Knows no connection to Redis."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._templates: dict[str, tuple[bytes, str]] = {}

    def prepare(self, queues: Iterable[str]) -> None:
        """Make the templates now: the first takes Celery a tenth of a second, in which no other request is
        served."""
        for queue in queues:
            self._templates[queue] = self._template(queue)

    def make(self, request_id: str, queue: str, *, copy: int = 0) -> bytes:
        """Return the message for `queue` (Celery's name, without the namespace).

        kombu counts unacknowledged messages by their delivery tag, so each `copy` for one request has its
        own.
        """
        if queue not in self._templates:
            self._templates[queue] = self._template(queue)
        body, envelope = self._templates[queue]
        encoded = base64.b64encode(body.replace(PLACEHOLDER.encode(), request_id.encode())).decode()
        message = envelope.replace(PLACEHOLDER, request_id).replace(TAG, f"{request_id}.{copy}")
        return f'{{"body": "{encoded}", {message[1:]}'.encode()

    def _template(self, queue: str) -> tuple[bytes, str]:
        """The body, and the message around it as JSON."""
        message = self._captured(queue)
        message["properties"]["delivery_tag"] = TAG
        body = base64.b64decode(message.pop("body"))
        return body, json.dumps(message)

    def _captured(self, queue: str) -> dict[str, Any]:
        """What Celery sends, taken out of kombu's transport in memory, which has the same format."""
        with Connection("memory://") as connection:
            self._celery.send_task(
                GENERATE_TASK,
                args=[PLACEHOLDER],
                task_id=PLACEHOLDER,
                queue=queue,
                connection=connection,
                ignore_result=True,
                # there are no replies; without this Celery computes an address for each thread and keeps it
                reply_to="none",
            )
            channel: Any = connection.default_channel
            message: dict[str, Any] = channel._get(queue)
            return message
