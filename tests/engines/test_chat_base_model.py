"""Models for completions alone: without a chat template, and language models inside those that take
images."""

from pathlib import Path

import pytest

from catalogue import ChatModelEntry, TextModelEntry
from protocol.jobs import CompletionJob, SamplingParams
from tests.engines.tiny_chat import CONFIGS, Collector, save_model
from tests.engines.tiny_vision import FAMILIES
from workers.engines.base import EngineLoadError
from workers.engines.chat import ChatEngine


def fields(weights: Path, task: str) -> dict[str, object]:
    return {"name": "base", "tasks": [task], "weights": str(weights), "engine": {"torch_threads": 1}}


def test_a_chat_model_without_a_template_is_refused_with_the_task_that_serves_it(tmp_path: Path) -> None:
    weights = save_model(tmp_path, CONFIGS["llama"]())
    (weights / "chat_template.jinja").unlink()
    engine = ChatEngine(ChatModelEntry.model_validate(fields(weights, "chat")))
    with pytest.raises(
        EngineLoadError, match=r'no chat template; with tasks = \["completion"\] it serves /v1'
    ):
        engine.load(Collector())
    engine.close()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_model_for_images_continues_prompts(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = FAMILIES[family].save(tmp_path)
    (weights / "chat_template.jinja").unlink()
    engine, collector = (
        ChatEngine(TextModelEntry.model_validate(fields(weights, "completion"))),
        Collector(),
    )
    engine.load(collector)
    try:
        assert not engine.status().takes_images and "takes no images" not in caplog.text
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        engine.submit(CompletionJob(id="one", model="base", prompt="Hello", sampling=sampling))
        assert collector.result("one").usage.completion_tokens == 4
    finally:
        engine.close()
