"""The benchmark's cases: their right-hand sides and truths against scipy, and that wrong answers are caught."""

import numpy as np
import pytest
import scipy.integrate
import torch

from benchmarks.cases import MODELS, Case, WrongAnswer
from benchmarks.contenders import FORWARD, TRAIN, Absent, load, ours, torchdiffeq_
from benchmarks.sides import FIELD, build
from benchmarks.timing import interleave, ratio


def draw(model, size="small", shape=(3, 2)):
    return Case.draw(model, size, shape=shape)


def scipy_features(case, raise_bias_by=0.0):
    """h1 by scipy, from the systems as the papers write them, in numpy."""
    weights = [p.detach().double().numpy() for p in case.field.parameters()]
    weights[3] = weights[3] + [raise_bias_by, 0.0]

    def field(h):
        return np.tanh(h @ weights[0].T + weights[1]) @ weights[2].T + weights[3]

    def kappa(t):
        return 5 * np.tanh(t**-1.5 * np.exp(t / 2) / 5) if case.model == "GNesterovNODE" else 1.0

    h0 = case.h0.detach().double().numpy()

    def rates(t, z):
        if case.model == "NODE":
            return field(z.reshape(h0.shape)).ravel()
        x, m = z.reshape(2, *h0.shape)
        if case.model == "HBNODE":
            return np.stack([m, field(x) - m / (1 + np.exp(3.0))]).ravel()
        h = kappa(t) * x
        return np.stack([5 * np.tanh(m / 5), -m - 5 * np.tanh(field(h) / 5) - 0.5 * h]).ravel()

    start = h0 if case.model == "NODE" else np.stack([h0 / kappa(1.0), 0 * h0])
    z = scipy.integrate.solve_ivp(rates, (1.0, 2.0), start.ravel(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return kappa(2.0) * z[: h0.size].reshape(h0.shape)


@pytest.mark.parametrize("model", MODELS)
def test_the_truth_is_scipys_solution_and_its_gradient_the_difference_quotient(model):
    case = draw(model)
    features, gradients = case.truth()
    np.testing.assert_allclose(features.numpy(), scipy_features(case), rtol=1e-8, atol=1e-8)
    step, weights = 1e-4, case.cotangent.double().numpy()
    above, below = ((scipy_features(case, sign * step) * weights).sum() for sign in (1, -1))
    of_bias = gradients[4][0].item()
    assert abs(of_bias) > 1e-3
    assert of_bias == pytest.approx((above - below) / (2 * step), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "size", "shape"),
    [
        *((model, "small", (3, 2)) for model in MODELS),
        ("NODE", "ODE-RNN", (3, 2)),
        ("HBNODE", "convolutional", (2, 5, 8, 8)),
    ],
)
def test_every_contender_that_can_run_solves_the_same_system(model, size, shape):
    case = draw(model, size, shape)
    for table in (FORWARD, TRAIN):
        for name, make in table.items():
            if (
                "compiled" in name
                or "diffrax" in name
                or (size == "ODE-RNN" and table is TRAIN and "eager" not in name)
            ):
                continue  # compile for minutes; `pytest benchmarks/` checks them
            try:
                contender = make(case)
            except Absent:
                continue
            case.errors(contender.features(), contender.gradients() if table is TRAIN else None)


def test_a_wrong_answer_or_gradient_is_refused():
    case = draw("GNesterovNODE")
    right = ours(case)
    features, gradients = right.features(), right.gradients()
    case.errors(features, gradients)
    with pytest.raises(WrongAnswer, match="GNesterovNODE, small"):
        case.errors(features * 1.01, gradients)
    with pytest.raises(WrongAnswer, match="of the gradients"):
        case.errors(features, [*gradients[:-1], gradients[-1] * 1.1])
    with pytest.raises(WrongAnswer):
        case.errors(features, [*gradients[:-1], gradients[-1] * float("nan")])
    with pytest.raises(WrongAnswer):
        case.errors(features * float("nan"), None)


def test_only_the_first_samples_are_compared_where_the_truth_is_dear():
    case = Case.draw("NODE", "ODE-RNN", shape=(6, 2))
    assert case.checked == 4
    assert case.truth()[0].shape == (4, 2)
    assert torch.equal(case.checked_cotangent[4:], torch.zeros(2, 2))
    contender = torchdiffeq_(case)
    assert contender.gradients()[0][4:].abs().max() < 1e-20
    case.errors(contender.features(), contender.gradients())


def test_who_is_not_timed_is_said_with_the_reason():
    case = draw("GNesterovNODE")

    def absent(case):
        raise Absent("it is not there")

    table = {"ours": ours, "absent": absent, "wrong": lambda case: torchdiffeq_(draw("NODE"))}
    calls, answers = build(case, table, False, False, patience=1e9)
    assert list(calls) == [FIELD, "ours"]
    assert answers["absent"] == {"left_out": "it is not there"}
    assert "wrong answer" in answers["wrong"]["wrong"]
    calls, answers = build(case, {"ours": ours}, False, False, patience=0.0)
    assert list(calls) == [FIELD]
    assert answers["ours"]["left_out"].startswith("a call took")


def test_ratios_are_taken_within_a_round():
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 23.0, 23.0, 33.0])
    calls = []
    contenders = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = interleave(contenders, rounds=2, warm_up=0, clock=lambda: next(ticks))
    assert sorted(calls) == ["a", "a", "b", "b"]
    assert ratio(seconds, "a", "b") == sum(a / b for a, b in zip(seconds["a"], seconds["b"], strict=True)) / 2


def test_a_peer_that_breaks_when_it_is_imported_is_absent_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Absent, match=r"broken_peer cannot be imported here \(operator does not exist\)"):
        load("broken_peer")
    with pytest.raises(Absent, match="no_such_peer is not installed here"):
        load("no_such_peer.part")
