"""Error-bounded saliency: the smallest region of an image that keeps what a node answers."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

from ..geometry import checked_integers, checked_number
from ..messages import listed, shown
from .arguments import ValueAndGrad, checked_image, evaluated

Array: TypeAlias = NDArray[Any]

# Called after a step with the number of steps that may be left.
Advance: TypeAlias = Callable[[int], None]

FILLS = "zero", "mean", "blur"
BLUR = 1 / 8  # standard deviation of the blur, as a part of the longest side

# Cells beyond which single ones are not worth a forward pass each.
MOST_CELLS = 1024

# Of the cells that matter most, so many are tried: all, and then GROWTH times fewer each time.
GROWTH, TRIED = 1.2, 40

# The relaxed optimisation: Adam on the logits of the mask, with a weight of the error that follows the bound.
RATE, FIRST_DECAY, SECOND_DECAY = 0.2, 0.9, 0.99
FIRST_LOGIT, FIRST_WEIGHT, WEIGHT_RATE = 1.0, 1.0, 0.1
LARGEST_WEIGHT = 1e100  # its square is still a float, however long the bound is out of reach


class SaliencyStep(NamedTuple):
    """A region that the search came to.

    Parameters
    ----------
    phase : {"relaxed", "thresholded", "removed"}
        Which part of the search.
    error : float
        Of the image outside of which all is filled.
    area : float
        The part of the image that is kept; of the relaxed mask its mean.
    """

    phase: str
    error: float
    area: float


class SalientRegion(NamedTuple):
    """The smallest region found, and how.

    Parameters
    ----------
    mask : numpy.ndarray, shape (*spatial), bool
        The pixels that are kept.
    error : float
        What `error_and_grad` gives for `image`; at most epsilon.
    area : float
        The part of all pixels that is kept.
    image : numpy.ndarray, shape (channels, *spatial)
        The image with all other pixels filled.
    relaxed : numpy.ndarray, shape (*spatial), float64
        What the relaxed optimisation found, s(logits) of `error_bounded_saliency`: how likely each pixel is
        to be needed, 0 to 1.
    steps : list of SaliencyStep
        All relaxed masks, and each region within the bound, in their order.
    evaluations : int
        How often `error_and_grad` was called.
    """

    mask: Array
    error: float
    area: float
    image: Array
    relaxed: Array
    steps: list[SaliencyStep]
    evaluations: int


def error_bounded_saliency(
    error_and_grad: ValueAndGrad,
    image: Any,
    epsilon: float = 0.1,
    *,
    fill: str = "zero",
    cell: int | None = None,
    relaxed_steps: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> SalientRegion:
    """Find a smallest region of an image that keeps the features of a node, all else removed.

    Parameters
    ----------
    error_and_grad : callable
        Takes an image (channels, *spatial) and returns how far the node's features depart from those of
        `image`, a number, and its gradient by the image. ``of_node.cosine_error(image)`` makes it of a
        `NodeFunction`: 1 - cosine of the features.
    image : array, shape (channels, *spatial)
        The image; 1 to 3 spatial axes.
    epsilon : float
        The bound of the error, above 0.
    fill : {"zero", "mean", "blur"}
        What takes the place of a removed pixel: 0, the mean of its channel, or the image blurred by a
        Gaussian with a standard deviation of an eighth of the longest side.
    cell : int or None
        The side of the cells that are kept or removed as a whole, in pixels; None is the smallest that makes
        at most 1024 cells.
    relaxed_steps : int
        Steps of the relaxed optimisation, each a forward and a backward.
    seed : int
        Of the noise of the relaxed optimisation. The result depends on it and on nothing else but the other
        arguments.
    progress : bool
        Whether a progress bar is shown, by the package tqdm; without it there is none.

    Returns
    -------
    SalientRegion
        The region, its error and area, and the steps of the search.

    Raises
    ------
    TypeError
        An argument of the wrong kind.
    ValueError
        Numbers that do not fit, an image that is not finite, or an error above epsilon for the whole image.

    See Also
    --------
    NodeFunction.cosine_error : Makes the error.

    Notes
    -----
    The source describes the region as the smallest that gives the same response as the whole image within a
    small error, found by progressively masking parts of the image [1]_; its appendix was not at hand, so the
    search is our own. With a mask M, one number per cell, and I_M = M * image + (1 - M) * filled::

        minimise mean(M)   subject to   error(I_M) <= epsilon

    1. *Relaxed.* Each cell has a logit, and in every step M = s(logit + noise), with s(z) = 1 / (1 + exp(-z))
       and noise drawn from the logistic distribution. Adam lowers mean(s(logits)) + weight * error(I_M),
       where the weight grows after an error above the bound and falls after one below. Without the noise, M
       could become small everywhere at once, and a cosine hardly sees that an image is dimmed.
    2. *Thresholded.* The cells are put in the order of their logits, and the fewest are taken that keep the
       bound: numbers of them are tried that grow by a fifth, then those between the last two.
    3. *Removed.* Kept cells are removed in that order, many at a time while that keeps the bound, then fewer,
       until no single one can be removed.

    So the error of the region is within epsilon, and removing any further cell would exceed it; that no
    smaller region exists is not known. A region can be empty: where the filled image alone is within the
    bound.

    References
    ----------
    .. [1] Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", 2018, arXiv:1811.11168.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.analysis import Node, error_bounded_saliency, of_layers
    >>> from dcn_np.layers import Conv2d
    >>> of_node = of_layers([Conv2d(1, 8, 3, bias=False, rng=0)], Node(position=(2, 3)))
    >>> image = numpy.ones((1, 8, 8), "float32")
    >>> region = error_bounded_saliency(of_node.cosine_error(image), image, epsilon=0.01)
    >>> region.error <= 0.01
    True
    >>> numpy.argwhere(region.mask).min(axis=0) >= (2, 3)
    array([ True,  True])
    """
    image = checked_image("image", image)
    bound = _checked_epsilon(epsilon)
    search = _Search(error_and_grad, image, bound, _filled(image, fill), _checked_cell(cell, image))
    steps = checked_number("relaxed_steps", checked_integers("relaxed_steps", relaxed_steps, 0), 1)
    rng = numpy.random.default_rng(seed)
    with _bar(progress) as advance:
        search.check_whole()
        search.relax(steps, rng, advance)
        search.threshold()
        search.remove(advance)
    return search.result()


class _Search:
    """The three parts of the search, over cells; `kept` is the last region that keeps the bound."""

    def __init__(self, error_and_grad: ValueAndGrad, image: Array, bound: float, filled: Array, cell: int):
        self.error_and_grad, self.image, self.bound, self.filled = error_and_grad, image, bound, filled
        self.cell, self.size = cell, image.shape[1:]
        self.cells = _cells(image, cell)
        self.areas = self._per_cell(numpy.ones(self.size)) / math.prod(self.size)
        self.kept = numpy.ones(self.cells, bool)
        self.steps: list[SaliencyStep] = []
        self.evaluations = 0

    def _per_pixel(self, cells: Array) -> Array:
        """Spread one value per cell over its pixels."""
        for axis, extent in enumerate(self.size):
            cells = cells.repeat(self.cell, axis=axis).take(range(extent), axis=axis)
        return cells

    def _per_cell(self, pixels: Array) -> Array:
        """Sum up the values of the pixels of each cell."""
        for axis, extent in enumerate(self.size):
            pixels = numpy.add.reduceat(pixels, range(0, extent, self.cell), axis=axis)
        return pixels

    def _masked(self, mask: Array) -> Array:
        pixels = self._per_pixel(mask)
        if mask.dtype == bool:
            return numpy.where(pixels, self.image, self.filled)
        mixed: Array = self.filled + pixels * (self.image.astype(numpy.float64) - self.filled)
        return mixed.astype(self.image.dtype)

    def _evaluate(self, mask: Array) -> tuple[float, Array]:
        """Return the error of a mask, and its gradient by the mask."""
        self.evaluations += 1
        error, gradient = evaluated(self.error_and_grad, self._masked(mask))
        by_pixel = (gradient * (self.image.astype(numpy.float64) - self.filled)).sum(axis=0)
        return error, self._per_cell(by_pixel)

    def _try(self, region: Array, phase: str) -> bool:
        """Keep a region if it keeps the bound."""
        error, _ = self._evaluate(region)
        if error <= self.bound:
            self.kept, self.error = region, error
            self.steps.append(SaliencyStep(phase, error, self._area(region)))
        return error <= self.bound

    def _area(self, mask: Array) -> float:
        return float((mask * self.areas).sum())

    def check_whole(self) -> None:
        error, _ = self._evaluate(self.kept)
        if error > self.bound:
            raise ValueError(
                f"error_and_grad gives {error:g} for the whole image; wanted at most epsilon = "
                f"{self.bound:g}: it is to compare with this very image"
            )
        self.error = error

    def relax(self, steps: int, rng: numpy.random.Generator, advance: Advance) -> None:
        """Find how likely each cell is to be needed."""
        logits, weight = numpy.full(self.cells, FIRST_LOGIT), FIRST_WEIGHT
        first, second = numpy.zeros(self.cells), numpy.zeros(self.cells)
        for step in range(1, steps + 1):
            likely = 1 / (1 + numpy.exp(-logits))
            drawn = 1 / (1 + numpy.exp(-logits - rng.logistic(size=self.cells)))
            error, by_mask = self._evaluate(drawn)
            self.steps.append(SaliencyStep("relaxed", error, self._area(drawn)))
            gradient = self.areas * likely * (1 - likely)
            gradient += weight * by_mask * drawn * (1 - drawn)
            first += (1 - FIRST_DECAY) * (gradient - first)
            second += (1 - SECOND_DECAY) * (gradient**2 - second)
            mean, square = first / (1 - FIRST_DECAY**step), second / (1 - SECOND_DECAY**step)
            logits -= RATE * mean / (numpy.sqrt(square) + 1e-12)
            weight *= math.exp(WEIGHT_RATE * max(-1.0, min(1.0, error / self.bound - 1)))
            weight = min(weight, LARGEST_WEIGHT)
            advance(steps - step)
        self.relaxed = 1 / (1 + numpy.exp(-logits))

    def threshold(self) -> None:
        """Take the fewest of the cells that matter most; more of them can err more, so many are tried."""
        order = numpy.argsort(-self.relaxed, axis=None, kind="stable")
        sizes = sorted({math.ceil(order.size * GROWTH**-power) for power in range(TRIED)} | {0})
        tried = itertools.takewhile(lambda size: not self._keeps(order[:size]), sizes)
        too_few = max(tried, default=-1)
        enough = next((size for size in sizes if size > too_few), order.size)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if self._keeps(order[:middle]):
                enough = middle
            else:
                too_few = middle

    def _keeps(self, cells: Array) -> bool:
        region = numpy.zeros(self.cells, bool)
        region.flat[cells] = True
        return self._try(region, "thresholded")

    def remove(self, advance: Advance) -> None:
        """Remove what the region can do without, until no single cell can go."""
        before = -1
        while before != self.kept.sum():
            before = self.kept.sum()
            self._pass_over(advance)

    def _pass_over(self, advance: Advance) -> None:
        """Try to remove each kept cell once, alone or among others, those first that are needed least."""
        cells = numpy.flatnonzero(self.kept)
        waiting = cells[numpy.argsort(self.relaxed.flat[cells], kind="stable")]
        count = max(1, len(waiting) // 2)
        while len(waiting):
            region = self.kept.copy()
            region.flat[waiting[:count]] = False
            advance(len(waiting))
            if self._try(region, "removed"):
                waiting, count = waiting[count:], 2 * count
            elif count == 1:
                waiting = waiting[1:]
            else:
                count = max(1, min(count, len(waiting)) // 2)

    def result(self) -> SalientRegion:
        mask, image = self._per_pixel(self.kept), self._masked(self.kept)
        error, _ = evaluated(self.error_and_grad, image)
        if error > self.bound:
            raise ValueError(
                f"error_and_grad gives {error:g} where it gave {self.error:g} for the same image; wanted a "
                "function that always gives the same"
            )
        relaxed = self._per_pixel(self.relaxed)
        return SalientRegion(
            mask, error, float(mask.mean()), image, relaxed, self.steps, self.evaluations + 1
        )


# ---- arguments


def _checked_epsilon(epsilon: Any) -> float:
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float | numpy.number):
        raise TypeError(f"epsilon is {shown(epsilon)}; wanted a number above 0")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {shown(epsilon)}; wanted a number above 0, such as 0.1")
    return float(epsilon)


def _checked_cell(cell: Any, image: Array) -> int:
    if cell is None:
        sides = itertools.count(1)
        return next(side for side in sides if math.prod(_cells(image, side)) <= MOST_CELLS)
    side: int = checked_number("cell", checked_integers("cell", cell, 0), 1)
    return side


def _cells(image: Array, cell: int) -> tuple[int, ...]:
    """Return how many cells an image has along each axis."""
    return tuple(-(-extent // cell) for extent in image.shape[1:])


def _filled(image: Array, fill: Any) -> Array:
    """Return what takes the place of removed pixels, in the shape of the image."""
    if fill not in FILLS:
        raise ValueError(f"fill is {shown(fill)}; wanted one of {listed(FILLS)}")
    if fill == "zero":
        return numpy.zeros_like(image)
    if fill == "mean":
        mean = image.mean(axis=tuple(range(1, image.ndim)), keepdims=True, dtype=numpy.float64)
        return numpy.broadcast_to(mean, image.shape).astype(image.dtype)
    return _blurred(image, BLUR * max(image.shape[1:])).astype(image.dtype)


def _blurred(image: Array, deviation: float) -> Array:
    """Return the mean around each pixel, weighed by a Gaussian; what lies outside does not count."""
    blurred = image.astype(numpy.float64)
    for axis in range(1, image.ndim):
        place = numpy.arange(image.shape[axis])
        weights = numpy.exp(-0.5 * ((place[:, None] - place) / deviation) ** 2)
        weights /= weights.sum(axis=1, keepdims=True)
        blurred = numpy.moveaxis(numpy.tensordot(weights, blurred, (1, axis)), 0, axis)
    return blurred


@contextmanager
def _bar(progress: bool) -> Iterator[Advance]:
    """Yield what moves the progress bar, if one is wanted and there is tqdm; else what does nothing."""
    try:
        tqdm = importlib.import_module("tqdm") if progress else None
    except ImportError:
        tqdm = None
    if tqdm is None:
        yield lambda left: None
        return
    with tqdm.tqdm(desc="saliency", unit="step", leave=False) as bar:

        def advance(left: int) -> None:
            bar.total = bar.n + 1 + left
            bar.update()

        yield advance
