"""R-CNN feature mimicking for PyTorch: the branch that `dcn_np.torch` trains beside a detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import messages
from ._torch_regions import feature_mimic_loss, roi_align
from .geometry import checked_whole
from .roi_geometry import check_rois_shape, checked_real

# By the class of a region: above 0 objects, 0 the background, below 0 what a detector ignores.
_REGIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "foreground": lambda labels: labels > 0,
    "background": lambda labels: labels == 0,
    "both": lambda labels: labels >= 0,
}


def sample_regions(
    rois: Tensor,
    labels: Tensor,
    per_image: int = 32,
    regions: str = "foreground",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose, at random and without replacement, the regions of each image that mimicking looks at.

    Parameters
    ----------
    rois : Tensor, shape (R, 5)
        Index of the image, x1, y1, x2, y2 of each region.
    labels : Tensor of integers, shape (R,)
        The class of each region: 0 is the background; what is below 0 is never chosen.
    per_image : int
        How many of an image are chosen at most: all of them, if there are no more.
    regions : {"foreground", "background", "both"}
        Which are chosen from. The paper found the foreground alone to be best (its Table 3).
    generator : torch.Generator or None
        Where random numbers are from; None is the generator that ``torch.manual_seed`` sets.

    Returns
    -------
    Tensor of int64, shape (chosen,)
        The indices of the chosen regions, ascending. The same state of the generator gives the same ones.

    Raises
    ------
    TypeError
        `labels` are no integers, or `per_image` is none.
    ValueError
        Shapes that do not fit, an index that no image can have, `per_image` below 1, or other `regions`.

    See Also
    --------
    FeatureMimicking : What the regions are chosen for.
    """
    _check_labels(rois, labels)
    image = rois[:, 0]
    wrong = (image < 0) | (image != image.floor())
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"rois[{first}] begins with {image[first]:g}; wanted the whole index of an image")
    most = checked_whole("per_image", per_image)
    if regions not in _REGIONS:
        raise ValueError(f"regions is {messages.shown(regions)}; wanted {messages.listed(list(_REGIONS))}")
    candidates = _REGIONS[regions](labels).nonzero()[:, 0]
    device = "cpu" if generator is None else generator.device
    order = torch.randperm(len(candidates), generator=generator, device=device)
    shuffled = candidates[order.to(candidates.device)]
    of_image = image[shuffled]
    chosen = [shuffled[of_image == index][:most] for index in of_image.unique()]
    return torch.cat([shuffled[:0], *chosen]).sort().values


def crop_regions(images: Tensor, rois: Tensor, size: int = 224) -> tuple[Tensor, Tensor]:
    """Cut regions out of their images, and resize each to `size` x `size` pixels.

    Parameters
    ----------
    images : Tensor, shape (batch, channels, height, width)
        As the detector's backbone takes them. They get a gradient if they require one.
    rois : Tensor, shape (R, 5)
        Index of the image, x1, y1, x2, y2 of each region, in pixels of `images`.
    size : int
        Height and width of a crop.

    Returns
    -------
    crops : Tensor, shape (R, channels, size, size)
        In the dtype of `images`, under autocast in that of autocast.
    crop_rois : Tensor, shape (R, 5)
        The whole of each crop as the one region in it, (index, 0, 0, size, size), in the dtype of `rois` but
        at least in float32.

    Raises
    ------
    TypeError
        `images` or `rois` in a dtype that is not computed, or on a GPU, or `size` is no integer.
    ValueError
        Shapes that do not fit, an image that is not there, a region that is not finite, `size` below 1.

    See Also
    --------
    roi_align : Does the work.

    Notes
    -----
    Pixel (i, j) of a crop is one sample, interpolated linearly in the image at x1 + (j + 1/2) * (x2 - x1) /
    size and likewise for y, where pixel 0 of the image reaches from 0 to 1: `roi_align` with bins of one
    sample, and a bilinear resize by half-pixel centres. `roi_align` has float64 coordinates, checks regions,
    and takes all of them over the images as they are; `torch.nn.functional.grid_sample` wants a copy of the
    image for each. More than half a pixel outside the image a crop is 0.

    Nothing is smoothed before a large region is made smaller, so what is finer than the new grid is aliased,
    as in a bilinear resize of OpenCV, or of PyTorch without ``antialias``. The paper does not say. Crops of
    ``roi_align(images, rois, size)`` average as many samples as a bin is long, and are the same where a
    region is made larger.
    """
    _check_images(images)
    size = checked_whole("size", size)
    crops = roi_align(images, rois, size, sampling_ratio=1)
    # The indices are whole numbers, which bfloat16 would round from 257 on.
    crop_rois = rois.new_zeros(rois.shape, dtype=torch.promote_types(rois.dtype, torch.float32))
    crop_rois[:, 0] = torch.arange(len(rois))
    crop_rois[:, 3:] = size
    return crops, crop_rois


class MimickingLosses(NamedTuple):
    """The losses of `FeatureMimicking`, weighted: what is added to the detector's own.

    Parameters
    ----------
    mimic : Tensor, shape ()
        How far the detector's features are from R-CNN's.
    classification : Tensor, shape ()
        The cross-entropy of R-CNN's classifier.
    """

    mimic: Tensor
    classification: Tensor


