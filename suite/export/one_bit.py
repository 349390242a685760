"""Writes and loads a deployed network as one file, one bit per binary weight. docs/export.md has the format.

    write(path, model, split, Origin(cell=cell, classes=classes))
    model = load_packed(path)                    the network: (B, C, H, W) -> logits (B, classes)

torch and timm are imported only where they are used, because `python -m suite.export --help` imports this module.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import NonNegativeInt, PositiveInt, ValidationError

from suite.errors import UserError
from suite.recipe.cell import Cell
from suite.recipe.settings import Frozen
from suite.run.atomic import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models import Split

FORMAT = "proxbench-1bit"
VERSION: Final = 1


class ExportError(UserError):
    """A network cannot be exported, or a file is not an export."""


class BinaryTensor(Frozen):
    """Describes the tensor that packed bits unpack to."""

    shape: tuple[NonNegativeInt, ...]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]


class Origin(Frozen):
    """Origin of a network. `top1_hard` is a fraction; `commit` identifies the training code."""

    cell: Cell
    classes: tuple[str, ...]
    top1_hard: float | None = None
    commit: str | None = None


class Header(Origin):
    """A file's description of itself: JSON, in the entry FORMAT of the safetensors metadata.

    It is a single entry, because safetensors writes several in an order that differs between processes.
    """

    version: Literal[1] = VERSION
    bit_order: Literal["least significant first"] = "least significant first"
    cell_id: str
    num_classes: PositiveInt
    in_chans: PositiveInt
    image_size: PositiveInt
    binary: dict[str, BinaryTensor]
    weights_sha256: str


def write(path: Path, model: "nn.Module", split: "Split", origin: Origin) -> None:
    """Writes a deployed network atomically; the same network and origin give the same bytes.

    Raises:
        ExportError: a weight of `split.binary` is not exactly -1 or +1, or the file cannot be written.
    """
    from safetensors.torch import save

    from models.catalog import metadata
    from suite.training.trainer import weights_digest

    state = _copies(model)
    in_chans, image_size, _ = metadata(model)["input_size"]
    header = Header(
        **dict(origin),
        cell_id=origin.cell.id,
        num_classes=len(origin.classes),
        in_chans=in_chans,
        image_size=image_size,
        binary={name: _described(state[name]) for name in split.binary},
        weights_sha256=weights_digest(model.state_dict()),
    )
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    tensors = state | {name: _packed(name, state[name]) for name in split.binary}
    try:
        write_bytes(path, save(tensors, {FORMAT: text}))
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror}") from error


def _copies(model: "nn.Module") -> "dict[str, Tensor]":
    """The model's tensors as safetensors requires them: on the CPU, in C order, not sharing memory."""
    import torch

    state = model.state_dict()
    return {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _described(w: "Tensor") -> BinaryTensor:
    return BinaryTensor.model_validate({"shape": tuple(w.shape), "dtype": str(w.dtype).removeprefix("torch.")})


def _packed(name: str, w: "Tensor") -> "Tensor":
    from quantizers.packing import pack

    try:
        return pack(w)
    except ValueError as error:
        raise ExportError(f"{name}: {error}") from error


def load_packed(path: Path) -> "nn.Module":
    """The network in a file: (B, C, H, W) -> logits (B, classes), on the CPU, in evaluation mode, channels last.

    On the same machine, its logits are bit-identical to the deployed network's, which `precision: bf16` computes under
    torch.autocast. Builds the model from the header's cell; runs no code from the file.

    Raises:
        ExportError: the file is not an export, has another version, or is damaged; the message names the fault.
    """
    import torch

    from suite.training.trainer import weights_digest

    header, tensors = _read(path)
    model, split = _blank(path, header)
    expected = model.state_dict()
    for problem, names in {
        "lacks": expected.keys() - tensors.keys(),
        "does not say how to unpack": set(split.binary) - header.binary.keys(),
        "has, unlike its model,": (tensors.keys() - expected.keys()) | (header.binary.keys() - set(split.binary)),
    }.items():
        if names:
            raise ExportError(f"{path}: {problem} {', '.join(sorted(names))}")
    state = {name: _unpacked(path, name, tensor, header) for name, tensor in tensors.items()}
    for name, value in state.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            raise ExportError(f"{path}: {name} is {_shape_of(value)}, its model has {_shape_of(expected[name])}")
    model.load_state_dict(state)
    if weights_digest(model.state_dict()) != header.weights_sha256:
        raise ExportError(f"{path}: damaged: the weights_sha256 of its network differs from its header's")
    # The memory format it was tested in: another may sum in another order.
    return model.to(memory_format=torch.channels_last).eval()


@dataclass(frozen=True)
class Sizes:
    """Sizes of a network's binary tensors and of the whole safetensors file, as float32 and with packed bits."""

    binary_float32_bytes: int
    binary_packed_bytes: int
    file_float32_bytes: int
    file_packed_bytes: int

    @property
    def binary_ratio(self) -> float:
        """How many times smaller the binary tensors are."""
        return self.binary_float32_bytes / self.binary_packed_bytes

    @property
    def file_ratio(self) -> float:
        """How many times smaller the file is."""
        return self.file_float32_bytes / self.file_packed_bytes


def measure(path: Path, model: "nn.Module") -> Sizes:
    """Sizes of an export and of the float32 network it was made from."""
    from safetensors.torch import save

    header, tensors = _read(path)
    state = _copies(model)
    return Sizes(
        sum(state[name].nbytes for name in header.binary),
        sum(tensors[name].nbytes for name in header.binary),
        len(save(state)),
        path.stat().st_size,
    )


def _read(path: Path) -> "tuple[Header, dict[str, Tensor]]":
    """The file's header and its tensors, still packed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: not a whole safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise ExportError(f"{path}: a safetensors file, but not a {FORMAT} one: its metadata has no such entry")
    try:
        fields = json.loads(metadata[FORMAT])
        if (version := fields["version"]) != VERSION:
            raise ExportError(f"{path}: {FORMAT} version {version}; this proxbench reads version {VERSION}")
        return Header.model_validate(fields), tensors
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path}: its header is damaged: {reason(error)}") from error


def _blank(path: Path, header: Header) -> "tuple[nn.Module, Split]":
    """The network of the header's cell, with arbitrary weights."""
    import torch

    import models
    from suite.data.source import Description
    from suite.training.build import build_model

    description = Description(header.classes, header.image_size, header.in_chans)
    try:
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
            model, split = build_model(header.cell, description, None)
    except ValueError as error:
        raise ExportError(f"{path}: its network cannot be built: {reason(error)}") from error
    models.harden_inputs(model)
    if header.cell.quantization.scale != "none":
        for parameter in (dict(model.named_parameters())[name] for name in split.binary):
            parameter.data.fill_(1)
        models.fold_scales(model, split)
    return model, split


def _unpacked(path: Path, name: str, tensor: "Tensor", header: Header) -> "Tensor":
    import torch

    from quantizers.packing import unpack

    if name not in header.binary:
        return tensor
    binary = header.binary[name]
    try:
        return unpack(tensor, binary.shape, getattr(torch, binary.dtype))
    except ValueError as error:
        raise ExportError(f"{path}: {name}: {error}") from error


def _shape_of(tensor: "Tensor") -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def reason(error: Exception) -> str:
    """A one-line description of an error."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(error).splitlines()[0]
