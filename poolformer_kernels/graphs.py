"""A model's inference as one CUDA graph."""

import torch
from torch import Tensor, nn

__all__ = ["GraphedModel", "graphed"]

_WARM_UP = 3  # calls before the capture: kernels are compiled and workspaces allocated outside of the graph


def graphed(model: nn.Module, example: Tensor) -> "GraphedModel":
    """Capture the model's inference on inputs like ``example`` in a CUDA graph: a launch instead of hundreds.

    Equivalent PyTorch, but for the time that the host takes::

        with torch.inference_mode():
            y = model(x)

    Args:
        model: any module in eval mode that is safe to capture; PoolFormers on the ``triton`` backend are.
        example: a CUDA tensor ``[B, ...]`` of the shape, dtype and device of all later inputs, on the device
            of the model's parameters. Its strides become those that the model sees. The backend and autocast
            of this call are captured with the rest.

    Returns:
        a `GraphedModel` g; ``g(x)`` is the model's result for x in memory that the next call overwrites.

    Raises:
        TypeError: model is not a module, or example not a tensor.
        ValueError: model is in training mode, example is empty or not on CUDA, or a parameter or buffer is on
            another device.
        RuntimeError: torch sees no CUDA device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, got {type(example).__name__}")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in eval mode, call model.eval(): {training[0] or 'it'} is training")
    if not torch.cuda.is_available():
        raise RuntimeError("graphed captures a CUDA graph, and torch sees no CUDA device")
    if not example.is_cuda:
        raise ValueError(f"example must be a CUDA tensor, got one on {example.device}")
    if example.numel() == 0:
        raise ValueError(f"example must not be empty, got shape {list(example.shape)}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(
                f"model must be on example's device {example.device}, but {name} is on {tensor.device}"
            )
    return GraphedModel(model, example)


class GraphedModel:
    """What `graphed` returns: a captured inference that is replayed on new inputs.

    ``g(x)`` copies x into the captured input, replays the graph on the current stream and returns the
    captured result, a tensor or whatever the model returns. **The result is the same memory in every call**:
    ``clone()`` what must outlive the next one. It takes no part in autograd.

    The result is an inference tensor. x has the captured shape, dtype and device, and any strides. Parameters
    that are updated in place are seen by the next call; where one is replaced or moved (``model.to(...)``),
    the graph goes on with the old one: capture again. The modules'
    Python code, hooks included, does not run. Calls on several streams must be ordered by the caller.

    Raises:
        TypeError, ValueError: x is not a tensor, or not of the captured shape, dtype or device.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self._model = model
        # what the graph reads stays allocated, also where the model's own tensors are replaced
        self._weights = [t.detach() for t in (*model.parameters(), *model.buffers())]
        device = example.device
        # a cast that autocast cached before the capture would be read by replays after it was freed
        autocast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with torch.inference_mode(), torch.cuda.device(device), autocast:
            self._input = example.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # its own default stream belongs to the device that was current at the process's first capture
            with torch.cuda.graph(self._graph, stream=stream):
                self._output = model(self._input)

    def __call__(self, x: Tensor) -> object:
        captured = self._input
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dtype != captured.dtype:
            raise TypeError(f"x must be of the captured dtype {captured.dtype}, got {x.dtype}")
        if x.shape != captured.shape:
            raise ValueError(
                f"x must have the captured shape {list(captured.shape)}, got {list(x.shape)}; "
                "graphed(model, x) captures another"
            )
        if x.device != captured.device:
            raise ValueError(f"x must be on the captured device {captured.device}, got {x.device}")
        with torch.inference_mode(), torch.cuda.device(captured.device):
            captured.copy_(x)
            self._graph.replay()
        return self._output

    def __repr__(self) -> str:
        captured = self._input
        dtype = str(captured.dtype).removeprefix("torch.")
        shape = "x".join(map(str, captured.shape))
        return f"GraphedModel({type(self._model).__name__}, {shape}, {dtype}, {captured.device})"
