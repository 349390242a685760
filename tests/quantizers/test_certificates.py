"""The verdicts of `certify` on every row, on random pairs, and on pairs broken on purpose."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from random_pairs import INCREASING, MU, OTHER, PROXES, Drawn, corruptions, pair, shows, without_claims

from quantizers import QUANTIZERS, Certificate, Quantizer, certify, complete, get, maps, synthesize
from quantizers.catalog import Map

SURROGATES = ["bnn+", "bireal", "ede", "reste", "tanh", "dsq"]
MUS = [0.1, 1.0, 5.0, 500.0]
PRINCIPLED = [
    *((row.name, mu) for row in QUANTIZERS.values() if row.prox and row.name != "pc" for mu in MUS),
    *(("pc", mu) for mu in (0.0, 0.25, 0.5, 0.75, 1.0)),
]
UNPRINCIPLED = [(name, mu) for name in SURROGATES for mu in MUS if name != "reste" or mu > 1]

some_pairs = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def assert_proven(certificate: Certificate, row: Quantizer) -> None:
    """The certificate decomposes, and its P and T are as claimed: P monotone, T(P(w)) = F(w)."""
    assert certificate.decomposes, certificate.verdict()
    assert certificate.witness is None
    assert certificate.prox is not None
    assert certificate.transform is not None
    assert certificate.prox_facts is not None
    assert certificate.prox_facts.monotone
    low, high = certificate.interval
    w = low + (high - low) * torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f = row.forward(w, certificate.mu)
    size = (f.max() - f.min()).item() or 1.0
    assert certificate.error <= certificate.tolerance * size * 1.01
    assert (certificate.transform(certificate.prox(w)) - f).abs().max() <= certificate.tolerance * size
    assert (certificate.prox(w.sort().values).diff() >= -1e-12).all()


def assert_refuted(certificate: Certificate, row: Quantizer) -> None:
    """The certificate fails, and F and B break a rule on the interval of its witness."""
    assert not certificate.decomposes, certificate.verdict()
    assert (certificate.prox, certificate.transform, certificate.prox_facts) == (None, None, None)
    assert math.isnan(certificate.error)
    witness = certificate.witness
    assert witness is not None
    assert certificate.interval[0] <= witness.low < witness.high <= certificate.interval[1]
    assert shows(row, certificate.mu, witness.low, witness.high, certificate.interval), certificate.verdict()


# The catalogue


@pytest.mark.parametrize(("name", "mu"), PRINCIPLED)
def test_claims_of_the_catalogue_are_verified(name: str, mu: float) -> None:
    certificate = certify(get(name), mu)
    assert certificate.claimed
    assert_proven(certificate, get(name))


@pytest.mark.parametrize(("name", "mu"), PRINCIPLED)
def test_prox_is_found_again_from_forward_and_backward_alone(name: str, mu: float) -> None:
    row = get(name)
    certificate = certify(without_claims(row), mu)
    assert not certificate.claimed
    assert_proven(certificate, row)
    assert certificate.prox is not None
    assert row.prox is not None
    w = torch.linspace(*certificate.interval, 5001, dtype=torch.float64)
    assert (certificate.prox(w) - row.prox(w, mu)).abs().max() < 1e-5


@pytest.mark.parametrize("mu", [0.5, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_completion_of_every_surrogate_by_quadrature_decomposes(name: str, mu: float) -> None:
    row = complete(get(name).backward)
    certificate = certify(row, mu)
    assert certificate.claimed
    assert_proven(certificate, row)
    assert_proven(certify(without_claims(row), mu), row)


@pytest.mark.parametrize(("name", "mu"), UNPRINCIPLED)
def test_sign_with_a_smooth_surrogate_is_refuted_by_a_flat_forward(name: str, mu: float) -> None:
    row = get(name)
    certificate = certify(row, mu)
    assert_refuted(certificate, row)
    assert certificate.witness is not None
    low, high = certificate.witness.low, certificate.witness.high
    ends = torch.tensor([low, high], dtype=torch.float64)
    f, b = row.forward(ends, mu), row.backward(ends, mu)
    assert f[0] == f[1]
    assert b[0] != b[1]
    assert (b != 0).all()


@pytest.mark.parametrize(("name", "mu", "edge"), [("reste", 1.0, 1.5), ("dsq", 0.0, 1.0)])
def test_a_surrogate_that_is_constant_decomposes_as_binary_net_does(name: str, mu: float, edge: float) -> None:
    certificate = certify(get(name), mu)
    assert_proven(certificate, get(name))
    assert certificate.prox is not None
    w = torch.tensor([-edge - 2, -edge / 2, 0.0, edge / 2, edge + 2], dtype=torch.float64)
    expected = torch.tensor([-3.0, -1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(certificate.prox(w), expected, rtol=0, atol=1e-9)


def test_facts_tell_proximal_from_not_and_convex_from_nonconvex() -> None:
    bnn, swish, hard_tanh = certify(get("bnn"), 1.0), certify(get("bnn++"), 5.0), certify(get("hardtanh"), 1.0)
    assert bnn.proximal
    assert bnn.forward_facts.jumps == (0.0,)
    assert bnn.prox_facts is not None
    assert not bnn.prox_facts.nonexpansive
    assert not swish.proximal
    assert swish.prox_facts is not None
    assert swish.prox_facts.nonexpansive
    assert hard_tanh.forward_facts == dataclasses.replace(hard_tanh.forward_facts, nonexpansive=True, jumps=())


def test_verdict_says_what_was_found_in_words() -> None:
    refuted = certify(get("bnn+"), 5.0).verdict()
    assert refuted.startswith("bnn+ at mu = 5\n(F, B) does not decompose")
    assert "but B goes from 5 to " in refuted
    proven = certify(get("bnn"), 1.0).verdict()
    assert "P and T as its row states" in proven
    assert "a jump at 0" in proven
    assert "inferred" in certify(without_claims(get("bnn")), 1.0).verdict()


# Pairs of the user's own


def test_interval_is_eight_over_mu_unless_given() -> None:
    intervals = [certify(get("fp"), mu).interval for mu in (0.0, 0.5, 5.0)]
    assert intervals == [(-100.0, 100.0), (-16.0, 16.0), (-4.0, 4.0)]
    given_one = certify(without_claims(get("tanh++")), 1.0, (0.5, 2.0))
    assert given_one.interval == (0.5, 2.0)
    assert_proven(given_one, get("tanh++"))


@pytest.mark.parametrize("mu", [1.0, 5.0])
def test_a_witness_outside_the_interval_is_not_seen(mu: float) -> None:
    assert certify(get("dsq"), mu, (1.5, 3.0)).decomposes


@pytest.mark.parametrize(
    "backward", [lambda w, _: -torch.ones_like(w), maps.hard_sign, lambda w, _: torch.zeros_like(w)]
)
def test_sign_is_refuted_where_a_limit_of_backward_opposes_its_jump_or_both_are_zero(backward: Map) -> None:
    row = dataclasses.replace(get("bc"), backward=backward, prox=None, transform=None)
    assert_refuted(certify(row, 1.0), row)


def test_claim_of_a_transform_that_turns_within_a_gap_is_verified_though_inference_misses_it() -> None:
    """P = 2.5 sign, T = sin: F jumps up by 1.2 at 0 while B = cos 2.5 < 0, for T falls, rises and falls in the gap."""
    row = synthesize(lambda w, _: 2.5 * maps.hard_sign(w, 1.0), lambda u, _: torch.sin(u))
    assert certify(row, 1.0).claimed
    assert not certify(without_claims(row), 1.0).decomposes


def test_a_false_claim_is_not_believed_but_the_pair_may_decompose_all_the_same() -> None:
    row = dataclasses.replace(get("bnn"), prox=maps.identity, transform=maps.identity)
    certificate = certify(row, 1.0)
    assert certificate.decomposes
    assert not certificate.claimed


def test_backward_that_is_no_function_of_prox_at_a_kink_of_transform_is_refuted() -> None:
    """P = sign, T = H: both 0 and 1 are slopes of H at 1, but B takes the one for some w and the other for others."""
    row = synthesize(maps.hard_sign, maps.clip, lambda w, _: (w.abs() > 1).to(w.dtype))
    assert_refuted(certify(row, 1.0), row)


def test_maps_that_cannot_be_followed_get_no_verdict() -> None:
    with pytest.raises(ValueError, match="not finite at w = "):
        certify(synthesize(maps.identity, lambda u, _: u.log()), 1.0)
    with pytest.raises(ValueError, match="varies too fast near w = "):
        certify(synthesize(maps.identity, lambda u, _: torch.sin(1e5 * u)), 1.0)
    with pytest.raises(ValueError, match="the lower end comes first"):
        certify(get("fp"), 1.0, (1.0, -1.0))


# Random pairs


@some_pairs
@given(prox=PROXES, transform=INCREASING | OTHER)
def test_random_principled_pairs_pass(prox: Drawn, transform: Drawn) -> None:
    row = pair(prox, transform)
    certificate = certify(row, MU)
    assert certificate.claimed
    assert_proven(certificate, row)


@some_pairs
@given(prox=PROXES, transform=INCREASING)
def test_random_pairs_with_an_increasing_transform_pass_without_their_claims(prox: Drawn, transform: Drawn) -> None:
    row = pair(prox, transform)
    assert_proven(certify(without_claims(row), MU), row)


@pytest.mark.parametrize("claims", [True, False], ids=["claimed", "stripped"])
@settings(some_pairs, max_examples=20)
@given(prox=PROXES, transform=INCREASING | OTHER, data=st.data())
def test_random_corrupted_pairs_fail_with_a_witness(
    claims: bool, prox: Drawn, transform: Drawn, data: st.DataObject
) -> None:
    row = pair(prox, transform)
    ways = corruptions(row)
    assume(ways)
    words = data.draw(st.sampled_from(sorted({way.words for way in ways})))
    broken = data.draw(st.sampled_from([way for way in ways if way.words == words])).of(row)
    assert_refuted(certify(broken if claims else without_claims(broken), MU), broken)
