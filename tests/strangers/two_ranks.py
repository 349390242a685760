"""Two-process programs that each test a claim; rank r writes its verdicts to FOLDER/r.json.

torchrun --nproc-per-node 2 tests/strangers/two_ranks.py FOLDER
"""

import copy
import datetime as dt
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import page
import pytest
import torch
import torch.distributed as dist
from literal_loop import (
    Batches,
    adamw,
    assert_equal_weights,
    batches,
    clipped_at_the_step,
    criterion,
    groups,
    literal,
    network,
    sgd,
    tolerance,
    train,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from quantizers import ProxConnect, get

DTYPES = {False: torch.float64, True: torch.float32}


def my_half(batches: Batches) -> Batches:
    """The half of each batch that this rank sees: the mean of the ranks' gradients is the whole batch's."""
    rank = dist.get_rank()
    return [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches]


def assert_equal_on_all_ranks(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(found, value.contiguous())
        assert torch.equal(*found), f"{name} is not the same on all ranks"


def ddp_before_the_optimizer(fused: bool) -> None:
    """Unequal seeds: DDP's first broadcast comes before the latents are taken."""
    dtype = DTYPES[fused]
    model, twin = network(dtype, seed=dist.get_rank()), network(seed=0)
    ddp = DistributedDataParallel(model)
    train(ddp, ProxConnect(adamw(model), fused=fused), my_half(batches(dtype)))
    train(twin, literal(adamw(twin)), batches())
    assert_equal_weights(model, twin, tolerance(dtype))
    assert_equal_on_all_ranks(model)


def ddp_after_the_optimizer_with_equal_seeds(fused: bool) -> None:
    dtype = DTYPES[fused]
    model, twin = network(dtype), network()
    optimizer = ProxConnect(sgd(model), fused=fused)
    train(DistributedDataParallel(model), optimizer, my_half(batches(dtype)))
    train(twin, literal(sgd(twin)), batches())
    assert_equal_weights(model, twin, tolerance(dtype))
    assert_equal_on_all_ranks(model)


def ddp_after_the_optimizer_with_unequal_seeds(fused: bool) -> None:
    """Ranks whose weights were overwritten refuse to step. adopt() on all ranks makes them equal."""
    dtype = DTYPES[fused]
    model = network(dtype, seed=dist.get_rank())
    optimizer = ProxConnect(sgd(model), fused=fused)
    ddp = DistributedDataParallel(model)
    if dist.get_rank() != 0:
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 and 1 more.* no longer.*DDP's first broadcast"):
            optimizer.step()
    optimizer.adopt()
    train(ddp, optimizer, my_half(batches(dtype)))
    assert_equal_on_all_ranks(model)

    twin = network(seed=0)
    literal(sgd(twin))  # writes w = F(w*)
    train(twin, literal(sgd(twin)), batches())  # the latents from here on
    assert_equal_weights(model, twin, tolerance(dtype))


def ddp_that_accumulates_without_synchronising(fused: bool) -> None:
    dtype = DTYPES[fused]
    model, twin = network(dtype), network()
    ddp = DistributedDataParallel(model)
    optimizer = ProxConnect(sgd(model), fused=fused)
    for i, (x, y) in enumerate(my_half(batches(dtype))):
        if i % 2 == 0:
            with ddp.no_sync():
                criterion(ddp(x), y).backward()
        else:
            criterion(ddp(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    base = literal(sgd(twin))
    for i, (x, y) in enumerate(batches()):
        criterion(twin(x), y).backward()
        if i % 2 == 1:
            base.step()
            base.zero_grad()
    assert_equal_weights(model, twin, tolerance(dtype))


# Sharded parameters, 256 x 256 or larger: from that size the fused step is used automatically if possible.


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.hidden(torch.tanh(self.stem(x)))))
        return logits


def wide(dtype: torch.dtype) -> Wide:
    torch.manual_seed(0)
    return Wide().to(dtype)


def wide_sgd(model: nn.Module) -> Optimizer:
    return SGD(groups(model), lr=0.01, momentum=0.9)


def gathered(p: Tensor) -> Tensor:
    whole: Tensor = p.full_tensor() if isinstance(p, DTensor) else p
    return whole


def assert_equal_when_gathered(model: nn.Module, twin: nn.Module, atol: float) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(gathered(p).double(), q, rtol=0, atol=atol, msg=f"{name} differs")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def fsdp2(dtype: torch.dtype) -> None:
    model, twin = wide(dtype), wide(torch.float64)
    fully_shard(model.hidden, mesh=mesh())
    fully_shard(model, mesh=mesh())
    optimizer = ProxConnect(wide_sgd(model))
    assert not optimizer.is_fused
    train(model, optimizer, my_half(batches(dtype)))
    train(twin, literal(wide_sgd(twin)), batches())
    assert_equal_when_gathered(model, twin, tolerance(dtype))
    optimizer.harden()
    assert gathered(model.hidden.weight).abs().eq(1).all()


def fsdp2_clipped() -> None:
    """The norm covers all shards."""
    dtype = torch.float64
    model, twin = wide(dtype), wide(dtype)
    fully_shard(model, mesh=mesh())
    optimizer, base = ProxConnect(wide_sgd(model)), literal(wide_sgd(twin))
    clipped_at_the_step(base, 0.1)
    for x, y in my_half(batches(dtype)):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    train(twin, base, batches())
    assert_equal_when_gathered(model, twin, tolerance(dtype))


def fsdp2_weights_loaded_after_the_optimizer() -> None:
    dtype = torch.float64
    model, twin = wide(dtype), wide(dtype)
    fully_shard(model, mesh=mesh())
    optimizer = ProxConnect(wide_sgd(model))
    pretrained = {name: value + 0.1 for name, value in twin.state_dict().items()}
    twin.load_state_dict(pretrained)
    whole = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_model_state_dict(model, pretrained, options=whole)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 and 2 more.* no longer "):
        optimizer.step()
    optimizer.adopt()
    train(model, optimizer, my_half(batches(dtype)))
    train(twin, literal(wide_sgd(twin)), batches())
    assert_equal_when_gathered(model, twin, tolerance(dtype))


def fsdp2_cannot_be_fused() -> None:
    model = wide(torch.float32)
    fully_shard(model, mesh=mesh())
    with pytest.raises(ValueError, match="fused=True: "):
        ProxConnect(wide_sgd(model), fused=True)


def fsdp2_resumed_from_a_checkpoint_by_names(*, full: bool) -> None:
    """Saved in shards and gathered: latents are sharded tensors like the base's state."""
    dtype, options = torch.float64, dcp.StateDictOptions(full_state_dict=full)
    model, resumed, twin = wide(dtype), wide(dtype), wide(dtype)
    for each in (model, resumed):
        fully_shard(each, mesh=mesh())
    optimizer, again = ProxConnect(wide_sgd(model)), ProxConnect(wide_sgd(resumed))
    train(model, optimizer, my_half(batches(dtype)[:4]))
    of_model, of_optimizer = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=options))
    dcp.set_state_dict(resumed, again, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    train(resumed, again, my_half(batches(dtype)[4:]))
    train(twin, literal(wide_sgd(twin)), batches())
    assert_equal_when_gathered(resumed, twin, tolerance(dtype))


def distributed_tensors() -> None:
    """One weight sharded by rows, one replicated, without FSDP; every rank sees every batch."""
    dtype = torch.float64
    model: Any = wide(dtype)
    twin = wide(dtype)
    for module, placement in ((model.hidden, Shard(0)), (model.stem, Replicate()), (model.head, Replicate())):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh(), [placement])))
    replicated = [
        (distribute_tensor(x, mesh(), [Replicate()]), distribute_tensor(y, mesh(), [Replicate()]))
        for x, y in batches(dtype)
    ]
    train(model, ProxConnect(wide_sgd(model)), replicated)
    train(twin, literal(wide_sgd(twin)), batches())
    assert_equal_when_gathered(model, twin, tolerance(dtype))


