"""The catalogue: an algorithm is a row. To add one, add its row here; the optimizer and conformance suite find it.

A row is principled if F = T o P and B = T' o P. Then PC++ with this row is ProxConnect with the proximal map P on the
loss l(T(.)) (Lu et al., "Understanding Neural Network Binarization with Forward and Backward Proximal Quantizers",
NeurIPS 2023). For a row without P and T no such pair exists: BNN+'s F, for example, is flat where its B varies.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from quantizers import maps
from quantizers.names import is_own, own, unknown
from quantizers.scales import SCALES, Scale, scaled_backward, scaled_forward
from quantizers.sharpness import Constant, Cosine, Exponential, Linear, Shape

Map = Callable[[Tensor, float], Tensor]
"""(w*, mu) -> a tensor of the shape, dtype and device of w*, elementwise."""


@dataclass(frozen=True)
class Quantizer:
    """A forward-backward pair: the network computes with w = F(w*; mu), and B(w*; mu) multiplies the gradient of w.

    Args:
        name: the row's name in tables and files.
        forward: F.
        backward: B.
        prox: P with F = T o P and B = T' o P, or None if no such P and T exist.
        transform: T, or None if `prox` is None.
        citation: the source, and the parts of it that the row omits.
        binary: True if sign(w*) is deployed; False if F(w*) is, as in full precision.
        usual_mu: the schedule of mu in the row's paper or code, or our choice where a comment says "ours"; None if F
            and B ignore mu.
        completes: the name of the row that this one completes: it has that row's B, and the integral of B as its F.
        formula: "F = ...; B = ..." for the gallery, or "".
        scale: the scale given to `scaled`; "none" for a row of the catalogue.
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
    formula: str = ""
    scale: Scale = "none"

    def scaled(self, scale: Scale) -> "Quantizer":
        """This row with weights in {-s, +s}, s = mean |w*| of the "tensor" or of each output "channel"; see `scales`.

        Its maps are no longer elementwise: they take all latents of one parameter. ValueError if the scale is unknown,
        or if this row already has one or is not binary.
        """
        if scale not in SCALES:
            raise ValueError(unknown("scale", scale, SCALES))
        if scale == "none":
            return self
        if self.scale != "none" or not self.binary:
            has = f"has the scale {self.scale} already" if self.binary else "is not binary"
            raise ValueError(f"scale {scale!r}: {self.name} {has}")
        return replace(
            self,
            forward=scaled_forward(self.forward, scale),
            backward=scaled_backward(self.backward, scale),
            prox=None,  # P_s and T_s share the scale of w*, which T cannot recover from P(w*)
            transform=None,
            scale=scale,
        )

    @property
    def deployed(self) -> Map:
        """The map from w* and mu to the deployed weights: sign(w*), times the scale if any; F(w*) if not binary."""
        if not self.binary:
            return self.forward
        return maps.hard_sign if self.scale == "none" else scaled_forward(maps.hard_sign, self.scale)

    @property
    def uses_mu(self) -> bool:
        """Whether F or B depends on mu."""
        return self.usual_mu is not None