class FeatureMimicking(nn.Module):
    """The R-CNN branch that teaches a detector to look at the object alone, and its two losses.

    The branch sees a region cut out of the image, through the detector's own backbone and heads, so nothing
    outside the region can be in its features; and the detector's features of the region are drawn to those.
    Parameters are shared but for the classifier, which is here. Keep this module beside the detector, not in
    it, and give its parameters to the optimiser too: the detector stays as it is, in its state and in what it
    computes, and at inference there is nothing to take away.

    Parameters
    ----------
    in_features : int
        Features of a region; 1024 in the paper, the result of the head's second fc layer.
    classes : int
        Classes of objects; the classifier has one more, the background, whose label is 0.
    mimic_weight, classification_weight : float
        The factors of the two losses.
    size : int
        Height and width of the crops, in pixels.
    device : torch.device or None
        Of the classifier.
    dtype : torch.dtype or None
        Of the classifier.

    Raises
    ------
    TypeError
        An argument of another kind.
    ValueError
        A whole number below 1, or a weight that is not finite.

    See Also
    --------
    sample_regions : Chooses the regions.
    feature_mimic_loss : The loss that draws features together.

    Notes
    -----
    The paper's losses are, for an image, the sum over its sampled regions of 1 - cos(R-CNN's features, the
    detector's features), and the classifier's cross-entropy over the same regions. Of a batch it does not
    speak: here ``mimic`` is the mean over the images of their sums, images without regions included, so it
    does not grow with the batch, and is what one image on each device and the mean of their gradients give.
    ``classification`` is the mean over all regions, as in detectors. Gradients go through both features: the
    paper stops none.

    The detector's layers see the crops too: where batch normalisation is trained, they are in its statistics.

    References
    ----------
    .. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168,
       section 3.3.

    Examples
    --------
    In a training step, with the detector's proposals and its features of them::

        chosen = sample_regions(rois, labels)
        losses = mimicking(images, rois[chosen], labels[chosen], features[chosen], detector.region_features)
        (detector_loss + losses.mimic + losses.classification).backward()
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        mimic_weight: float = 0.1,
        classification_weight: float = 0.1,
        size: int = 224,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.mimic_weight = checked_real("mimic_weight", mimic_weight)
        self.classification_weight = checked_real("classification_weight", classification_weight)
        self.size = checked_whole("size", size)
        sizes = checked_whole("in_features", in_features), checked_whole("classes", classes) + 1
        self.classifier = nn.Linear(*sizes, device=device, dtype=dtype)

    def forward(
        self,
        images: Tensor,
        rois: Tensor,
        labels: Tensor,
        features: Tensor,
        extract: Callable[[Tensor, Tensor], Tensor],
    ) -> MimickingLosses:
        """Compute the losses over some regions of the images.

        Parameters
        ----------
        images : Tensor, shape (batch, channels, height, width)
            As the detector's backbone takes them.
        rois : Tensor, shape (R, 5)
            The sampled regions, in pixels of `images`: index of the image, x1, y1, x2, y2. There may be none:
            then both losses are 0, and their gradients too.
        labels : Tensor of integers, shape (R,)
            Their classes, from 0 (the background) to `classes`.
        features : Tensor, shape (R, in_features)
            The detector's features of these regions.
        extract : callable
            The detector's backbone, pooling and head: takes what `crop_regions` returns, and returns
            features of shape (R, in_features). Not called if there are no regions.

        Returns
        -------
        MimickingLosses
            The two losses, weighted: ``mimic`` and ``classification``.

        Raises
        ------
        TypeError
            A dtype that is not right or an array on a GPU, or what `extract` returned is no tensor.
        ValueError
            Shapes that do not fit, what `extract` returned included, a label that is no class, a region that
            is not finite or of an image that is not there.
        """
        self._check(rois, labels, features)
        rcnn_features = features
        if len(rois):
            rcnn_features = _checked_result(extract(*crop_regions(images, rois, self.size)), features)
        mimic = feature_mimic_loss(rcnn_features, features) / max(len(images), 1)
        # A sum first: the mean of no region is NaN, but its sum is a 0 that has gradients.
        entropy = nn.functional.cross_entropy(self.classifier(rcnn_features), labels.long(), reduction="sum")
        classification = entropy / max(len(rois), 1)
        return MimickingLosses(self.mimic_weight * mimic, self.classification_weight * classification)

    def _check(self, rois: Tensor, labels: Tensor, features: Tensor) -> None:
        _check_labels(rois, labels)
        classes = self.classifier.out_features - 1
        wrong = (labels < 0) | (labels > classes)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels[{first}] is {int(labels[first])}; wanted 0, the background, to {classes}, the last "
                "class"
            )
        wanted = (len(rois), self.classifier.in_features)
        if tuple(features.shape) != wanted:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; wanted (R, in_features) = {wanted}"
            )


def _check_images(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(
            f"images has shape {tuple(images.shape)}; wanted (batch, channels, height, width)"
            f"{'. One image is given as images[None]' if images.ndim == 3 else ''}"
        )
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; wanted them as the backbone takes them: floats")


def _check_labels(rois: Tensor, labels: Tensor) -> None:
    check_rois_shape(tuple(rois.shape))
    if tuple(labels.shape) != (len(rois),):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; wanted one for each region, ({len(rois)},)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels has dtype {labels.dtype}; wanted integers: 0, the background, or a class")


def _checked_result(rcnn_features: Any, features: Tensor) -> Tensor:
    """Return what `extract` returned, if it is as many features of as many regions."""
    if not isinstance(rcnn_features, Tensor):
        raise TypeError(f"extract returned {messages.shown(rcnn_features)}; wanted a tensor of features")
    if rcnn_features.shape != features.shape:
        raise ValueError(
            f"extract returned features of shape {tuple(rcnn_features.shape)}; wanted (R, in_features) = "
            f"{tuple(features.shape)}"
        )
    return rcnn_features
