from typing import Any

def deform_conv(
    isa: int,
    dtype: int,
    images: int,
    positions: int,
    threads: int,
    geometry: Any,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    bias: Any,
    output: Any,
) -> None: ...

class PreparedForward:
    def __new__(
        cls,
        beside: PreparedForward | None,
        isa: int,
        dtype: int,
        images: int,
        positions: int,
        threads: int,
        geometry: Any,
        weight: Any,
        bias: Any,
        logistic_from: int,
        factor: float,
    ) -> PreparedForward: ...
    @property
    def threads(self) -> int: ...
    def run(self, threads: int, x: Any, offset: Any, mask: Any, output: Any) -> None: ...

def deform_conv_backward(
    isa: int,
    dtype: int,
    images: int,
    positions: int,
    threads: int,
    geometry: Any,
    grad_output: Any,
    x: Any,
    offset: Any,
    mask: Any,
    weight: Any,
    grad_x: Any,
    grad_offset: Any,
    grad_mask: Any,
    grad_weight: Any,
    grad_bias: Any,
) -> None: ...
def address(array: Any) -> int: ...
def roi_pool(
    isa: int,
    dtype: int,
    images: int,
    positions: int,
    threads: int,
    geometry: Any,
    regions: Any,
    x: Any,
    offset: Any,
    mask: Any,
    output: Any,
) -> None: ...
def roi_pool_backward(
    isa: int,
    dtype: int,
    images: int,
    positions: int,
    threads: int,
    geometry: Any,
    regions: Any,
    grad_output: Any,
    x: Any,
    offset: Any,
    mask: Any,
    grad_x: Any,
    grad_offset: Any,
    grad_mask: Any,
) -> None: ...
def logistic(isa: int, dtype: int, storage: int, values: Any, factor: float) -> None: ...
def isas() -> list[tuple[str, bool]]: ...
def dtypes() -> list[str]: ...
def halves() -> list[str]: ...
def geometry_size() -> int: ...
def roi_geometry_size() -> int: ...
def use_runtime(capsule: Any) -> None: ...
def has_threads() -> bool: ...
def openmp_threads() -> int: ...
def limit_process_threads(limit: int) -> None: ...
def xla_handlers(isa: int) -> tuple[Any, Any]: ...
def after_fork_in_child() -> None: ...
