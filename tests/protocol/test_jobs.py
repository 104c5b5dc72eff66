"""protocol.jobs: a job and its files as they are stored."""

from protocol import jobs
from protocol.jobs import ChatImage, ChatJob, ImageJob, SamplingParams


def test_the_images_of_a_chat_are_stored_beside_the_job():
    images = [ChatImage(data=b"one", detail="low", param="messages.0.content.1"), ChatImage(data=b"two")]
    job = ChatJob(id="r", model="m", messages=[], sampling=SamplingParams(), images=images)
    body, files = jobs.encode(job)
    assert sorted(files.values()) == [b"one", b"two"]
    assert b"one" not in body
    assert all(map(jobs.is_file, files))
    assert not any(map(jobs.is_file, ("body", "web", "work", "admitted", "deadline", "bytes")))
    assert jobs.decode(body, files) == job


def test_the_images_of_an_edit_are_stored_beside_the_job():
    job = ImageJob(id="r", model="m", task="edit", prompt="p", image=b"one", mask=b"two")
    body, files = jobs.encode(job)
    assert files == {"image": b"one", "mask": b"two"}
    assert all(map(jobs.is_file, files))
    assert jobs.decode(body, files) == job