def _completion(
    name: str, of: str, forward: Map, backward: Map, usual_mu: Shape, formula: str, citation: str = ""
) -> Quantizer:
    """The row with the B of row `of` and F(w*) = integral of B from 0 to w*, so P = id and T = F."""
    return Quantizer(
        name=name,
        forward=forward,
        backward=backward,
        prox=maps.identity,
        transform=forward,
        citation=citation or f"ours: the completion of {of}, as bnn++ is that of bnn+",
        usual_mu=usual_mu,
        completes=of,
        formula=formula,
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
        formula="F = w*; B = 1",
    ),
    Quantizer(
        name="bc",
        forward=maps.hard_sign,
        backward=maps.ones,
        prox=maps.hard_sign,
        transform=maps.identity,
        citation="Courbariaux, Bengio, David: BinaryConnect, NeurIPS 2015",
        formula="F = sign(w*); B = 1",
    ),
    Quantizer(
        name="pc",
        forward=maps.piecewise_linear,
        backward=maps.ones,
        prox=maps.piecewise_linear,
        transform=maps.identity,
        citation="Dockhorn et al.: Demystifying and Generalizing BinaryConnect, NeurIPS 2021 (arXiv 2110.13220)",
        usual_mu=Linear(0.0, 1.0),  # ours: we have not seen the paper's schedule
        formula="F = sign(w*) min(1, mu + |w*|), mu at most 1; B = 1",
    ),
    # It does not binarize, so no bundled grid trains it.
    Quantizer(
        name="hardtanh",
        forward=maps.clip,
        backward=maps.ones,
        prox=maps.clip,
        transform=maps.identity,
        citation="ProxConnect with the projection onto [-1, 1], that is pc held at rho = 0 (Dockhorn et al., 2021); "
        "for the convergence theory, not a way to binarize: nothing drives weights to the interval's ends",
        formula="F = min(max(w*, -1), 1); B = 1",
    ),
    Quantizer(
        name="bnn",
        forward=maps.hard_sign,
        backward=maps.clip_derivative,
        prox=maps.outward,
        transform=maps.clip,
        citation="Courbariaux et al.: BinaryNet, 2016",
        formula="F = sign(w*); B = 1 where |w*| <= 1, else 0",
    ),
    _completion(
        "clip++",
        "bnn",
        maps.sharp_clip,
        maps.sharp_clip_derivative,
        _GROWING,
        "F = min(max(mu w*, -1), 1); B = mu where |mu w*| <= 1, else 0",
    ),
    Quantizer(
        name="bnn+",
        forward=maps.hard_sign,
        backward=maps.sign_swish_derivative,
        prox=None,
        transform=None,
        citation="Darabi et al.: BNN+, 2018 (arXiv 1812.11800), its backward map only: the regularizer and the scales "
        "are left out",
        usual_mu=Constant(5.0),  # the paper's
        formula="F = sign(w*); B = mu (2 - x tanh(x / 2)) / (1 + cosh(x)), x = mu w*",
    ),
    _completion(
        "bnn++",
        "bnn+",
        maps.sign_swish,
        maps.sign_swish_derivative,
        Exponential(2.0, 500.0),  # ours
        "F = 2 s(x) (1 + x (1 - s(x))) - 1, s the logistic function; B = mu (2 - x tanh(x / 2)) / (1 + cosh(x)), "
        "x = mu w*",
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
        formula="F = sign(w*); B = mu (2 - 2 |x|) where |x| < 1, else 0, x = mu w*",
    ),
    _completion(
        "bireal++",
        "bireal",
        maps.approx_sign,
        maps.approx_sign_derivative,
        _GROWING,
        "F = x (2 - |x|) where |x| < 1, else sign(w*); B = mu (2 - 2 |x|) where |x| < 1, else 0, x = mu w*",
    ),
    # IR-Net standardizes weights to unit deviation, so mean |w| = 0.8; our latents start with mean |w*| = 0.5, clipped
    # at 1. So its t is ours times 0.5 / 0.8, and its final t = 10 is our 16. Its code starts at t = 0.1 for real
    # activations and for VGG, and at 0.001 for ResNet-20 with binary activations.
    Quantizer(
        name="ede",
        forward=maps.hard_sign,
        backward=maps.decaying_tanh_derivative,
        prox=None,
        transform=None,
        citation="Qin et al.: Forward and Backward Information Retention for Accurate Binary Neural Networks (IR-Net), "
        "CVPR 2020 (arXiv 1909.10788), its error decay estimator (EDE) only: Libra-PB, which standardizes weights, is "
        "left out, so its t is in other units",
        usual_mu=Exponential(0.1, 10.0),
        formula="F = sign(w*); B = max(1, mu) / cosh(mu w*)^2",
    ),
    _completion(
        "ede++",
        "ede",
        maps.decaying_tanh,
        maps.decaying_tanh_derivative,
        Exponential(0.1, 500.0),  # ours
        "F = k tanh(mu w*), k = max(1 / mu, 1); B = max(1, mu) / cosh(mu w*)^2",
    ),
    # ReSTE's code applies the cut-offs and the schedule to raw weights, which in ResNet-20 (He initialization) are
    # mostly within 0.1 of 0. Our latents have mean |w*| = 0.5, mostly in the range of the power. Same formula, other
    # units.
    Quantizer(
        name="reste",
        forward=maps.hard_sign,
        backward=maps.power_derivative,
        prox=None,
        transform=None,
        citation="Wu et al.: Estimator Meets Equilibrium Perspective (ReSTE), ICCV 2023 (arXiv 2308.06689); cut-offs "
        "and schedule as in its code, github.com/DravenALG/ReSTE, which applies them to raw, smaller weights",
        usual_mu=Cosine(1.0, 3.0),
        formula="F = sign(w*); B = |w*|^(1/o - 1) / o where 0.1 < |w*| <= 1.5, 0.1^(1/o - 1) within, 0 beyond, "
        "o = max(mu, 1)",
    ),
    Quantizer(
        name="tanh",
        forward=maps.hard_sign,
        backward=maps.tanh_derivative,
        prox=None,
        transform=None,
        citation="the slope of tanh for that of sign, widely used; IR-Net's estimator from t = 1 on",
        usual_mu=Constant(2.0),  # ours
        formula="F = sign(w*); B = mu / cosh(mu w*)^2",
    ),
    _completion(
        "tanh++",
        "tanh",
        maps.tanh,
        maps.tanh_derivative,
        _GROWING,
        "F = tanh(mu w*); B = mu / cosh(mu w*)^2",
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
        formula="F = sign(w*); B = mu / (tanh(mu) cosh(mu w*)^2) where |w*| <= 1, else 0",
    ),
    _completion(
        "dsq++",
        "dsq",
        maps.bounded_tanh,
        maps.bounded_tanh_derivative,
        _GROWING,
        "F = tanh(mu w*) / tanh(mu) where |w*| <= 1, else sign(w*); B = mu / (tanh(mu) cosh(mu w*)^2) where "
        "|w*| <= 1, else 0",
    ),
)

QUANTIZERS: dict[str, Quantizer] = {row.name: row for row in _ROWS}


def get(quantizer: "str | Quantizer") -> Quantizer:
    """The row of that name, or the user's own quantizer for `module:attribute`; a Quantizer is returned unchanged.

    Modules are imported as by `python -m`: the working directory is searched first.

    Raises:
        ValueError: with a one-line message: the row is unknown (lists the nearest name and all choices), the module
            cannot be imported, or the attribute is missing or not a Quantizer (lists the module's Quantizers).
    """
    if isinstance(quantizer, Quantizer):
        return quantizer
    if quantizer in QUANTIZERS:
        return QUANTIZERS[quantizer]
    if is_own(quantizer):
        found: Quantizer = own(quantizer, lambda value: isinstance(value, Quantizer), "Quantizer")
        return found
    raise ValueError(f"{unknown('quantizer', quantizer, QUANTIZERS)}, or module:attribute")
