"""Measures speculative decoding at one stream: python -m benchmarks.speculation

SmolLM2-135M writes texts that repeat parts of their prompts, with drafts (`num_speculative_tokens`) and
without, in turns in one process; greedy, so the texts are the same. Prints tokens/s and the ratio of each
round.
"""

import argparse
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence

from benchmarks.chat import SMOLLM2
from catalogue import ChatModelEntry
from protocol.events import Delta, Event, is_terminal
from protocol.jobs import ChatJob, SamplingParams
from tests.deployment import ROOT
from workers.engines.chat import ChatEngine

CODE = '''def area(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("negative size")
    return width * height


def volume(width, height, depth):
    """Return the volume of a box."""
    if depth < 0:
        raise ValueError("negative depth")
    return area(width, height) * depth
'''
REPORT = (
    "The harbour of the small town was rebuilt in 1921, after the storm of the winter before. The new pier is 310"
    " metres long, has room for forty fishing boats, and ends at a lighthouse of grey stone."
)
PROMPTS = (
    f"Write this Python code again, with the name area changed to surface:\n\n{CODE}",
    f"Copy the following text word for word:\n\n{REPORT}",
    f"Summarize in one sentence, using the words of the text:\n\n{REPORT}",
)


class Stream:
    """Waits for the events of one request at a time."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.tokens = 0
        self.text = ""

    def __call__(self, events: Sequence[tuple[str, Event]]) -> None:
        for _, event in events:
            if isinstance(event, Delta):
                self.tokens += event.tokens
                self.text += event.text
            if is_terminal(event):
                self._done.set()

    def wait(self) -> None:
        if not self._done.wait(300):
            raise TimeoutError("the engine made no progress for 300 s")
        self._done.clear()


class Contender:
    """An engine with a number of drafts."""

    def __init__(self, drafts: int) -> None:
        # in bfloat16 rounding depends on the number of rows, and may change a text
        options = {
            "num_speculative_tokens": drafts,
            "prefix_cache": False,
            "kv_cache_tokens": 4096,
            "dtype": "float32",
        }
        entry = {"name": "m", "tasks": ["chat"], "weights": str(SMOLLM2), "engine": options}
        self.engine = ChatEngine(ChatModelEntry.model_validate(entry))
        self._stream = Stream()
        self.engine.load(self._stream)
        self._serial = 0

    def write(self, prompt: str) -> tuple[float, str]:
        """Return tokens/s and the text."""
        self._serial += 1
        self._stream.tokens, self._stream.text = 0, ""
        params = SamplingParams(temperature=0.0, max_tokens=160)
        messages = [{"role": "user", "content": prompt}]
        began = time.perf_counter()
        self.engine.submit(ChatJob(id=str(self._serial), model="m", messages=messages, sampling=params))
        self._stream.wait()
        return self._stream.tokens / (time.perf_counter() - began), self._stream.text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drafts", type=int, default=8)
    options = parser.parse_args()
    subprocess.run([ROOT / "scripts" / "fetch-smollm2"], check=True)
    without, with_drafts = Contender(0), Contender(options.drafts)
    for prompt in PROMPTS:
        rounds = [(without.write(prompt), with_drafts.write(prompt)) for _ in range(options.rounds)]
        assert all(plain[1] == drafted[1] for plain, drafted in rounds), "the texts differ"
        speeds = [statistics.median(pair[at][0] for pair in rounds) for at in (0, 1)]
        ratio = statistics.median(drafted[0] / plain[0] for plain, drafted in rounds)
        print(
            f"{prompt.splitlines()[0][:60]:62} {speeds[0]:6.1f} {speeds[1]:6.1f} tokens/s, ratio {ratio:.2f}"
        )
    metrics = with_drafts.engine.metrics
    print(f"{metrics.accepted_drafts} of {metrics.drafts} drafts were right")


if __name__ == "__main__":
    main()
