"""A GPU that is not there: tensors that say they are on it, computed on the CPU; mixing the two devices is an error."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from typing_extensions import Self

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default}
"""On a GPU, index tensors may lie on the CPU: torch copies them, which makes the CPU wait. Told, and not refused."""


class OnGpu(Tensor):
    """A tensor on the pretended GPU; `held` is the same on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: "type[OnGpu]", held: Tensor) -> "OnGpu":  # noqa: PYI034  (torch's constructor)
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=GPU, strides=held.stride()
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,  # noqa: ANN401  (torch's)
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """After the mode has been left: as in it, uncounted."""
        return PretendGpu().__torch_dispatch__(func, types, args, kwargs)


class PretendGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, `device=GPU` works: operands of one device give results on it, of two devices a RuntimeError.

    `waits` are the operations after which a real GPU would have been waited for: values read, tensors brought back,
    memory that is not pinned taken along. `num_launches` counts operations that compute something: a kernel or more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.num_launches = 0

    def __enter__(self) -> Self:
        self._looked_for_a_driver = torch.cuda._lazy_init
        if not torch.cuda.is_available():
            torch.cuda._lazy_init = lambda: None
        torch._C._ensureCUDADeviceGuardSet()  # as torch's FakeTensorMode does
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.cuda._lazy_init = self._looked_for_a_driver

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  (torch's)
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Runs one operation on the CPU and puts its results where a GPU would have."""
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        on_gpu = [each for each in tensors if isinstance(each, OnGpu)]
        target = kwargs.get("device")
        goes_to_gpu = torch.device(target).type == "cuda" if target is not None else bool(on_gpu)
        if func is _aten.copy_.default:
            goes_to_gpu = isinstance(args[0], OnGpu)
        self._judge(func, args, tensors, on_gpu, goes_to_gpu=goes_to_gpu)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map_only(OnGpu, lambda each: each.held, (args, kwargs))
        result = func(*args, **kwargs)
        if (on_gpu or goes_to_gpu) and not _is_view(func):
            self.num_launches += 1
        written = {id(each.held): each for each in on_gpu}
        if not goes_to_gpu:
            return result
        return tree_map_only(Tensor, lambda each: written[id(each)] if id(each) in written else OnGpu(each), result)

    def _judge(
        self,
        func: Any,  # noqa: ANN401
        args: Any,  # noqa: ANN401
        tensors: list[Tensor],
        on_gpu: list[OnGpu],
        *,
        goes_to_gpu: bool,
    ) -> None:
        on_cpu = [each for each in tensors if not isinstance(each, OnGpu) and each.dim()]
        if func is _aten._local_scalar_dense.default and on_gpu:
            self.waits.append("a value is read")
        if func in _MOVES:
            if on_gpu and not goes_to_gpu:
                self.waits.append("a tensor is brought back")
            return
        if func in _INDEXED and on_gpu and isinstance(args[0], OnGpu):
            if on_cpu:
                self.waits.append("an index is taken along")
            return
        if on_gpu and on_cpu:
            raise RuntimeError(f"{func}: operands on the GPU and on the CPU: {[each.shape for each in tensors]}")


def _is_view(func: Any) -> bool:  # noqa: ANN401
    """Whether the operation's result is its argument's memory, looked at otherwise."""
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.arguments)
