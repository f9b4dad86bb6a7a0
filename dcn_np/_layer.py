"""What all layers without a framework share: parameters by name, state dicts, and what a backward needs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy

from . import cpu
from .arrays import Array, kind_of
from .backends import backend_of
from .geometry import checked_integers
from .messages import listed, number, shown

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import DTypeLike

    Seed: TypeAlias = "numpy.random.Generator | Zeros | int | None"


class Layer:
    """Arrays that `forward` reads, and whose gradients `backward` puts in `gradients`."""

    # The names of the parameters, with those of the state dict.
    _keys: Mapping[str, str]

    dtype: numpy.dtype[Any]
    gradients: dict[str, Array]
    # What the last `forward` left for `backward`: its input, offsets and masks, and what else it wants.
    _kept: tuple[Any, ...] | None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Array], *sizes: Any, **options: Any) -> Self:
        """Build a layer with the parameters of a state dict; nothing is drawn.

        Then `numpy.random`, 6 MB of memory, is not imported either.

        Parameters
        ----------
        state : mapping of str to array
            The parameters, as `load_state_dict` takes them.
        *sizes, **options
            The arguments of the class, without `rng`.

        Returns
        -------
        layer
            One of this class.

        Raises
        ------
        TypeError
            An argument of the wrong kind, or a value that is no array of floating-point numbers.
        ValueError
            Numbers that do not fit, or parameters that do not fit them.

        See Also
        --------
        load_state_dict : For a layer that is there.
        """
        make: Any = cls  # the classes differ in their arguments
        layer: Self = make(*sizes, rng=Zeros(), **options)
        layer.load_state_dict(state)
        return layer

    def parameters(self) -> dict[str, Array]:
        """Return the parameters by name.

        Returns
        -------
        dict of str to array
            The arrays themselves: what changes them in place changes the layer. `gradients` has the same
            keys.

        See Also
        --------
        state_dict : The same under the names of checkpoints.
        """
        return present(**{name: getattr(self, name) for name in self._keys})

    def state_dict(self) -> dict[str, Array]:
        """Return the parameters under the names that checkpoints have.

        Returns
        -------
        dict of str to array
            The arrays themselves, not copies, with the keys of mmcv: weight and bias, of a deformable layer
            also conv_offset.weight and conv_offset.bias, of a pooling over regions offset_fc.0.weight and so
            on.

        See Also
        --------
        load_state_dict : The way back.
        save_npz : To a file.
        """
        return {self._keys[name]: value for name, value in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take the parameters from a state dict; nothing changes unless all of them fit.

        Parameters
        ----------
        state : mapping of str to array
            Copied, in the dtype of the layer. The layer computes where these arrays are: those of CuPy move
            it to their GPU.

        Raises
        ------
        TypeError
            A value is no array of floating-point numbers.
        ValueError
            Keys are missing or unknown, or a shape is another; or the arrays are not all of one library and
            on one device.

        See Also
        --------
        state_dict : The way back.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {shown(state)}; wanted a mapping of str to array")
        wanted = self.state_dict()
        if unknown := [key for key in state if key not in wanted]:
            raise ValueError(f"state holds {_names(unknown)}; {self!r} has {listed(list(wanted))} only")
        if missing := [key for key in wanted if key not in state]:
            raise ValueError(f"state has no {listed(missing)}; {self!r} has {listed(list(wanted))}")
        kind = kind_of(**state)
        arrays = {key: _floating(key, kind.take(key, state[key])) for key in wanted}
        for key, value in arrays.items():
            if value.shape != wanted[key].shape:
                raise ValueError(f"{key} has the shape {value.shape}; {self!r} wants {wanted[key].shape}")
        for name in self.parameters():
            setattr(self, name, arrays[self._keys[name]].astype(self.dtype, order="C"))
        self.gradients, self._kept = {}, None

    def last_branch(self) -> tuple[Array | None, Array | None]:
        """Return what the last `forward` sampled by.

        Returns
        -------
        tuple of two arrays or None
            Its offsets and masks, not copies; None where the layer has none.

        Raises
        ------
        RuntimeError
            There was no `forward`.

        See Also
        --------
        forward : Makes them.
        """
        _, offset, mask, *_ = self._remembered("last_branch")
        return offset, mask

    def _remembered(self, wanting: str = "backward") -> tuple[Any, ...]:
        if self._kept is None:
            raise RuntimeError(f"{wanting} without a forward before it; wanted forward(x) first")
        return self._kept


# ---- first parameters


class Zeros:
    """Stands in for a generator where parameters are loaded, so that none need be imported."""

    def uniform(self, low: float, high: float, size: int | tuple[int, ...]) -> Array:
        return numpy.zeros(size)

    normal = uniform


def generator_of(rng: Seed) -> numpy.random.Generator | Zeros:
    """Return what draws; numpy.random, which takes memory, is imported here and not before."""
    if isinstance(rng, Zeros):
        return rng
    if rng is None or isinstance(rng, numpy.random.Generator):
        return numpy.random.default_rng(rng)
    seed: int = checked_integers("rng", rng, 0)
    if seed < 0:
        raise ValueError(f"rng is {number(seed)}; wanted a numpy.random.Generator, or a seed of at least 0")
    return numpy.random.default_rng(seed)


# ---- numbers and arrays


def checked_dtype(value: DTypeLike) -> numpy.dtype[Any]:
    """Return a dtype that is computed."""
    try:
        dtype = numpy.dtype(value)
    except TypeError:
        raise TypeError(f"dtype is {shown(value)}; wanted one of NumPy's, such as float32") from None
    computed = backend_of(numpy.empty(0)).dtypes()
    if dtype not in computed:
        raise TypeError(f"dtype is {dtype}; wanted one of {', '.join(map(str, computed))}")
    return dtype


def present(**arrays: Array | None) -> dict[str, Array]:
    """Return those that are not None."""
    return {name: value for name, value in arrays.items() if value is not None}


def namespace(array: Array) -> Any:
    """Return the module whose functions take an array: numpy or cupy."""
    return importlib.import_module(type(array).__module__.partition(".")[0])


def logistic(values: Array, factor: int) -> Array:
    """Return factor / (1 + exp(-values)); values (batch, channels, *axes) on a CPU are overwritten."""
    if isinstance(values, numpy.ndarray):
        return cpu.logistic(values, factor)
    xp = namespace(values)
    power = xp.exp(-abs(values))  # never one that overflows
    above = factor / (1 + power)
    return xp.where(values >= 0, above, power * above)


def _floating(key: str, array: Array) -> Array:
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{key} has dtype {array.dtype}; wanted floating-point numbers, such as float32")
    return array


def _names(keys: Sequence[Any]) -> str:
    return ", ".join(map(shown, keys))
