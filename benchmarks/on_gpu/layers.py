"""Who is timed: dcn_np, torchvision's deformable convolution, torch's ordinary one."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import dcn_np

from .devices import Device, Run
from .gates import CONVOLUTION, OWN, TORCHVISION
from .inputs import Inputs
from .problems import LAYOUTS, PADDING

torch: Any = importlib.import_module("torch")

ALL = ("x", "offset", "mask", "weight", "bias")
RIGID = ("x", "weight", "bias")  # what an ordinary convolution looks at


class Layer(Protocol):
    """One implementation in one mode, for images in one memory order."""

    implementation: str
    mode: str
    layout: str
    deforms: bool

    def prepare(self, inputs: Inputs, passes: str) -> Run:
        """Return the call over inputs of this layout: "y", and gradients by the names of the inputs."""

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        """Return what is entered around calls, untimed."""


class DcnNp:
    """The public functions."""

    implementation = OWN
    deforms = True

    def __init__(self, device: Device, mode: str, layout: str) -> None:
        self.device, self.mode, self.layout = device, mode, layout

    def prepare(self, inputs: Inputs, passes: str) -> Run:
        """Views of the tensors are made here, once."""
        arrays = {name: self.device.array(getattr(inputs, name)) for name in ALL}
        grad_output = self.device.array(inputs.grad_output)
        matmul = "tf32" if self.mode == "tf32" else "strict"
        without_bias = {name: array for name, array in arrays.items() if name != "bias"}

        def forward() -> dict[str, Any]:
            return {"y": dcn_np.modulated_deform_conv(**arrays, padding=PADDING, float32_matmul=matmul)}

        def both() -> dict[str, Any]:
            results = forward()
            gradients = dcn_np.modulated_deform_conv_backward(
                grad_output, **without_bias, padding=PADDING, float32_matmul=matmul
            )
            return results | gradients._asdict()

        return forward if passes == "forward" else both

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing: the stream is set for the whole process."""
        return contextlib.nullcontext()


class _Torch:
    """What runs on tensors: gradients by autograd, and whether products may be rounded to TF32."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def settings(self) -> contextlib.AbstractContextManager[Any]:
        """Set TF32 and let cuDNN choose by timing; the flags as they were, afterwards."""
        return _flags(self.mode == "tf32")


class Torchvision(_Torch):
    """torchvision.ops.deform_conv2d, which copies inputs that are not NCHW."""

    implementation = TORCHVISION
    layout = "NCHW"
    deforms = True

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.convolve: Any = importlib.import_module("torchvision").ops.deform_conv2d

    def prepare(self, inputs: Inputs, passes: str) -> Run:
        """Return the call."""

        def call(x: Any, offset: Any, mask: Any, weight: Any, bias: Any) -> Any:
            return self.convolve(x, offset, weight, bias, padding=PADDING, mask=mask)

        return _prepared(call, {name: getattr(inputs, name) for name in ALL}, inputs.grad_output, passes)


class Convolution(_Torch):
    """torch's convolution, weights channels-last too: what tensor cores reach without offsets."""

    implementation = CONVOLUTION
    layout = "channels-last"
    deforms = False

    def prepare(self, inputs: Inputs, passes: str) -> Run:
        """Offsets and masks are not looked at."""

        def call(x: Any, weight: Any, bias: Any) -> Any:
            return torch.nn.functional.conv2d(x, weight, bias, padding=PADDING)

        tensors = {name: getattr(inputs, name) for name in RIGID}
        tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
        return _prepared(call, tensors, inputs.grad_output, passes)


def _prepared(call: Callable[..., Any], tensors: dict[str, Any], grad_output: Any, passes: str) -> Run:
    """Return the call over its arguments by name; the forward pass alone keeps nothing for autograd."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def forward() -> dict[str, Any]:
        with torch.inference_mode():
            return {"y": call(**tensors)}

    def both() -> dict[str, Any]:
        y = call(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), grad_output)
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    return forward if passes == "forward" else both


@contextlib.contextmanager
def _flags(tf32: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def layers_of(device: Device, modes: list[str]) -> list[Layer]:
    """Return all that can be timed in these modes; torchvision has no bfloat16."""
    found: list[Layer] = []
    for mode in modes:
        found += [DcnNp(device, mode, layout) for layout in LAYOUTS]
        found += [Torchvision(mode)] if mode != "bfloat16" else []
        found.append(Convolution(mode))
    return found
