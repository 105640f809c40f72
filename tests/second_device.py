"""A device that computes on the CPU and is as strict as a GPU: "second", for machines without one.

Tensors of both devices do not mix, nor a generator of one with a tensor of the other; numpy takes
no tensor of the second device; `waits` counts where a GPU's host would have to wait for it.
"""

import contextlib
import traceback
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, Generator = torch.ops.aten, torch.Generator
# operations that need values on the host; that index in place; that take tensors of both devices
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount,
         aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.histc}
WRITES = {aten.index_put_, aten.index_put, aten._index_put_impl_}
MIXED = {aten.copy_, aten._to_copy, aten.index, *WRITES}
waits = Counter()


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def device(self, index):
        return contextlib.nullcontext()


backend_registration._setup_privateuseone_for_python_backend("second", backend_module=_Module())
_autocast = torch.library.Library("_", "IMPL")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
DEVICE = torch.device("second", 0)


def _is_second(device) -> bool:
    return device is not None and torch.device(device).type == "second"


class SecondTensor(torch.Tensor):
    """Its values are in `inner`, a CPU tensor; views share memory through their inner tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"second({self.inner})"

    def __format__(self, spec):
        return format(self.item() if self.ndim == 0 else self.inner, spec)

    def __deepcopy__(self, memo):
        copy = SecondTensor(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        return memo.setdefault(id(self), copy)

    def __getitem__(self, index):
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index, value):
        return super().__setitem__(_without_lists(index), value)

    def new_tensor(self, data, **options):
        return SecondTensor(self.inner.new_tensor(data, **options))

    def tolist(self):
        _wait("tolist")
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the second device to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _without_lists(index):
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(list(index)) if isinstance(index, (list, range)) else index


def _wait(name) -> None:
    for frame in reversed(traceback.extract_stack()):
        if "/reference/" in frame.filename:
            waits[f"{name} in {frame.name}, line {frame.lineno}"] += 1
            return
    waits[str(name)] += 1


def _run(func, args, kwargs):
    name, leaves = func.overloadpacket, tree_leaves((args, kwargs))
    tensors = [v for v in leaves if isinstance(v, torch.Tensor)]
    second = [v for v in tensors if isinstance(v, SecondTensor)]
    made = _is_second(kwargs.get("device"))
    to_host = name is aten._to_copy and second and not made and kwargs.get("device") is not None
    if second and name not in MIXED and any(
            v.ndim and not isinstance(v, SecondTensor) for v in tensors):
        raise RuntimeError(f"{func} of tensors on two devices: {[v.device for v in tensors]}")
    if name in WRITES and args[2].ndim and args[0].device != args[2].device:
        raise RuntimeError(f"{func} of a tensor on {args[0].device}, values on {args[2].device}")
    indexed = name is aten.index or name in WRITES
    if indexed and second and not isinstance(args[0], SecondTensor):
        raise RuntimeError("a CPU tensor indexed by one of the second device")
    masked = indexed and any(v is not None and v.dtype == torch.bool for v in args[1])
    if second and (name in READS or to_host or masked and (name is aten.index or args[2].ndim)):
        _wait(name)
    inner_args, inner_kwargs = tree_map(
        lambda v: v.inner if isinstance(v, SecondTensor) else v, (args, kwargs))
    if made:
        inner_kwargs["device"] = "cpu"
    out = func(*inner_args, **inner_kwargs)
    if to_host or not (made or second) or name in (aten._local_scalar_dense, aten.equal):
        return out
    if not func._schema.returns:
        return None
    given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
    written = [given[a.name] for a in func._schema.arguments
               if a.alias_info and a.alias_info.is_write and a.name in given]
    if written:                                     # an in-place operation returns its argument
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(lambda v: SecondTensor(v) if isinstance(v, torch.Tensor) else v, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What does not reach the dispatcher as it is: tensors of lists, and generators."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor) and _is_second(kwargs.get("device")):
            return func(first, dtype=kwargs.get("dtype")).to(DEVICE)
        if isinstance(generator := kwargs.get("generator"), Generator):
            of = next((v for v in tree_leaves(args) if isinstance(v, torch.Tensor)), None)
            device = kwargs.get("device", "cpu" if of is None else of.device)
            if _is_second(device) != isinstance(generator, _SecondGenerator):
                raise RuntimeError(f"{func}: a generator of {generator.device} for {device}")
        return func(*args, **kwargs)


class _SecondGenerator(Generator):
    device = DEVICE

    def __new__(cls, device):
        return Generator.__new__(cls)


class _AnyGenerator(type):
    def __call__(cls, device="cpu"):
        return (_SecondGenerator if _is_second(device) else Generator)(device)

    def __instancecheck__(cls, value):
        return isinstance(value, Generator)


@contextlib.contextmanager
def second_device():
    """Within it tensors and generators can be made on, and moved to, "second"."""
    torch.Generator, before = _AnyGenerator("Generator", (), {}), torch.Generator
    waits.clear()
    try:
        with torch.autograd.set_multithreading_enabled(False), _Dispatch(), _Calls():
            yield DEVICE
    finally:
        torch.Generator = before
