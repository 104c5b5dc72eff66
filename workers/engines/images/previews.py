"""The previews of one pipeline call: after which steps, and of which images."""

import logging
from collections.abc import Callable, Sequence

from PIL import Image

from workers.engines.failures import free_memory
from workers.engines.images.batches import BatchItem
from workers.engines.images.unfinished import UnfinishedImages

log = logging.getLogger(__name__)


class Previews:
    """Makes previews of the images whose requests ask for them; of the others nothing is decoded.

    `unfinished` is for the pipeline call; None if no request asks, or the pipeline has no previews.
    """

    def __init__(
        self,
        batch: Sequence[BatchItem],
        *,
        is_wanted: Callable[[BatchItem], bool],
        deliver: Callable[[BatchItem, int, Image.Image], None],
        passes_on: type[Exception],
    ) -> None:
        """`is_wanted`: whether the image's request is open. `deliver` gets the item, the number of its
        preview from 0, and the preview. `passes_on`: an exception inside the call that is meant for its
        caller.
        """
        self._batch = batch
        self._is_wanted = is_wanted
        self._deliver = deliver
        self._passes_on = passes_on
        asked = any(request.job.partial_images for request, _ in batch)
        first = batch[0].request
        self.unfinished: UnfinishedImages | None = first.pipeline.unfinished(first.shared) if asked else None

    def make_due(self, step: int, total: int) -> None:
        """Make the previews that are due after `step` (from 1) of `total`.

        If one fails, for want of memory perhaps, the call goes on without further previews.
        """
        for row, item in enumerate(self._batch):
            if (
                self.unfinished is not None
                and item.request.preview_is_due(item.image_index, step, total)
                and self._is_wanted(item)
            ):
                self._make(self.unfinished, row, item)

    def _make(self, unfinished: UnfinishedImages, row: int, item: BatchItem) -> None:
        try:
            image = unfinished.image(row)
        except self._passes_on:
            raise
        except Exception as error:
            # the type alone: the text may quote a prompt
            log.warning("a preview can't be made, the call goes on without: %s", type(error).__name__)
            self.unfinished = None
        else:
            if image is not None:
                self._deliver(item, item.request.count_preview(item.image_index), image)
            return
        # only now the frames of the error are gone, which hold tensors
        free_memory()
