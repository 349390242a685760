"""The catalogue: an algorithm is a row. To add one, add it here; optimizer and conformance suite find it.

A row is principled, that is PC++ with it is ProxConnect with proximal map P on the loss l(T(.)), if F = T o P and
B = T' o P (Lu et al., "Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers",
NeurIPS 2023). A row without P and T has no such pair: BNN+'s F is flat where its B varies.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from quantizers import maps
from quantizers.sharpness import Constant, Cosine, Exponential, Linear, Shape

Map = Callable[[Tensor, float], Tensor]
"""(w*, mu) -> a tensor of the shape, dtype and device of w*, elementwise."""


@dataclass(frozen=True)
class Quantizer:
    """A forward-backward pair: w = F(w*; mu) is what the network computes with, B(w*; mu) multiplies its gradient.

    `prox` and `transform` are P and T with F = T o P and B = T' o P, or None where no such pair exists. `binary` says
    what is deployed: sign(w*), or for full precision F(w*). `usual_mu` is how mu moves over training in the row's
    paper, or by our choice where the comment says so; None where F and B ignore mu. `completes` names the row of which
    this one keeps B and takes for F its integral, so that the pair becomes principled.
    """

    name: str
    forward: Map
    backward: Map
    prox: Map | None
    transform: Map | None
    citation: str
    binary: bool = True
    usual_mu: Shape | None = None
    completes: str | None = None

    @property
    def uses_mu(self) -> bool:
        """Whether F or B depends on mu."""
        return self.usual_mu is not None


def _completion(name: str, of: str, forward: Map, backward: Map, usual_mu: Shape, citation: str = "") -> Quantizer:
    """The row that keeps B of the row `of` and takes F(w*) = integral of B from 0 to w*: P = id, T = F."""
    return Quantizer(
        name=name,
        forward=forward,
        backward=backward,
        prox=maps.identity,
        transform=forward,
        citation=citation or f"ours: the completion of {of}, as bnn++ is that of bnn+",
        usual_mu=usual_mu,
        completes=of,
    )


_GROWING = Exponential(1.0, 500.0)  # ours: F ends as a sign


_ROWS = (
    Quantizer(
        name="fp",
        forward=maps.identity,
        backward=maps.ones,
        prox=maps.identity,
        transform=maps.identity,
        citation="full precision: the baseline, gradient descent itself",
        binary=False,
    ),
    Quantizer(
        name="bc",
        forward=maps.hard_sign,
        backward=maps.ones,
        prox=maps.hard_sign,
        transform=maps.identity,
        citation="Courbariaux, Bengio, David: BinaryConnect, NeurIPS 2015",
    ),
    Quantizer(
        name="pc",
        forward=maps.piecewise_linear,
        backward=maps.ones,
        prox=maps.piecewise_linear,
        transform=maps.identity,
        citation="Dockhorn et al.: Demystifying and Generalizing BinaryConnect, NeurIPS 2021 (arXiv 2110.13220)",
        usual_mu=Linear(0.0, 1.0),
    ),
    Quantizer(
        name="hardtanh",
        forward=maps.clip,
        backward=maps.ones,
        prox=maps.clip,
        transform=maps.identity,
        citation="ProxConnect with the projection onto [-1, 1], which is pc held at rho = 0 (Dockhorn et al., 2021)",
    ),
    Quantizer(
        name="bnn",
        forward=maps.hard_sign,
        backward=maps.clip_derivative,
        prox=maps.outward,
        transform=maps.clip,
        citation="Courbariaux et al.: BinaryNet, 2016",
    ),
    _completion("clip++", "bnn", maps.sharp_clip, maps.sharp_clip_derivative, _GROWING),
    Quantizer(
        name="bnn+",
        forward=maps.hard_sign,
        backward=maps.sign_swish_derivative,
        prox=None,
        transform=None,
        citation="Darabi et al.: BNN+, 2018 (arXiv 1812.11800)",
        usual_mu=Constant(5.0),
    ),
    _completion(
        "bnn++",
        "bnn+",
        maps.sign_swish,
        maps.sign_swish_derivative,
        Exponential(2.0, 500.0),  # ours
        "Lu, Yu, Li, Partovi Nia: Understanding Neural Network Binarization with Forward and Backward "
        "Proximal Quantizers, NeurIPS 2023 (arXiv 2402.17710)",
    ),
    Quantizer(
        name="bireal",
        forward=maps.hard_sign,
        backward=maps.approx_sign_derivative,
        prox=None,
        transform=None,
        citation="Liu et al.: Bi-Real Net, ECCV 2018 (arXiv 1808.00278), whose ApproxSign is for activations",
        usual_mu=Constant(1.0),
    ),
    _completion("bireal++", "bireal", maps.approx_sign, maps.approx_sign_derivative, _GROWING),
    Quantizer(
        name="ede",
        forward=maps.hard_sign,
        backward=maps.decaying_tanh_derivative,
        prox=None,
        transform=None,
        citation="Qin et al.: Forward and Backward Information Retention for Accurate Binary Neural Networks (IR-Net), "
        "CVPR 2020 (arXiv 1909.10788)",
        usual_mu=Exponential(0.1, 10.0),
    ),
    _completion("ede++", "ede", maps.decaying_tanh, maps.decaying_tanh_derivative, Exponential(0.1, 500.0)),
    Quantizer(
        name="reste",
        forward=maps.hard_sign,
        backward=maps.power_derivative,
        prox=None,
        transform=None,
        citation="Wu et al.: Estimator Meets Equilibrium Perspective (ReSTE), ICCV 2023 (arXiv 2308.06689); cut-offs "
        "and schedule as in its code, github.com/DravenALG/ReSTE",
        usual_mu=Cosine(1.0, 3.0),
    ),
    _completion("reste++", "reste", maps.power, maps.power_derivative, Exponential(1.0, 100.0)),
    Quantizer(
        name="tanh",
        forward=maps.hard_sign,
        backward=maps.tanh_derivative,
        prox=None,
        transform=None,
        citation="the slope of tanh for that of sign, widely used; IR-Net's estimator from t = 1 on",
        usual_mu=Constant(2.0),  # ours
    ),
    _completion(
        "tanh++",
        "tanh",
        maps.tanh,
        maps.tanh_derivative,
        _GROWING,
        "Lahoud et al.: Self-Binarizing Networks, 2019 (arXiv 1902.00730), who sharpen a smooth F during training",
    ),
    Quantizer(
        name="dsq",
        forward=maps.hard_sign,
        backward=maps.bounded_tanh_derivative,
        prox=None,
        transform=None,
        citation="Gong et al.: Differentiable Soft Quantization, ICCV 2019 (arXiv 1908.05033), for one bit on [-1, 1]; "
        "it learns the sharpness, here it is mu",
        usual_mu=Constant(1.0),  # ours
    ),
    _completion("dsq++", "dsq", maps.bounded_tanh, maps.bounded_tanh_derivative, _GROWING),
)

QUANTIZERS: dict[str, Quantizer] = {row.name: row for row in _ROWS}


def get(name: str) -> Quantizer:
    """The row called `name`. ValueError, with the nearest name and all the choices, if there is none."""
    if name in QUANTIZERS:
        return QUANTIZERS[name]
    raise ValueError(unknown("quantizer", name, QUANTIZERS))


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """The message for a value that is not among the choices: the value, the nearest choice, all choices."""
    names = list(choices)
    spelled = {name.replace("+", "p"): name for name in names}  # as they are where + is no letter: bnnpp
    near = difflib.get_close_matches(str(value).replace("+", "p"), spelled, n=1)
    hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
    return f"unknown {kind} {value!r}{hint} ({', '.join(names)})"
