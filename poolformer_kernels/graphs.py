"""A model's inference, and a step of its training, as one CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .graph_checks import check_device, check_groups, check_hooks, check_kinds, check_like, check_loss

__all__ = ["GraphedModel", "GraphedStep", "graphed", "graphed_step"]

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
    check_kinds(model, example=example)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model must be in eval mode, call model.eval(): {training[0] or 'it'} is training")
    check_device("graphed", model, example=example)
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
        with torch.inference_mode(), torch.cuda.device(example.device), _autocast_of_caller():
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
        check_like("x", x, captured, "graphed(model, x)")
        with torch.inference_mode(), torch.cuda.device(captured.device):
            captured.copy_(x)
            self._graph.replay()
        return self._output

    def __repr__(self) -> str:
        captured = self._input
        dtype = str(captured.dtype).removeprefix("torch.")
        shape = "x".join(map(str, captured.shape))
        return f"GraphedModel({type(self._model).__name__}, {shape}, {dtype}, {captured.device})"


def graphed_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[object, Tensor], Tensor],
    example: Tensor,
    target: Tensor,
) -> "GraphedStep":
    """Capture a step of training in a CUDA graph, forward to optimizer: a launch instead of hundreds.

    Equivalent PyTorch, but for the time that the host takes; autocast is that of this call::

        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model(x), target)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    The capture is no step itself: weights, buffers, the optimizer's state and random numbers are afterwards
    as they were, in the same tensors. A new optimizer has its state then, at its initial values. Gradients of
    before are dropped. Dropout and stochastic depth draw anew in each replay, as they do without a graph.

    **The optimizer's numbers are captured as they are.** A learning rate that changes must be a tensor on the
    device; torch's schedulers and ``lr.fill_(value)`` update it in place, and the next replay sees it::

        lr = torch.tensor(1e-3, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=True)

    Where another number has changed since the capture (a learning rate that is no tensor, a weight decay),
    the next call raises. A `GradScaler` is not supported, since it decides on the host whether to step: train
    in bfloat16. Nor is what else comes between backward and step, such as clipping, a sum of gradients over
    several calls or over processes.

    Args:
        model: any module in training mode that is safe to capture; inner modules may be in eval mode, and are
            so in every replay. It has no hooks: replays would leave their Python code out.
        optimizer: of parameters of the model, each group with ``capturable=True`` (AdamW, Adam, NAdam, RAdam,
            Adamax, Adadelta, RMSprop; Rprop and ASGD once they have made a step), without hooks.
        loss: of the model's result and the target; its result is a tensor with one element.
        example: a CUDA tensor ``[B, ...]`` of the shape, dtype and device of all later inputs, on the device
            of the model's parameters. Its strides become those that the model sees.
        target: a tensor on that device, of the shape and dtype of all later targets.

    Returns:
        a `GraphedStep` step; ``step(x, target)`` makes one step and returns its loss, in memory that the next
        call overwrites.

    Raises:
        TypeError: an argument is of another type, the model is replicated (`DataParallel` and the like), or
            the loss is no tensor.
        ValueError: the model is in eval mode or has hooks; a parameter, a buffer, the target or a learning
            rate is on another device; a param group is not capturable, or of another model; the optimizer is
            new and its initial state not known; the loss has several elements or needs no gradient.
        RuntimeError: torch sees no CUDA device.
    """
    check_kinds(model, example=example, target=target)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not callable(loss):
        raise TypeError(f"loss must be a function of the result and the target, got {type(loss).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model must run on one device by itself, got a {type(model).__name__}")
    if not model.training:
        raise ValueError("model must be in training mode, call model.train()")
    check_hooks(model, optimizer)
    check_device("graphed_step", model, example=example, target=target)
    check_groups(model, optimizer, example.device)
    return GraphedStep(model, optimizer, loss, example, target)


# What a new state begins with, by its name in torch's optimizers. Rprop and ASGD have others, of their lr.
_INITIAL = dict.fromkeys(
    (
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
        *("square_avg", "momentum_buffer", "grad_avg", "acc_delta"),
    ),
    0.0,
) | {"mu_product": 1.0}


class GraphedStep:
    """What `graphed_step` returns: a captured training step that is replayed on new inputs and targets.

    ``step(x, target)`` copies both into the captured ones, replays the graph on the current stream and
    returns the loss as it was before the step, without a graph of autograd. **It is the same memory in every
    call**: ``clone()`` what must outlive the next one, or add it up on the device. Both have the captured
    shape, dtype and device, and any strides. ``p.grad`` is None between calls, as after `zero_grad`.

    Weights and state are the model's and the optimizer's own tensors: what is written to them in place is
    seen by the next call, and an evaluation between calls sees what the calls have done. Where one is
    replaced or moved (``model.to(...)``), the graph goes on with the old one: capture again. The modules'
    modes are those of the capture. Calls on several streams must be ordered by the caller.

    Raises:
        TypeError, ValueError: x or target is not a tensor, or not of the captured shape, dtype or device.
        RuntimeError: a number of the optimizer (``lr``, ``betas``, ...) is another than at the capture, or
            ``load_state_dict`` or ``add_param_group`` replaced what the graph updates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[[object, Tensor], Tensor],
        example: Tensor,
        target: Tensor,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        device = example.device
        with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device(device):
            self._input, self._target = example.detach().clone(), target.detach().clone()
            autocast = _autocast_of_caller()

            def step() -> Tensor:
                with autocast:
                    value = loss(model(self._input), self._target)
                check_loss(value)
                value.backward()
                optimizer.step()
                return value.detach()

            model.zero_grad()
            before = _Saved(model, optimizer, device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARM_UP):
                        step()
                        model.zero_grad()
            except BaseException:
                torch.cuda.current_stream().wait_stream(stream)
                before.restore(keep_new=False)
                raise
            torch.cuda.current_stream().wait_stream(stream)
            before.restore(keep_new=True)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, stream=stream):
                    self._loss = step()
            finally:
                model.zero_grad()  # the gradients' memory stays the graph's
        # what the graph reads stays allocated, also where the model's and the optimizer's own are replaced
        self._kept = [t.detach() for t in (*model.parameters(), *model.buffers())]
        self._kept += [
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        ]
        self._state, self._groups = optimizer.state, list(optimizer.param_groups)
        self._numbers = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        check_like("x", x, self._input, "graphed_step")
        check_like("target", target, self._target, "graphed_step")
        self._check_optimizer()
        with torch.no_grad(), torch.cuda.device(self._input.device):
            self._input.copy_(x)
            self._target.copy_(target)
            self._graph.replay()
        return self._loss

    def _check_optimizer(self) -> None:
        """Raise where the optimizer is no longer as it was captured: the replay would not know."""
        groups = self._optimizer.param_groups
        same = len(groups) == len(self._groups) and self._optimizer.state is self._state
        if not same or any(a is not b for a, b in zip(groups, self._groups, strict=True)):
            raise RuntimeError(
                "the optimizer's state or param groups were replaced since the step was captured, as by "
                "load_state_dict or add_param_group; graphed_step captures another"
            )
        for i, (group, numbers) in enumerate(zip(groups, self._numbers, strict=True)):
            for name, captured in numbers.items():
                value = group.get(name)
                if value is captured or (not _has_tensors(value, captured) and value == captured):
                    continue
                advice = "graphed_step captures another"
                if name == "lr":
                    advice = "make lr a tensor on the device, which is updated in place, before the capture"
                raise RuntimeError(
                    f"{name} of the optimizer's param group {i} was {captured} when the step was captured "
                    f"and is now {value}, which a replay does not see: {advice}"
                )

    def __repr__(self) -> str:
        captured = self._input
        dtype, shape = str(captured.dtype).removeprefix("torch."), "x".join(map(str, captured.shape))
        names = f"{type(self._model).__name__}, {type(self._optimizer).__name__}"
        return f"GraphedStep({names}, {shape}, {dtype}, {captured.device})"


