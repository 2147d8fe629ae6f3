"""TensorRT: an engine for one kind of NVIDIA GPU, built from an ONNX file. **Never run**: it awaits a machine with TensorRT.

    path = to_tensorrt(to_onnx(model, example, "model.onnx"), "model.engine")
    engine = TensorRTEngine(path)

Written against the documentation of TensorRT 10's Python API. What the tests run of it is what it says where TensorRT or a
GPU is missing.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from helpers.export import ExportFailed
from helpers.files import write_bytes


def to_tensorrt(onnx_path: str | Path, path: str | Path, batch_sizes: tuple[int, int, int] = (1, 4, 8)) -> Path:
    """Build a TensorRT engine from an ONNX file whose only dynamic dimension is the batch.

    The engine runs on the kind of GPU, and with the version of TensorRT, that it was built with. TF32 is off: it
    keeps 10 of float32's 23 bits.

    Args:
        onnx_path: from `to_onnx`, without `axes`.
        path: of the engine, "model.engine"; its folder is made.
        batch_sizes: the smallest that the engine takes, the one it is made fast for, and the largest.

    Raises:
        ExportFailed: TensorRT or a GPU is missing, or TensorRT refuses the file.
    """
    trt = _tensorrt()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise ExportFailed(f"TensorRT cannot read {Path(onnx_path).name}: {parser.get_error(0).desc()}. Try OnnxSession.")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.clear_flag(trt.BuilderFlag.TF32)
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        profile.set_shape(tensor.name, *[(size, *tuple(tensor.shape)[1:]) for size in batch_sizes])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportFailed(f"TensorRT cannot build {Path(onnx_path).name}; its log above says why. Try OnnxSession.")
    write_bytes(Path(path), engine)
    return Path(path)


class TensorRTEngine:
    """An engine of `to_tensorrt`: `engine(x)` takes CUDA tensors in the order of `inputs`, gives a CUDA tensor."""

    def __init__(self, path: str | Path) -> None:
        trt = _tensorrt()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        if self._engine is None:
            raise ExportFailed(f"{Path(path).name} is no engine of this TensorRT and this GPU. Build it here: to_tensorrt.")
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        kinds = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
        self._dtypes = {name: getattr(torch, kinds[self._engine.get_tensor_dtype(name).name]) for name in names}

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        buffers = {name: x.to("cuda", self._dtypes[name]).contiguous() for name, x in zip(self.inputs, tensors, strict=True)}
        for name, tensor in buffers.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ValueError(f"{name} must have a shape that the engine was built for, got {tuple(tensor.shape)}.")
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            buffers[name] = torch.empty(shape, dtype=self._dtypes[name], device="cuda")
        for name, tensor in buffers.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.current_stream().synchronize()
        return buffers[self.outputs[0]] if len(self.outputs) == 1 else tuple(buffers[name] for name in self.outputs)


def _tensorrt():
    """The module tensorrt, where it and a GPU are."""
    missing = [] if importlib.util.find_spec("tensorrt") else ["the package tensorrt"]
    missing += [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if missing:
        raise ExportFailed(f"TensorRT needs {' and '.join(missing)}, not found here. Take OnnxSession on this machine.")
    import tensorrt

    return tensorrt
