"""ProxConnect: the iterations PC++, PQ and rPC around any torch optimizer.

    base = torch.optim.SGD([{"params": binary, "quantizer": "bnn++", "mu": 2.0}, {"params": rest}], lr=0.1)
    optimizer = ProxConnect(base)

`reference.py` is the same thing written literally.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from quantizers import fused, maps
from quantizers.catalog import get, unknown
from quantizers.groups import Entry, is_quantized, require_trainable

UPDATES = ("pc++", "pq", "rpc")


class ProxConnect(Optimizer):
    """Train quantized weights w = F(w*; mu) through latents w* that `base` moves along B(w*; mu) . grad l.

        pc++   w = F(w*);   w* <- base(w*, B(w*) . grad l(w))    (Lu et al., 2023)
        pq     w = F(w*);   w* <- base(w,  B(w*) . grad l(w))    (ProxQuant; Bai et al., 2018)
        rpc    w = F(w*);   w* <- base(w,  B(w*) . grad l(w*))   (reverse ProxConnect; Dockhorn et al., 2021)

    base(v, g) is one step of the base optimizer from v along g, with its momentum and its decay (which acts on v). The
    literature's ProxConnect, ProxQuant and reverse ProxConnect are these with B = 1 (rows bc and pc). Between steps the
    model's parameters hold w (for rpc: w*, where its gradient is taken), written in place: addresses never change.

    A parameter group that names a "quantizer" is quantized, with sharpness "mu" (default 1.0); its parameters are taken
    to hold w* when they get here. Other groups are the base optimizer's alone. mu may be changed between steps, by
    `SharpnessSchedule` say: F and B use "written_mu", kept in the group, which becomes mu each time w is written. So
    the B that multiplies a gradient has the mu of the F it was taken through.

    w* is float32 (float64 for float64 parameters) whatever the parameter's dtype, and so is the base's state. While it
    steps, `base` holds w* in place of the parameter, so its state is keyed by `latent(p)`. Give `base` away: step, save
    and load through this optimizer, whose `param_groups` and `state` are the base's own.

    As in torch, a parameter without a gradient keeps its w*. A closure is evaluated at w; a base that calls it several
    times in a step (LBFGS) has each point it reaches taken for w*.

    clip_latents: also clip the w* of binary rows to [-1, 1] after each step, as BinaryConnect and BinaryNet do.
    defer: leave the groups alone until adopt(), for an engine that is to put shards in the parameters' place first.
    fused: step quantized groups in one pass over memory where that is possible (`fused.py` has the rule), equal to the
    steps of torch's operations up to rounding; False: never; None: if the latents are on the CPU and many enough.
    Raises ValueError for an unknown update or quantizer or an impossible mu, TypeError for a parameter that is not of
    a real floating dtype.
    """

    def __init__(
        self,
        base: Optimizer,
        update: str = "pc++",
        *,
        clip_latents: bool = False,
        defer: bool = False,
        fused: bool | None = None,
    ) -> None:
        if update not in UPDATES:
            raise ValueError(unknown("update", update, UPDATES))
        for group in base.param_groups:
            require_trainable(group)
        self.base, self.update, self.clip_latents, self.fused = base, update, clip_latents, fused
        self.hardened = False
        self._latents: dict[Tensor, Tensor] = {}
        self._written_mu: dict[Tensor, float] = {}
        super().__setstate__({})  # Optimizer's own way to make its hooks without making groups
        if defer:
            return
        self.adopt()
        if base.state:
            # Adagrad makes its state at birth, under the parameters: hand it over to their latents.
            self._load_base(base.state_dict())

    @torch.no_grad()
    def adopt(self) -> None:
        """Take what the groups' quantized parameters hold for their w*, and write w; ends what `defer` began.

        Under ZeRO these are flat shards: the maps are elementwise, and padding with zeros stays where it is. step() may
        then be called for some of the shards at a time, in groups emptied of the others.
        """
        for group in self.param_groups:
            self._adopt(group)
        self.quantize()

    # The base's own, looked up each time: ZeRO replaces the list of groups while it steps through them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # noqa: ANN401  (torch's defaultdict)
        """The base optimizer's state, keyed by latents where there are any."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    # Stepping

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the iteration; leaves w = F(w*; mu) with the groups' present mu, and p.grad as it was.

        If the base optimizer or the closure raises, the model holds w. RuntimeError on a hardened model.
        """
        if self.hardened:
            raise RuntimeError("the model holds sign(w*), not the w that training goes on from: call soften() first")
        passes = self._passes() if closure is None else []
        with fused.set_aside([group for group, _ in passes]):
            loss = self._step_by_operations(closure)
        for group, entries in passes:
            fused.step(self.base, group, entries, clip_latents=self.clip_latents)
            self._note_mu(group, group["mu"])
        return loss

    def _passes(self) -> list[tuple[dict[str, Any], list[Entry]]]:
        """The groups that are stepped in one pass."""
        if not self._is_fused() or not fused.has_plain_steps(self.base):
            return []
        listed = [(group, list(self._entries_of(group))) for group in self.param_groups if is_quantized(group)]
        return [(group, entries) for group, entries in listed if fused.steps(self.base, group, entries)]

    def _is_fused(self) -> bool:
        return self.update == "pc++" and fused.is_wanted(self.fused, self.base, self._latents)

    @property
    def writes_in_one_pass(self) -> bool:
        """Whether all quantized parameters are stepped and written in one pass: other last bits than otherwise."""
        return self._is_fused() and all(fused.pair_of(entry) is not None for entry in self._entries())

    def _step_by_operations(self, closure: Callable[[], float] | None) -> float | None:
        start = [(entry.latent, entry.latent.clone()) for entry in self._entries() if self.update != "pc++"]
        try:
            loss = self._base_step(closure)
        except BaseException:
            for latent, w_star in start:
                latent.copy_(w_star)
            self.soften()
            raise
        else:
            self._clip()
            self.quantize()
            return loss
        finally:
            for latent in self._latents.values():
                latent.grad = None

    def _base_step(self, closure: Callable[[], float] | None) -> float | None:
        if closure is None:
            self._hand_gradients()
            self._move_to_start()
        with self._in_groups(self._latents):
            return self.base.step(None if closure is None else self._at_w(closure))

    def _at_w(self, closure: Callable[[], float]) -> Callable[[], float]:
        """The closure as the base may call it: evaluated at w, its gradients handed to the latents."""
        parameters = {latent: parameter for parameter, latent in self._latents.items()}
        num_calls = 0

        @torch.no_grad()
        def evaluate() -> float:
            nonlocal num_calls
            with self._in_groups(parameters):
                if num_calls:
                    self.soften()  # the base has moved the latents since
                with torch.enable_grad():
                    loss = closure()
                self._hand_gradients()
                if not num_calls:
                    self._move_to_start()
            num_calls += 1
            return loss

        return evaluate

    def _hand_gradients(self) -> None:
        """latent.grad = B(w*) . p.grad, in the latent's precision."""
        for p, latent, quantizer, mu in self._entries():
            latent.grad = None if p.grad is None else quantizer.backward(latent, mu) * p.grad

    def _move_to_start(self) -> None:
        """Put what the base is to move into the latents: w for pq and rpc. Comes after B, which needs w*."""
        if self.update == "pc++":
            return
        for _, latent, quantizer, mu in self._entries():
            if latent.grad is not None:
                latent.copy_(quantizer.forward(latent, mu))

    def _clip(self) -> None:
        for _, latent, quantizer, _ in self._entries():
            if self.clip_latents and quantizer.binary and latent.grad is not None:
                latent.clamp_(-1, 1)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, sum_over_shards: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Scale all gradients so that the norm of what the base sees (B . grad where quantized) is at most max_norm.

        Returns that norm before scaling. The raw gradients are scaled, in place: B . (c grad) = c (B . grad).

        sum_over_shards: the sum of a number over the processes, where each has its own shards of the parameters.
        """
        self._hand_gradients()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen = [self._latents.get(p, p).grad for p in parameters]
        norm = torch.nn.utils.get_total_norm(
            [g.to(torch.promote_types(g.dtype, torch.float32)) for g in seen if g is not None]
        )
        if sum_over_shards is not None:
            norm = sum_over_shards(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        for latent in self._latents.values():
            latent.grad = None
        return norm

    # What the model holds

    @torch.no_grad()
    def quantize(self) -> None:
        """Write w = F(w*; mu) into the model with the groups' present mu. A hardened model is soft again."""
        for group in self.param_groups:
            if is_quantized(group):
                self._note_mu(group, group["mu"])
        self.soften()

    @torch.no_grad()
    def harden(self) -> None:
        """Write the deployed weights into the model: sign(w*), exactly +-1 (F(w*) for a row that is not binary)."""
        for p, latent, quantizer, mu in self._entries():
            p.copy_(maps.hard_sign(latent, mu) if quantizer.binary else quantizer.forward(latent, mu))
        self.hardened = True

    @torch.no_grad()
    def soften(self) -> None:
        """Write back the w that training goes on from, to the bit. Undoes harden()."""
        is_fused = self._is_fused()
        for entry in self._entries():
            p, latent, quantizer, mu = entry
            if is_fused and fused.pair_of(entry) is not None:
                fused.write(entry, mu)
            else:
                p.copy_(latent if self.update == "rpc" else quantizer.forward(latent, mu))
        self.hardened = False

    def restore(self) -> None:
        """Write w = F(w*; written_mu), after latents and groups were filled in place with those of a saved state."""
        self._trust_groups()
        self.soften()

    def latent(self, parameter: Tensor) -> Tensor:
        """The latents w* of a quantized parameter: the live tensor. ValueError if the parameter is not quantized."""
        if parameter not in self._latents:
            if any(parameter is p for group in self.param_groups if is_quantized(group) for p in group["params"]):
                raise ValueError("latents are deferred: call adopt() once the groups hold what is to be trained")
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has no latents: its group names no quantizer"
            )
        return self._latents[parameter]

    def trained(self, parameter: Tensor) -> Tensor:
        """What the base optimizer moves, and keys its state by: the latents, or the parameter that has none."""
        return self._latents.get(parameter, parameter)

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; if it names a quantizer, its parameters hold w* now and w afterwards."""
        self.base.add_param_group(param_group)
        group = self.base.param_groups[-1]
        try:
            require_trainable(group)
        except (TypeError, ValueError):
            self.base.param_groups.pop()
            raise
        self._adopt(group)
        if self.hardened:
            self.harden()
        else:
            self.soften()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base optimizer's."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base's state, the latents in the order of the groups, and which update they belong to.

        Tensors are references, as in torch. The state is that of training, hardened model or not.
        """
        with self._in_groups(self._latents):
            base = self.base.state_dict()
        return {"update": self.update, "base": base, "latents": [entry.latent for entry in self._entries()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`, to the bit: w*, mu, the base's state, and w = F(w*) in the model.

        ValueError if it is a state of another update, of other quantizers, or of other shapes; nothing is changed then.
        """
        self._refuse_foreign(state_dict)
        self._load_base(state_dict["base"])
        for entry, saved in zip(self._entries(), state_dict["latents"], strict=True):
            entry.latent.copy_(saved)
        self.soften()

    def _refuse_foreign(self, state: Mapping[str, Any]) -> None:
        missing = {"update", "base", "latents"} - set(state)
        if missing:
            raise ValueError(f"not a state of ProxConnect: it has no {', '.join(sorted(missing))}")
        for what, theirs, ours in (
            ("update", state["update"], self.update),
            ("quantizers of the groups", _quantizers(state["base"]["param_groups"]), _quantizers(self.param_groups)),
            ("latent shapes", _shapes(state["latents"]), _shapes([entry.latent for entry in self._entries()])),
        ):
            if theirs != ours:
                raise ValueError(f"the state is another optimizer's: {what}: {theirs} in the state, {ours} here")

    def _load_base(self, state: dict[str, Any]) -> None:
        # With the latents in the groups: the base casts its state to the dtype of what it finds there.
        with self._in_groups(self._latents):
            self.base.load_state_dict(state)
        self._trust_groups()

    def _trust_groups(self) -> None:
        for group in self.param_groups:
            if is_quantized(group):
                self._note_mu(group, group["written_mu"])

    def _adopt(self, group: dict[str, Any]) -> None:
        if not is_quantized(group):
            return
        for p in group["params"]:
            if p not in self._latents:
                self._latents[p] = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        self._note_mu(group, group.setdefault("mu", 1.0))

    def _note_mu(self, group: dict[str, Any], mu: float) -> None:
        """The group's parameters hold, or are about to hold, w = F(w*; mu)."""
        group["written_mu"] = mu
        # Also one by one: the parameters that the group lists now may be some of its shards, the others keep theirs.
        self._written_mu.update(dict.fromkeys(group["params"], mu))

    def _entries(self) -> Iterator[Entry]:
        """The quantized parameters, in the order of the groups."""
        for group in self.param_groups:
            if is_quantized(group):
                yield from self._entries_of(group)

    def _entries_of(self, group: Mapping[str, Any]) -> Iterator[Entry]:
        quantizer = get(group["quantizer"])
        for p in group["params"]:
            yield Entry(p, self.latent(p), quantizer, self._written_mu[p])

    @contextmanager
    def _in_groups(self, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, the groups list stand_ins[p] where they list p outside.

        Not p.data = w*: giving a bfloat16 parameter float32 data drops the gradient hooks that DDP put on it.
        """
        # In place: LBFGS keeps the list itself.
        lists = [group["params"] for group in self.base.param_groups]
        before = [list(tensors) for tensors in lists]
        for tensors in lists:
            tensors[:] = [stand_ins.get(p, p) for p in tensors]
        try:
            yield
        finally:
            for tensors, originals in zip(lists, before, strict=True):
                tensors[:] = originals

    def __getstate__(self) -> dict[str, Any]:
        own = ("base", "update", "clip_latents", "fused", "hardened", "_latents", "_written_mu")
        return {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})


def _quantizers(groups: list[dict[str, Any]]) -> list[str | None]:
    return [group.get("quantizer") for group in groups]


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]
