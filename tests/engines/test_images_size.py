"""The size of a result: derived sides, and the limits of the model held against what follows."""

import pytest

from catalogue import ImageEngineOptions
from protocol.errors import InvalidRequest
from tests.engines.tiny_images import job
from workers.engines.images.size import edit_size, generation_size, size_problem

LIMITS = ImageEngineOptions(max_side=2048, max_pixels=1_048_576)


@pytest.mark.parametrize(
    ("source", "fields", "expected"),
    [
        ((100, 100), {}, (64, 64)),
        ((200, 50), {}, (128, 32)),
        ((4000, 3000), {}, (72, 56)),
        ((3, 3), {}, (64, 64)),
        ((100, 50), {"width": 64}, (64, 32)),
        ((100, 50), {"height": 64}, (128, 64)),
        ((1, 500), {"width": 64, "height": 64}, (64, 64)),
    ],
)
def test_an_edit_keeps_the_proportions_of_its_source(source, fields, expected):
    assert edit_size(job("j", image=b"", **fields), source, 64, LIMITS) == expected


@pytest.mark.parametrize(
    ("source", "default", "expected"),
    [
        ((1, 4096), 64, (8, 2048)),
        ((4096, 1), 64, (2048, 8)),
        ((1, 500), 1024, (48, 2048)),
        ((1001, 999), 1024, (1024, 1024)),
    ],
)
def test_a_size_that_nobody_asked_for_stays_within_the_limits(source, default, expected):
    size = edit_size(job("j", image=b""), source, default, LIMITS)
    assert size == expected and size_problem(size, LIMITS) is None


@pytest.mark.parametrize(
    ("source", "fields", "param", "word"),
    [
        ((1, 500), {"width": 64}, "width", "64x32000"),
        ((500, 1), {"height": 64}, "height", "32000x64"),
        ((1, 2), {"width": 1024}, "width", "2097152 pixels"),
        ((50, 50), {"width": 1032, "height": 1024}, "width", "at most 1048576"),
        ((50, 50), {"width": 4096, "height": 8}, "width", "from 8 to 2048"),
    ],
)
def test_an_edit_beyond_the_limits_is_refused(source, fields, param, word):
    with pytest.raises(InvalidRequest, match=word) as caught:
        edit_size(job("j", image=b"", **fields), source, 64, LIMITS)
    assert caught.value.param == param


def test_a_generation_of_which_one_side_is_given_is_judged_with_the_default_of_the_other():
    assert generation_size(job("j", width=1024), 1024, LIMITS) == (1024, 1024)
    with pytest.raises(InvalidRequest, match="1024x2048 has 2097152 pixels") as caught:
        generation_size(job("j", height=2048), 1024, LIMITS)
    assert caught.value.param == "height"
