"""volseg's sliding window as a MONAI inferer, for MONAI code and bundles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_dst_type, fall_back_tuple
from torch import Tensor

from volseg.inference.windows import STEP, choose_axis, count_at_once, stream_scores


class SlidingWindow(Inferer):  # type: ignore[misc]
    """Gives what MONAI's `SlidingWindowInferer` with Gaussian weights gives.

    While the windows are blended it holds the sums of one window's extent along the longest axis,
    and not those of the whole volume with a map of the weights beside them.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        sw_batch_size: int | None = None,
        overlap: float = 1 - STEP,
        device: torch.device | None = None,
    ) -> None:
        """Keep how the windows lie.

        Args:
            roi_size: voxels per axis; one number for all, and -1 for the image's own.
            sw_batch_size: windows per call of the network; by default what suits the device.
            overlap: of neighbours, as a share of the window.
            device: where the windows are blended and the result lies; by default the images'.

        Raises:
            ValueError: an overlap below 0, or of 1 and more.
        """
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap {overlap}; expected from 0 to below 1.")
        self.roi_size, self.sw_batch_size = roi_size, sw_batch_size
        self.overlap, self.device = overlap, device

    @torch.no_grad()
    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Logits (B, K, *S) float32 of images (B, C, *S), with their metadata if they have any.

        Args:
            inputs: images.
            network: in eval mode; gets windows (b, C, *roi_size) and the other arguments.
            args: for the network.
            kwargs: for the network.
        """
        # Metadata of MONAI's tensors would follow every window through every operation.
        images = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs

        def score(windows: Tensor) -> Tensor:
            logits: Tensor = network(windows, *args, **kwargs)
            return logits.float()

        logits = torch.stack([self._segment(image, score) for image in images])
        result: Tensor = convert_to_dst_type(
            logits, inputs, dtype=logits.dtype, device=logits.device
        )[0]
        return result

    def _segment(self, image: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        window = fall_back_tuple(self.roi_size, image.shape[1:])
        axis = choose_axis(image.shape[1:], window)
        parts = stream_scores(
            score,
            image,
            window,
            step=1 - self.overlap,
            at_once=self.sw_batch_size or count_at_once(window, image.device),
            axis=axis,
            device=self.device or image.device,
        )
        whole, done = torch.empty(0), 0
        for part in parts:
            if not done:
                whole = part.new_empty((len(part), *image.shape[1:]))
            size = part.shape[axis + 1]
            whole.narrow(axis + 1, done, size).copy_(part)
            done += size
        return whole