class _Saved:
    """What steps change, to be written back into the same tensors."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self._tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        self._optimizer, self._device = optimizer, device
        self._states = {
            p: {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
            for p, state in optimizer.state.items()
        }
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state(device)

    @torch.no_grad()
    def restore(self, keep_new: bool) -> None:
        """``keep_new``: a state that was not there before stays, at its initial values, or is removed."""
        for tensor, value in self._tensors:
            tensor.detach().copy_(value)
        unknown = set()
        for p, state in list(self._optimizer.state.items()):
            old = self._states.get(p, {})
            for name in list(state):
                if name in old and isinstance(old[name], Tensor):
                    state[name].copy_(old[name])
                elif name in old:
                    state[name] = old[name]
                elif keep_new and name in _INITIAL and isinstance(state[name], Tensor):
                    state[name].fill_(_INITIAL[name])
                elif keep_new:
                    unknown.add(name)
                else:
                    del state[name]
            if p not in self._states and not keep_new:
                del self._optimizer.state[p]
        torch.set_rng_state(self._random[0])
        torch.cuda.set_rng_state(self._random[1], self._device)
        if unknown:
            self.restore(keep_new=False)
            raise ValueError(
                f"optimizer must have made a step: the initial values of {', '.join(sorted(unknown))} of "
                f"{type(self._optimizer).__name__} are not known"
            )


def _autocast_of_caller() -> torch.autocast:
    """Autocast as it is here, without its cache: a cast of before would be freed, and replays read it."""
    return torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


def _has_tensors(*values: object) -> bool:
    parts = [part for v in values for part in (v if isinstance(v, (tuple, list)) else (v,))]
    return any(isinstance(part, Tensor) for part in parts)
