"""ProxConnect: the iterations PC++, PQ and rPC around any torch optimizer.

    base = torch.optim.SGD([{"params": binary, "quantizer": "bnn++", "mu": 2.0}, {"params": rest}], lr=0.1)
    optimizer = ProxConnect(base)

`reference.py` has the same iterations written literally. `latents.py` lays latents out in memory, `groups.py` reads and
saves parameter groups, `fused/` is the one-pass C++ step.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from quantizers import fused, maps
from quantizers.catalog import QUANTIZERS, Map, Quantizer
from quantizers.groups import (
    StateByParameter,
    cast,
    is_quantized,
    listed,
    named,
    require_same,
    require_trainable,
    row_of,
    saved,
    split,
)
from quantizers.latents import Block, Entry, by_block, entries_of, is_elementwise, with_gradients
from quantizers.names import unknown
from quantizers.sharpness import require_sharpness

UPDATES = ("pc++", "pq", "rpc")


class ProxConnect(Optimizer):
    """Train quantized weights w = F(w*; mu) through latents w* that `base` moves along B(w*; mu) . grad l.

        pc++   w = F(w*);   w* <- base(w*, B(w*) . grad l(w))    (Lu et al., 2023)
        pq     w = F(w*);   w* <- base(w,  B(w*) . grad l(w))    (ProxQuant; Bai et al., 2018)
        rpc    w = F(w*);   w* <- base(w,  B(w*) . grad l(w*))   (reverse ProxConnect; Dockhorn et al., 2021)

    base(v, g) is one step of the base optimizer from v along g, with its momentum and its weight decay (which acts on
    v). The literature's ProxConnect, ProxQuant and reverse ProxConnect are these with B = 1 (rows bc and pc).

    A parameter group with a "quantizer" is quantized. The value is the name of a catalogue row, "module:attribute" for
    your own `Quantizer`, or a `Quantizer` object. The group's sharpness is "mu" (default 1.0). Its parameters must hold
    w* when the group is added. Other groups are left to the base optimizer. Between steps the parameters hold w (for
    rpc: w*, where its gradient is taken), written in place. mu may be changed between steps, for instance by
    `SharpnessSchedule`: the next write of w uses it, and B always uses the mu of the w at which the gradient was taken.

    w* and the base's state are float32 whatever the parameter's dtype (float64 for float64 parameters). `latent(p)`
    returns w*, and `state[p]` the base's state of p. After wrapping, don't use `base` directly: call step(),
    state_dict() and load_state_dict() on this optimizer.

    **If something else writes a parameter** (`model.load_state_dict`, an init, DDP's first broadcast between ranks with
    unequal weights, an EMA copied back), w no longer matches w*, and the next step(), harden(), quantize() or
    state_dict() raises a RuntimeError that names the parameter: call adopt() to use the new values as latents, or
    soften() to discard them. Rewriting the values that w already has is allowed, so that a checkpoint's model and
    optimizer can be loaded in either order. Writes are detected by torch's version counter, which `p.data.copy_()` and
    `p.data.add_()` bypass: after those, call adopt() yourself.

    As in torch, a parameter without a gradient keeps its w*. A closure is evaluated at w. If the base evaluates it
    several times per step (LBFGS), each point that it tries is used as w* and the loss is evaluated at F(w*).

    A group with "scale": "tensor" or "channel" has weights -s or +s, with s = mean |w*| of each parameter or of each
    output channel: w = s F(w* / s; mu), with B(w* / s; mu). See `quantizers.scales`.

    Args:
        base: any torch optimizer, made for the same groups.
        update: "pc++", "pq" or "rpc".
        clip_latents: also clip the w* of binary rows to [-1, 1] after each step, as BinaryConnect and BinaryNet do.
        fused: True: step quantized groups in one pass of compiled C++ (CPU; SGD or AdamW), or raise. False: use torch's
            operations. None: fuse on the CPU from 65,536 latents up, if possible. Results are equal up to rounding.

    Raises:
        ValueError: unknown update, quantizer or scale; mu negative or not finite; a base with `differentiable=True`;
            `clip_latents` with a scale; or `fused=True` where the fused step is unavailable (the message says why).
        TypeError: a quantized parameter is not of a real floating dtype.

    Example:
        >>> binary = [p for p in model.parameters() if p.ndim > 1]
        >>> rest = [p for p in model.parameters() if p.ndim <= 1]
        >>> base = torch.optim.AdamW([{"params": binary, "quantizer": "bnn++", "mu": 2.0}, {"params": rest}], lr=1e-3)
        >>> optimizer = ProxConnect(base)
        >>> model(images).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.harden()  # the network that is deployed: every quantized weight is -1 or +1
    """

    @torch.no_grad()
    def __init__(
        self, base: Optimizer, update: str = "pc++", *, clip_latents: bool = False, fused: bool | None = None
    ) -> None:
        if update not in UPDATES:
            raise ValueError(unknown("update", update, UPDATES))
        for group in base.param_groups:
            require_trainable(group, clip_latents=clip_latents)
        self.base, self.update, self.clip_latents, self.fused = base, update, clip_latents, fused
        super().__setstate__({})  # creates Optimizer's hooks without creating groups
        self._entries: dict[Tensor, Entry] = {}
        self._attach()
        for group in self._quantized():
            reason = self._obstacle(group) if fused else None
            if reason is not None:
                raise ValueError(f"fused=True: {reason}")
        for group in self._quantized():
            self._write(row_of(group), self._entries_of(group), group["mu"])

    # Groups and state are the base's own, looked up each time: DeepSpeed's ZeRO replaces the list while it steps.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property  # type: ignore[override]  # torch has an attribute, a defaultdict
    def state(self) -> StateByParameter:
        """The base optimizer's state, keyed by parameters: `state[p]["momentum_buffer"]`."""
        return StateByParameter(self.base.state, self._entries)

    @state.setter
    def state(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        values = dict(state)
        self.base.state = defaultdict(dict)
        self.state.update(values)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    def latent(self, parameter: Tensor) -> Tensor:
        """The latents w* of a quantized parameter (the tensor itself). ValueError if the parameter is not quantized."""
        return self._entry(parameter).latent

    # Stepping

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one step of the iteration and write w = F(w*; mu) with the groups' current mu. p.grad is not changed.

        If the base optimizer or the closure raises, the model is left holding w.

        Raises:
            RuntimeError: the model is hardened; something else wrote a parameter; or `fused=True` and this step cannot
                be fused.
            ValueError: a group's mu is negative or not finite.
        """
        if self.hardened:
            raise RuntimeError("the model is hardened: it holds the deployed weights, not w; call soften() first")
        self._require_own_writes()
        if closure is None or not is_elementwise(self.base):
            return self._step(closure)
        with torch.enable_grad():
            loss = closure()  # as these bases do: once, before anything else
        self._step(None)
        return loss

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        parts = [self._part(group, closure) for group in self.param_groups]
        loss = self._step_base(parts, closure)
        for part in parts:
            if part.is_fused:
                fused.step(self.base, part.group, part.quantizer, part.entries, clip_latents=self.clip_latents)
            elif part.entries:
                for block in part.blocks:
                    block.scatter(self.base.state)
                    if self.clip_latents and part.quantizer.binary:
                        block.w_star.clamp_(-1, 1)
                self._write(part.quantizer, part.entries, part.group["mu"])
        return loss

    def _part(self, group: dict[str, Any], closure: object) -> "_Part":
        """How this step treats the group."""
        if not is_quantized(group):
            return _Part(group, list(group["params"]))
        quantizer, entries = row_of(group), self._entries_of(group)
        if self.fused or self._is_fused():
            reason = "the base may evaluate its closure several times" if closure else self._obstacle(group)
            if reason is None:
                return _Part(group, [], quantizer, entries, is_fused=True)
            if self.fused:
                raise RuntimeError(f"fused=True: {reason}")
        if closure is not None:
            blocks = [entry.alone() for entry in entries]
        else:
            blocks = [each for block in with_gradients(entries) for each in block.gathered(self.base.state)]
        return _Part(group, [block.w_star for block in blocks], quantizer, entries, blocks)

    def _step_base(self, parts: "Sequence[_Part]", closure: Callable[[], float] | None) -> float | None:
        """Run the base's step with latents in place of the quantized parameters."""
        moved = [(part.quantizer, block) for part in parts for block in part.blocks]
        start = [] if self.update == "pc++" else [(block, block.w_star.clone()) for _, block in moved]
        try:
            evaluate = None if closure is None else self._at_w(closure, moved)
            if closure is None:
                self._hand_gradients(moved, at_start=True)
            with listed(self.base, [part.seen for part in parts]):
                return self.base.step(evaluate)
        except BaseException:
            for block, w_star in start:
                block.w_star.copy_(w_star)
            for _, block in moved:
                block.forget(self.base.state)
            self.soften()
            raise
        finally:
            for _, block in moved:
                block.w_star.grad = None

    def _hand_gradients(self, moved: "Sequence[tuple[Quantizer, Block]]", *, at_start: bool) -> None:
        """Set each block's gradient to B(w*) . grad; at the start of a pq or rpc step (it moves from w), set w* = w."""
        for quantizer, block in moved:
            if block.entries[0].parameter.grad is None:  # only with a closure
                block.w_star.grad = None
                continue
            block.w_star.grad = block.take_product(quantizer.backward)
            if at_start and self.update != "pc++":
                block.w_star.copy_(quantizer.forward(block.w_star, block.entries[0].mu))

    def _at_w(self, closure: Callable[[], float], moved: "Sequence[tuple[Quantizer, Block]]") -> Callable[[], float]:
        """Wrap the closure for the base: evaluate it at w and pass its gradients to the latents."""
        parameters = [list(group["params"]) for group in self.param_groups]
        num_calls = 0

        @torch.no_grad()
        def evaluate() -> float:
            nonlocal num_calls
            with listed(self.base, parameters):
                if num_calls:
                    self.soften()  # the base has moved the latents since
                with torch.enable_grad():
                    loss = closure()
            self._hand_gradients(moved, at_start=not num_calls)
            num_calls += 1
            return loss

        return evaluate

    def _is_fused(self) -> bool:
        latents = (entry.latent for entry in self._entries.values())
        return self.update == "pc++" and fused.is_wanted(self.fused, self.base, latents)

    def _obstacle(self, group: Mapping[str, Any]) -> str | None:
        return fused.obstacle(self.base, self.update, group, row_of(group), self._entries_of(group))

    @property
    def is_fused(self) -> bool:
        """Whether every quantized parameter uses the fused step, which differs from the eager step in the last bits.

        False if nothing is quantized.
        """
        entries = [(row_of(group), entry) for group in self._quantized() for entry in self._entries_of(group)]
        return bool(entries) and self._is_fused() and all(fused.pair_of(*each) is not None for each in entries)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, sum_over_shards: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Scale all gradients so that the norm of B . grad (of grad, for unquantized parameters) is at most max_norm.

        Returns the norm before scaling, in float32 or better. Like `torch.nn.utils.clip_grad_norm_`, it scales p.grad
        in place, which is enough since B . (c grad) = c (B . grad). The next step reuses the products computed here.

        sum_over_shards: sums a number over the processes, if each has its own shards of the parameters.
        """
        products: list[tuple[Block, Tensor]] = []
        for group in self._quantized():
            quantizer, entries = row_of(group), self._entries_of(group)
            is_fused = self._is_fused() and not self._obstacle(group)
            for block in with_gradients(entries):
                block.drop_product()
                taken = fused.take_product(quantizer, block) if is_fused else block.take_product(quantizer.backward)
                products.append((block, taken))
        plain = [p.grad for group in self.param_groups if not is_quantized(group) for p in group["params"]]
        seen = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in plain if g is not None]
        norm = torch.nn.utils.get_total_norm([product for _, product in products] + seen)
        if sum_over_shards is not None:
            norm = sum_over_shards(norm.square()).sqrt()
        clipped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(clipped, max_norm, norm)
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # the factor that this function has applied
        for block, product in products:
            block.keep_product(product, scale)
        return norm

    @torch.no_grad()
    def latent_gradient(self, parameter: Tensor) -> Tensor:
        """B(w*; mu) . grad of a quantized parameter: the gradient that the base optimizer will see.

        mu is the one its current w was written with. ValueError if the parameter is not quantized or has no gradient.
        """
        entry = self._entry(parameter)
        if parameter.grad is None:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no gradient")
        row = next(row_of(group) for group in self._quantized() if any(p is parameter for p in group["params"]))
        return row.backward(entry.latent, entry.mu) * parameter.grad

    # What the model holds

    @torch.no_grad()
    def quantize(self) -> None:
        """Write w = F(w*; mu) into the model with the groups' current mu. A hardened model becomes soft again.

        Raises:
            RuntimeError: something else wrote a parameter.
            ValueError: a group's mu is negative or not finite.
        """
        self._require_own_writes()
        for group in self._quantized():
            self._write(row_of(group), self._entries_of(group), group["mu"])

    @torch.no_grad()
    def adopt(self) -> None:
        """Use each quantized parameter's current value as its latent w*, then overwrite it with w = F(w*; mu).

        Call it after something else has written parameters. It applies to all quantized parameters: if one still holds
        w, that w becomes its w*. The base's state (momentum, for instance) is kept. Under DDP, call it on every rank.
        """
        for group in self._quantized():
            require_sharpness(group["mu"])
        for group in self._quantized():
            for entry in self._entries_of(group):
                entry.latent.copy_(entry.parameter)
            self._write(row_of(group), self._entries_of(group), group["mu"])

    @torch.no_grad()
    def harden(self) -> None:
        """Write the deployed weights into the model: sign(w*), exactly +-1 (F(w*) for a row that is not binary).

        In a group with a scale, the weights are -s and +s. NaN stays NaN. RuntimeError if something else wrote a
        parameter.
        """
        self._require_own_writes()
        for group in self._quantized():
            f = self._map_of(row_of(group), is_hard=True)
            for block, entries in by_block(self._entries_of(group)):
                block.write(entries, f, None, is_hard=True)

    @property
    def hardened(self) -> bool:
        """Whether the model holds its deployed weights."""
        # Kept in the entries, which a wrapper around this optimizer (Lightning's) shares with it.
        return any(entry.is_hard for entry in self._entries.values())

    @torch.no_grad()
    def soften(self) -> None:
        """Restore w from the latents, bit-exactly. Undoes harden() and writes by anything else."""
        for group in self._quantized():
            self._write(row_of(group), self._entries_of(group), None)

    def _map_of(self, quantizer: Quantizer, *, is_hard: bool) -> Map:
        """The map from w* and mu to the values that the parameters hold."""
        if is_hard:
            return quantizer.deployed
        return maps.identity if self.update == "rpc" and not is_hard else quantizer.forward

    def _write(self, quantizer: Quantizer, entries: Sequence[Entry], mu: float | None) -> None:
        """Write w = F(w*; mu) (w* itself for rpc); mu=None reuses the mu of each parameter's last write."""
        is_fused = self._is_fused()
        for block, own in by_block(entries):
            if is_fused and all(fused.pair_of(quantizer, entry) for entry in own):
                fused.write(quantizer, own, mu)
            else:
                block.write(own, self._map_of(quantizer, is_hard=False), mu)

    def _require_own_writes(self) -> None:
        """Raise if a parameter no longer holds the value we last wrote, or if a mu is invalid."""
        foreign: list[str] = []
        for number, group in enumerate(self.param_groups):
            if not is_quantized(group):
                continue
            require_sharpness(group["mu"])
            for name, p in named(group, number):
                entry = self._entry(p)
                if entry.was_written_by_others:
                    f = self._map_of(row_of(group), is_hard=entry.is_hard)
                    foreign += [] if entry.still_holds(f, name) else [name]
        if foreign:
            others = f" and {len(foreign) - 1} more" if foreign[1:] else ""
            raise RuntimeError(
                f"{foreign[0]}{others}: no longer F(w*); something else wrote it (load_state_dict, an init; or DDP's "
                "first broadcast: make the optimizer after DistributedDataParallel). Call adopt() to use the new "
                "values as latents, or soften() to discard them."
            )

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. If it names a quantizer, its parameters hold w* now and w afterwards."""
        self.base.add_param_group(param_group)
        group = self.base.param_groups[-1]
        try:
            require_trainable(group, clip_latents=self.clip_latents)
        except (TypeError, ValueError):
            self.base.param_groups.pop()
            raise
        was_hard = self.hardened
        self._attach()
        if is_quantized(group):
            with torch.no_grad():
                self._write(row_of(group), self._entries_of(group), group["mu"])
        if was_hard:
            self.harden()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Torch's format: {"state": {index: {...}}, "param_groups": [...]}. Tensors are references, as in torch.

        A quantized parameter's state has "w_star" and "mu" (the mu of its current w) besides the base's entries. Its
        group has "update", and a `Quantizer` object is saved by its name. Hardening the model does not change the
        state. RuntimeError if something else wrote a parameter.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._require_own_writes()
        state_dict = saved(self.param_groups, self.state, self._entries, self.update)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict`, bit-exactly: restore w*, mu, the base's state, and w = F(w*) in the model.

        ValueError if its update, quantizers, scales or shapes differ from this optimizer's; nothing is changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        require_same(state_dict, self.param_groups, self._entries, self.update)
        of_base, latents = split(state_dict, self.param_groups, self._entries)
        keys = [[self._entries[p].latent if p in self._entries else p for p in g["params"]] for g in self.param_groups]
        # With the latents in the groups: the base casts its state to the dtype of the tensors listed there.
        with listed(self.base, keys):
            self.base.load_state_dict(of_base)
        for entry, w_star, mu in latents:
            entry.latent.copy_(w_star)
            entry.mu = mu
        self.soften()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _attach(self, held: Mapping[Tensor, tuple[Tensor, float, bool, bool]] = MappingProxyType({})) -> None:
        """Create latents for the quantized parameters that have none, from `held` or from the parameters' values.

        held: parameter -> (w*, the mu its w was written with, whether it is hard, whether something else wrote it).
        """
        for group in self._quantized():
            mu = group.setdefault("mu", 1.0)
            group.setdefault("scale", "none")
            is_joined = row_of(group).scale == "none" and is_elementwise(self.base)
            new = [p for p in dict.fromkeys(group["params"]) if p not in self._entries]
            values = [held[p][0] if p in held else p.detach() for p in new]
            for entry in entries_of(new, values, joined=is_joined):
                p = entry.parameter
                _, entry.mu, entry.is_hard, is_foreign = held.get(p, (None, mu, False, False))
                if not is_foreign:
                    entry.sign_off(is_hard=entry.is_hard)
                self._entries[p] = entry
                if p in self.base.state:
                    # A base that creates its state at construction (Adagrad) has keyed it by the parameter.
                    self.base.state[entry.latent] = cast(self.base.state.pop(p), p, entry.latent.dtype)

    def _quantized(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if is_quantized(group)]

    def _entries_of(self, group: Mapping[str, Any]) -> list[Entry]:
        return [self._entry(p) for p in group["params"]]

    def _entry(self, parameter: Tensor) -> Entry:
        if parameter not in self._entries:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no latents: it is not quantized here")
        return self._entries[parameter]

    def __getstate__(self) -> dict[str, Any]:
        """Parameters, latents and the base's state, views as copies: pickling a view would store its whole block."""
        base = copy.copy(self.base)
        base.state = defaultdict(dict)
        for key, state in self.state.items():
            base.state[key] = {name: v.clone() if isinstance(v, Tensor) else v for name, v in state.items()}
        own = {name: self.__dict__[name] for name in ("update", "clip_latents", "fused")}
        held = [
            (p, entry.latent.clone(), entry.mu, entry.is_hard, entry.was_written_by_others)
            for p, entry in self._entries.items()
        ]
        return {**own, "base": base, "held": held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        held = {p: rest for p, *rest in state.pop("held")}
        self.__dict__.update(state)
        super().__setstate__({})
        self._entries = {}
        self._attach(held)


@dataclass
class _Part:
    """How a step treats one group: the tensors that the base sees and, for a quantized group, everything else."""

    group: dict[str, Any]
    seen: list[Tensor]
    quantizer: Quantizer = QUANTIZERS["fp"]
    entries: Sequence[Entry] = ()
    blocks: Sequence[Block] = ()
    is_fused: bool = False
