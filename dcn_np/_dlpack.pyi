from typing import Any

class Memory:
    is_bfloat16: bool
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Exported:
    def __init__(self, array: Any, is_bfloat16: bool = False) -> None: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...

def memory_of(capsule: Any) -> Memory: ...
