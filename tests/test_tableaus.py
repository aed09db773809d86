"""Tableaus: order conditions over all rooted trees, embedded weights, dense output, validation, observed orders."""

import dataclasses
from functools import cache
from math import exp, log, sin

import numpy as np
import pytest
import scipy.integrate

from nesterov_triton import tableaus
from nesterov_triton.tableaus import TABLEAUS, Tableau

ALL = sorted(TABLEAUS)
ADAPTIVE = ["adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "prince_dormand8", "tsit5"]
FSAL = ["bosh3", "dopri5", "dopri8", "prince_dormand8", "tsit5"]
THETAS = (0.1, 0.25, 0.5, 0.625, 0.9, 1.0)

# What each method is known to be: order, orders of the embedded solutions, error_order, interpolant_order, stages.
EXPECTED = {
    "euler": (1, (), 0, 1, 1),
    "midpoint": (2, (), 0, 2, 2),
    "heun2": (2, (), 0, 2, 2),
    "heun3": (3, (), 0, 2, 3),
    "rk4": (4, (), 0, 3, 4),
    "rk4_38": (4, (), 0, 3, 4),
    "adaptive_heun": (2, (1,), 1, 2, 2),
    "fehlberg2": (2, (1,), 1, 2, 3),
    "bosh3": (3, (2,), 2, 3, 4),
    "dopri5": (5, (4,), 4, 4, 7),
    "tsit5": (5, (4,), 4, 4, 7),
    "dopri8": (8, (5, 3), 7, 7, 13),
    "prince_dormand8": (8, (7,), 7, 4, 14),
}

# Rooted trees (HNW II.2): a tree is the sorted tuple of the trees that hang from its root.
Tree = tuple["Tree", ...]


@cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with this many nodes."""

    def forests(nodes: int, largest: int) -> list[Tree]:
        if nodes == 0:
            return [()]
        return [
            (tree, *rest)
            for size in range(1, min(nodes, largest) + 1)
            for tree in trees(size)
            for rest in forests(nodes - size, size)
        ]

    return tuple(sorted({tuple(sorted(forest)) for forest in forests(order - 1, order - 1)}))


def size(tree: Tree) -> int:
    return 1 + sum(map(size, tree))


@cache
def density(tree: Tree) -> int:
    """gamma: the tree's size times the densities of its subtrees."""
    return size(tree) * int(np.prod([density(subtree) for subtree in tree], dtype=np.int64))


def stage_matrix(tableau: Tableau) -> np.ndarray:
    """a and extra_a as one square matrix over all stages."""
    rows = tableau.a + tableau.extra_a
    return np.array([row + (0.0,) * (len(rows) - len(row)) for row in rows])


@cache
def elementary_weights(name: str, tree: Tree) -> np.ndarray:
    """Phi_i of the tree for every stage i, those for dense output included."""
    matrix = stage_matrix(TABLEAUS[name])
    return np.prod([matrix @ elementary_weights(name, subtree) for subtree in tree], axis=0) * np.ones(len(matrix))


def residual(name: str, weights, order: int, theta: float = 1.0) -> float:
    """Largest violation of the order conditions of exactly this order by these weights, at y(t + theta dt)."""
    weights = np.asarray(weights)
    return max(
        abs(weights @ elementary_weights(name, tree)[: len(weights)] - theta**order / density(tree))
        for tree in trees(order)
    )


def assert_order(name: str, weights, order: int) -> None:
    """The weights have this order and no higher one."""
    for satisfied in range(1, order + 1):
        assert residual(name, weights, satisfied) < 1e-13
    assert residual(name, weights, order + 1) > 1e-7


def dense_weights(tableau: Tableau, theta: float) -> np.ndarray:
    coefficients = np.array(tableau.interpolant)
    return coefficients @ theta ** np.arange(1, coefficients.shape[1] + 1)


def test_rooted_trees_are_all_there():
    # OEIS A000081; 200 conditions for order 8.
    assert [len(trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]
    bush, chain = ((), (), ()), ((((),),),)
    assert density(bush) == 4
    assert density(chain) == 24
    assert {bush, chain} < set(trees(4))


def test_every_tableau_is_covered():
    assert {name: tableau.name for name, tableau in TABLEAUS.items()} == {name: name for name in EXPECTED}
    assert [name for name in ALL if TABLEAUS[name].adaptive] == ADAPTIVE


@pytest.mark.parametrize("name", ALL)
def test_declared_orders_and_stages(name):
    tableau = TABLEAUS[name]
    order, embedded, error_order, interpolant_order, stages = EXPECTED[name]
    assert (tableau.order, len(tableau.error), tableau.error_order) == (order, len(embedded), error_order)
    assert (tableau.interpolant_order, tableau.stages) == (interpolant_order, stages)


@pytest.mark.parametrize("name", ALL)
def test_order_conditions(name):
    assert_order(name, TABLEAUS[name].b, TABLEAUS[name].order)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_embedded_order_conditions(name):
    tableau = TABLEAUS[name]
    for row, order in zip(tableau.error, EXPECTED[name][1], strict=True):
        assert_order(name, np.subtract(tableau.b, row), order)


@pytest.mark.parametrize("name", ALL)
def test_interpolant_order_conditions(name):
    tableau = TABLEAUS[name]
    for theta in THETAS:
        weights = dense_weights(tableau, theta)
        for order in range(1, tableau.interpolant_order + 1):
            assert residual(name, weights, order, theta) < 1e-12
    assert residual(name, dense_weights(tableau, 0.625), tableau.interpolant_order + 1, 0.625) > 1e-6


@pytest.mark.parametrize("name", ALL)
def test_interpolant_ends_at_the_step(name):
    tableau = TABLEAUS[name]
    at_one = [sum(row) for row in tableau.interpolant]
    np.testing.assert_allclose(at_one[: tableau.stages], tableau.b, rtol=0, atol=1e-13)
    np.testing.assert_allclose(at_one[tableau.stages :], 0, atol=1e-13)


@pytest.mark.parametrize("name", FSAL)
def test_interpolant_slope_is_continuous(name):
    # f at both ends are stages of an FSAL method, so its dense output can be, and is, once differentiable.
    tableau = TABLEAUS[name]
    stage = np.eye(len(tableau.interpolant))
    coefficients = np.array(tableau.interpolant)
    np.testing.assert_array_equal(coefficients[:, 0], stage[0])
    slope_at_one = coefficients @ np.arange(1, coefficients.shape[1] + 1)
    np.testing.assert_allclose(slope_at_one, stage[tableau.stages - 1], atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_fsal(name):
    tableau = TABLEAUS[name]
    assert tableau.fsal == (name in FSAL)
    # By its meaning: the last stage sits at the new state.
    new_state = tableau.c[-1] == 1 and np.array_equal(
        stage_matrix(tableau)[tableau.stages - 1, : tableau.stages], tableau.b
    )
    assert tableau.fsal == new_state


@pytest.mark.parametrize("name", ALL)
def test_nodes_stay_inside_the_step(name):
    tableau = TABLEAUS[name]
    assert tableau.c[0] == 0
    assert all(0 <= node <= 1 for node in tableau.c + tableau.extra_c)


# Order conditions leave the sign of an error row and the free parameters open; these settle them.


@pytest.mark.parametrize(("name", "solver"), [("dopri5", "RK45"), ("bosh3", "RK23"), ("dopri8", "DOP853")])
def test_coefficients_agree_with_scipy(name, solver):
    ours, theirs = TABLEAUS[name], getattr(scipy.integrate, solver)
    stages = len(theirs.B)
    np.testing.assert_allclose(stage_matrix(ours)[:stages, : theirs.A.shape[1]], theirs.A, rtol=1e-15)
    np.testing.assert_allclose(ours.b[:stages], theirs.B, rtol=1e-15)
    np.testing.assert_allclose(ours.c[:stages], theirs.C, rtol=1e-15)
    if name == "dopri8":
        np.testing.assert_allclose(ours.error, [theirs.E5, theirs.E3], rtol=1e-13)
        np.testing.assert_allclose(stage_matrix(ours)[stages + 1 :], theirs.A_EXTRA, rtol=1e-15)
    else:
        # scipy embeds Dormand and Prince's own weights, dopri5 here Shampine's, whose estimate is 2/3 of theirs.
        factor = 2 / 3 if name == "dopri5" else 1
        np.testing.assert_allclose(ours.error, [-factor * theirs.E], rtol=1e-13)
        np.testing.assert_allclose(ours.interpolant, theirs.P, rtol=1e-14)


def test_dopri8_dense_output_agrees_with_scipy():
    # scipy evaluates the nested form.
    t0, dt = 0.3, 0.2
    theirs = scipy.integrate.DOP853(rhs, t0, solution(t0), t0 + 1, first_step=dt, rtol=1, atol=1)
    theirs.step()
    assert theirs.t == t0 + dt
    dense = theirs.dense_output()
    _, k = step(TABLEAUS["dopri8"], t0, solution(t0), dt, dense=True)
    for theta in THETAS:
        ours = solution(t0) + dt * dense_weights(TABLEAUS["dopri8"], theta) @ k
        np.testing.assert_allclose(ours, dense(t0 + theta * dt), rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "embedded"),
    [("adaptive_heun", (1, 0)), ("fehlberg2", (1 / 256, 255 / 256, 0)), ("tsit5", (*(None,) * 6, 1 / 66))],
)
def test_embedded_weights_are_the_published_ones(name, embedded):
    tableau = TABLEAUS[name]
    ours = np.subtract(tableau.b, tableau.error[0])
    for actual, published in zip(ours, embedded, strict=True):
        assert published is None or actual == pytest.approx(published, abs=1e-15)


def test_the_middle_of_prince_dormand8_is_of_order_five():
    weights = dense_weights(TABLEAUS["prince_dormand8"], 0.5)
    for order in range(1, 6):
        assert residual("prince_dormand8", weights, order, 0.5) < 1e-13


def test_fehlberg2_propagates_its_second_order_weights():
    assert TABLEAUS["fehlberg2"].b == (1 / 512, 255 / 256, 1 / 512)
    # Fehlberg's last stage sits at the embedded solution; order two alone would leave it free.
    assert TABLEAUS["fehlberg2"].a[2] == (1 / 256, 255 / 256)


# Observed orders. The problem is nonlinear, coupled and nonautonomous: y = (exp sin t^2, exp cos t^2).


def rhs(t, y):
    return np.array([2 * t * y[0] * log(y[1]), -2 * t * y[1] * log(y[0])])


def solution(t):
    return np.array([exp(sin(t * t)), exp(np.cos(t * t))])


def step(tableau, t, y, dt, dense=False):
    """The new state and the stages, straight from the definition."""
    k = np.empty((0, len(y)))
    nodes = tableau.c + tableau.extra_c if dense else tableau.c
    for node, row in zip(nodes, tableau.a + tableau.extra_a, strict=False):
        k = np.vstack([k, rhs(t + node * dt, y + dt * np.array(row) @ k)])
    return y + dt * np.array(tableau.b) @ k[: tableau.stages], k


def slope(dts, errors):
    """Slope of log error over log dt: the observed order."""
    return np.polyfit(np.log(dts), np.log(errors), 1)[0]


# Steps over the interval, by order: small enough for the leading error term to show, errors well above rounding.
STEPS = {1: (100, 140, 200), 2: (40, 56, 80), 3: (40, 56, 80), 4: (28, 40, 56), 5: (40, 56, 80), 8: (14, 20, 28)}


@pytest.mark.parametrize("name", ALL)
def test_observed_order_of_steps_and_dense_output(name):
    tableau, t0, t1 = TABLEAUS[name], 0.3, 1.5
    weights = {theta: dense_weights(tableau, theta) for theta in (0.3, 0.6)}
    dts, step_errors, dense_errors = [], [], []
    for n in STEPS[tableau.order]:
        dt, y, step_error, dense_error = (t1 - t0) / n, solution(t0), 0.0, 0.0
        for t in t0 + dt * np.arange(n):
            new, k = step(tableau, t, y, dt, dense=True)
            for theta, row in weights.items():
                dense_error = max(dense_error, np.abs(y + dt * row @ k - solution(t + theta * dt)).max())
            step_error = max(step_error, np.abs(new - solution(t + dt)).max())
            y = new
        dts.append(dt)
        step_errors.append(step_error)
        dense_errors.append(dense_error)
    assert slope(dts, step_errors) == pytest.approx(tableau.order, abs=0.5)
    # A local polynomial one order below the steps costs no order over the whole interval; prince_dormand8's is lower.
    dense_order = min(tableau.order, tableau.interpolant_order + 1)
    assert slope(dts, dense_errors) == pytest.approx(dense_order, abs=0.5)


@pytest.mark.parametrize("name", ALL)
def test_observed_local_order_of_dense_output(name):
    tableau = TABLEAUS[name]
    t0, dts, errors = 0.9, np.geomspace(0.04, 0.12, 5), []
    for dt in dts:
        _, k = step(tableau, t0, solution(t0), dt, dense=True)
        dense = [solution(t0) + dt * dense_weights(tableau, theta) @ k for theta in (0.25, 0.5, 0.75)]
        exact = [solution(t0 + theta * dt) for theta in (0.25, 0.5, 0.75)]
        errors.append(np.abs(np.subtract(dense, exact)).max())
    assert slope(dts, errors) == pytest.approx(tableau.interpolant_order + 1, abs=0.35)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_observed_order_of_the_error_estimate(name):
    tableau = TABLEAUS[name]
    t0, dts, estimates = 0.9, np.geomspace(0.02, 0.06, 5), []
    for dt in dts:
        _, k = step(tableau, t0, solution(t0), dt)
        norms = [np.linalg.norm(dt * np.array(row) @ k) for row in tableau.error]
        # Two rows combine as documented for dopri8.
        estimates.append(norms[0] if len(norms) == 1 else norms[0] ** 2 / np.hypot(norms[0], 0.1 * norms[1]))
    assert slope(dts, estimates) == pytest.approx(tableau.error_order + 1, abs=0.35)


# Validation.


def replaced(row, index, value):
    return (*row[:index], value, *row[index + 1 :])


DOPRI5, DOPRI8 = TABLEAUS["dopri5"], TABLEAUS["dopri8"]
BROKEN = {
    "no stages": (DOPRI5, {"c": ()}, "c is empty"),
    "node off its row sum": (DOPRI5, {"c": replaced(DOPRI5.c, 1, 0.21)}, r"a\[1\] sums to 0.2, expected c\[1\]"),
    "first node not 0": (DOPRI5, {"c": replaced(DOPRI5.c, 0, 0.1)}, r"a\[0\] sums"),
    "row sum off by 1e-12": (DOPRI5, {"a": replaced(DOPRI5.a, 1, (0.2 + 1e-12,))}, r"a\[1\] sums"),
    "row too long": (DOPRI5, {"a": replaced(DOPRI5.a, 1, (0.2, 0.0))}, r"a\[1\] has 2 entries, expected 1"),
    "row missing": (DOPRI5, {"a": DOPRI5.a[:-1]}, "a has 6 entries, expected 7"),
    "b too short": (DOPRI5, {"b": DOPRI5.b[:-1]}, "b has 6 entries"),
    "b inconsistent": (DOPRI5, {"b": replaced(DOPRI5.b, 6, 0.01)}, "b sums to"),
    "error too long": (DOPRI5, {"error": ((*DOPRI5.error[0], 0.0),)}, r"error\[0\] has 8"),
    "error not summing to 0": (DOPRI8, {"error": (DOPRI8.error[0], DOPRI8.b)}, r"error\[1\] sums"),
    "error order without error": (DOPRI5, {"error": ()}, "error_order is 4 with 0 error rows"),
    "error without its order": (DOPRI5, {"error_order": 0}, "error_order is 0"),
    "order 0": (DOPRI5, {"order": 0}, "order must be at least 1"),
    "extra row too short": (
        DOPRI8,
        {"extra_a": replaced(DOPRI8.extra_a, 0, DOPRI8.extra_a[0][:-1])},
        r"extra_a\[0\] has 12 entries, expected 13",
    ),
    "extra row missing": (DOPRI8, {"extra_a": DOPRI8.extra_a[:-1]}, "extra_a has 2"),
    "extra node off its row sum": (DOPRI8, {"extra_c": (0.1, 0.2, 0.7)}, r"extra_a\[2\] sums"),
    "interpolant without the extra stages": (DOPRI8, {"interpolant": DOPRI8.interpolant[:13]}, "interpolant has 13"),
    "interpolant ragged": (
        DOPRI5,
        {"interpolant": replaced(DOPRI5.interpolant, 3, DOPRI5.interpolant[3][:-1])},
        r"interpolant\[3\] has 3",
    ),
    "interpolant misses b": (
        DOPRI5,
        {"interpolant": replaced(DOPRI5.interpolant, 6, (0.0, 1.0, -2.0, 1.0001))},
        r"interpolant\[6\] at theta = 1",
    ),
    "interpolant keeps an extra stage": (
        DOPRI8,
        {"interpolant": replaced(DOPRI8.interpolant, 15, (1e-9, *DOPRI8.interpolant[15][1:]))},
        r"interpolant\[15\] at theta = 1",
    ),
    # Ends at b, but drifts between for constant k.
    "interpolant inconsistent": (
        DOPRI5,
        {"interpolant": replaced(DOPRI5.interpolant, 1, (1.0, -1.0, 0.0, 0.0))},
        r"theta\^1 coefficients of interpolant",
    ),
    "interpolant order beyond its degree": (DOPRI5, {"interpolant_order": 5}, "interpolant_order must lie in 1..4"),
    "not a number": (DOPRI5, {"b": replaced(DOPRI5.b, 0, float("nan"))}, "b holds a value that is not finite"),
    "infinite": (DOPRI5, {"a": replaced(DOPRI5.a, 1, (float("inf"),))}, r"a\[1\] holds a value that is not finite"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_tableau_is_rejected(broken):
    tableau, changes, message = BROKEN[broken]
    with pytest.raises(ValueError, match=f"tableau '{tableau.name}': .*{message}"):
        dataclasses.replace(tableau, **changes)


def test_numbers_of_any_kind_become_floats():
    tableau = dataclasses.replace(TABLEAUS["euler"], b=[1], a=[[]], interpolant=[[np.float64(1)]])
    assert tableau == TABLEAUS["euler"]
    assert hash(tableau) == hash(TABLEAUS["euler"])
    for each in TABLEAUS.values():
        entries = [*each.c, *each.b, *each.extra_c, *sum(each.a + each.error + each.extra_a + each.interpolant, ())]
        assert {type(entry) for entry in entries} == {float}


def test_tableau_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DOPRI5.order = 6


def test_get_returns_the_tableau_of_that_name():
    assert all(tableaus.get(name) is tableau for name, tableau in TABLEAUS.items())


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("Dopri5", "dopri5"), ("tsit", "tsit5"), ("midpont", "midpoint"), ("rk4_3_8", "rk4_38")]
)
def test_unknown_name_gives_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=f"unknown method '{wrong}': did you mean '{nearest}'"):
        tableaus.get(wrong)


def test_name_must_be_a_string():
    with pytest.raises(TypeError, match="method must be a name"):
        tableaus.get(5)