# The page's own snippets. The process group exists already and is kept.


def snippet(heading: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(dist, "init_process_group", lambda _: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    names = page.given()
    page.run(heading, names)
    return names


def page_of_ddp() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_equal_on_all_ranks(snippet("DDP", monkeypatch)["model"])


def page_of_fsdp2() -> None:
    """The file that the snippet saves has unsharded latents, and they match its weights."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        snippet("FSDP2", monkeypatch)
    state = torch.load("last.pt", weights_only=True)
    for name, shape in (("0.weight", (16, 8)), ("2.weight", (4, 16))):
        w_star, mu = (state["optimizer"]["state"][name][key] for key in ("w_star", "mu"))
        assert w_star.shape == shape
        torch.testing.assert_close(state["model"][name], get("bnn++").forward(w_star, mu))


PROGRAMS: dict[str, Callable[[], None]] = {
    **{
        f"{program.__name__}[{'fused' if fused else 'eager'}]": partial(program, fused)
        for program in (
            ddp_before_the_optimizer,
            ddp_after_the_optimizer_with_equal_seeds,
            ddp_after_the_optimizer_with_unequal_seeds,
            ddp_that_accumulates_without_synchronising,
        )
        for fused in (False, True)
    },
    "fsdp2[float64]": partial(fsdp2, torch.float64),
    "fsdp2[float32]": partial(fsdp2, torch.float32),
    "fsdp2_resumed_from_a_checkpoint[shards]": partial(fsdp2_resumed_from_a_checkpoint_by_names, full=False),
    "fsdp2_resumed_from_a_checkpoint[full]": partial(fsdp2_resumed_from_a_checkpoint_by_names, full=True),
    "fsdp2_clipped": fsdp2_clipped,
    "fsdp2_weights_loaded_after_the_optimizer": fsdp2_weights_loaded_after_the_optimizer,
    "fsdp2_cannot_be_fused": fsdp2_cannot_be_fused,
    "distributed_tensors": distributed_tensors,
    "page_of_ddp": page_of_ddp,
    "page_of_fsdp2": page_of_fsdp2,
}


def main(folder: Path) -> None:
    os.chdir(folder)  # the page's snippets write files
    dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    verdicts = {}
    for name, program in PROGRAMS.items():
        try:
            program()
            verdicts[name] = "holds"
        except Exception:  # noqa: BLE001  (reported by the test)
            verdicts[name] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(verdicts), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
