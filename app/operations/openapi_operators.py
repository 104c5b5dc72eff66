"""The JSON schemas of what the endpoints for operators and the lists of models answer, for GET
/openapi.json."""

from typing import Any

from app.dispatch.activity import GROWTH, SAMPLE_S
from app.operations.openapi_parts import INTEGER, NULLABLE_STRING, STRING, array, object_of
from catalogue import TASKS

_BOOLEAN = {"type": "boolean"}
_NULLABLE_INTEGER = {"type": ["integer", "null"]}


def operators_schemas() -> dict[str, Any]:
    """Return the schemas by name."""
    status = {"code": {"const": 0}, "message": STRING}
    details = {
        "redis": {**STRING, "description": "ok, unreachable, or refuses writes: and the reason"},
        "models_without_worker": array(STRING),
        "master_pid": INTEGER,
        "warnings": array(STRING),
    }
    return {
        "Health": object_of({**status, "serves": _BOOLEAN}, required=list(status)),
        "Readiness": object_of(
            {"code": {"enum": [0, 503]}, "message": STRING, **details}, required=["code", "message"]
        ),
        "Version": object_of({"version": STRING}),
        "Model": object_of(status | _model()),
        "Models": object_of(
            {**status, "project": STRING, "object": {"const": "list"}, "data": array(object_of(_model()))}
        ),
        "Workers": object_of({**status, "data": array(object_of(_worker()))}),
        "Drain": object_of({**status, "data": object_of({"name": STRING, "under_drain": _BOOLEAN})}),
        "Activity": object_of(status | _activity()),
    }


def _model() -> dict[str, Any]:
    return {
        **dict.fromkeys(("model", "url", "id", "owned_by"), STRING),
        "object": {"const": "model"},
        "created": INTEGER,
        "task": {"enum": list(TASKS)},
        "endpoints": {"type": "object", "additionalProperties": STRING},
        "max_model_len": {
            "type": ["integer", "null"],
            "description": "tokens of prompt and answer together, or of an input; the least of the ready workers; "
            "null while there is none, and for image models",
        },
        "input_modalities": {
            **array({"enum": ["text", "image"]}),
            "description": "what requests may contain. Of a chat model the workers tell it once they have loaded it",
        },
    }


def _worker() -> dict[str, Any]:
    return {
        **dict.fromkeys(("name", "cid", "model", "host", "last_error"), STRING),
        **dict.fromkeys(("pid", "running", "slots", "steps"), INTEGER),
        "tasks": array(STRING),
        "gpus": array(STRING),
        "state": {
            **STRING,
            "description": "loading, ready, draining, drained or lost; newer versions may have others",
        },
        "registered": {
            "type": ["boolean", "null"],
            "description": "whether the node has the worker in its list; null for tasks that it does not know",
        },
        "kv_cache_usage": {
            "type": ["number", "null"],
            "description": "part of the KV cache that running chats hold, 0 to 1; null without a cache",
        },
        "gpu": {
            **object_of(
                {
                    "memory_used_bytes": INTEGER,
                    "memory_total_bytes": INTEGER,
                    "utilization": {"type": ["number", "null"], "description": "0 to 1"},
                    "temperature_c": {"type": ["integer", "null"]},
                }
            ),
            "type": ["object", "null"],
            "description": "what the driver tells of the GPU; null on the CPU, and while it does not answer",
        },
    }


def _activity() -> dict[str, Any]:
    times = {
        "type": "object",
        "additionalProperties": INTEGER,
        "description": f"requests by time to first token: by the upper bound of a class in ms, whose lower bound "
        f"is a {GROWTH:g}th of it",
    }
    of_model = object_of({"waiting": INTEGER, "running": INTEGER, "first_token_ms": times})
    sample = object_of({"at": INTEGER, "models": {"type": "object", "additionalProperties": of_model}})
    ended = object_of(
        {
            **dict.fromkeys(("id", "model", "route", "outcome"), STRING),
            **dict.fromkeys(("status", "total_ms"), INTEGER),
            **dict.fromkeys(("queued_ms", "first_token_ms", "images"), _NULLABLE_INTEGER),
            **dict.fromkeys(("prompt_tokens", "completion_tokens"), _NULLABLE_INTEGER),
            "cid": {**NULLABLE_STRING, "description": "the worker that had claimed it"},
            "ended_at": {"type": "number"},
        }
    )
    return {
        "now": {"type": "number", "description": "seconds, by the clock of Redis, as all times here"},
        "cursor": {**STRING, "description": "as `after` of the next call it asks for what is new"},
        "queues": array(object_of({"model": STRING, "waiting": INTEGER, "running": INTEGER})),
        "samples": {
            **array(sample),
            "description": f"{SAMPLE_S} s each from `at` on; numbers of requests are the largest in that time",
        },
        "requests": {**array(ended), "description": "the newest first"},
        "under_drain": {**array(STRING), "description": "names of workers, running or not"},
    }
