"""One run of the digits network in a process of its own, through one package: for footprint.py.

    python benchmarks/footprint_once.py PACKAGE FOLDER THREADS

FOLDER holds what footprint.py writes: the image, and the models. As little as can be is imported before the
package, so that its import is charged with all that it brings.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VARIANT = "DCNv2"
IMAGE = "image.npy"
MODELS = {"onnxruntime": "model.onnx", "openvino": "model.xml"}

sys.path.append(str(ROOT))
peak_memory = importlib.import_module("examples.edge.memory").peak_memory


def example(name: str) -> Any:
    """Import a module of the digits example."""
    return importlib.import_module(f"examples.digits.{name}")


def state() -> Any:
    """Return the stored parameters of the network."""
    return example("runs").read_weights()[0][VARIANT]


def run_numpy(folder: Path, x: Any, threads: int) -> Any:
    """Return nothing: NumPy alone has no such network."""
    return x[:0]


def run_dcn_np(folder: Path, x: Any, threads: int) -> Any:
    """Run the layers of dcn_np."""
    network = example("numpy_network").Network(VARIANT, state=state())
    with importlib.import_module("dcn_np").num_threads(threads):
        return network.logits(x)


def run_onnxruntime(folder: Path, x: Any, threads: int) -> Any:
    """Run the model on onnxruntime."""
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        folder / MODELS["onnxruntime"], options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0].reshape(len(x), -1)


def run_openvino(folder: Path, x: Any, threads: int) -> Any:
    """Run the model on OpenVINO's CPU plugin."""
    openvino: Any = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(folder / MODELS["openvino"], "CPU", settings)
    return compiled(x)[0].reshape(len(x), -1)


def run_torch(folder: Path, x: Any, threads: int) -> Any:
    """Run torch's modules, the deformable ones of `dcn_np.torch`: torch alone has none."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    network = example("torch_network").Network(VARIANT)
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state().items()})
    with importlib.import_module("dcn_np").num_threads(threads):
        return network.logits(x)


RUNS = {
    "numpy": run_numpy,
    "dcn_np": run_dcn_np,
    "onnxruntime": run_onnxruntime,
    "openvino": run_openvino,
    "torch": run_torch,
}


def main() -> None:
    """Import NumPy, then the package, then run; print times in s, peaks in bytes and the logits as JSON."""
    package, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    begin = time.perf_counter()
    numpy = importlib.import_module("numpy")
    with_numpy = time.perf_counter()
    importlib.import_module(package)
    done = time.perf_counter()
    found = {
        "numpy_seconds": with_numpy - begin,
        "import_seconds": done - with_numpy,
        "imported": peak_memory(),
    }
    logits = RUNS[package](folder, numpy.load(folder / IMAGE), threads)
    print(json.dumps(found | {"run": peak_memory(), "logits": logits.tolist()}))


if __name__ == "__main__":
    main()
