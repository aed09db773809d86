"""The examples of the READMEs run, their links lead somewhere, and what they say of names and errors is so."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import nesterov_triton as nt
from nesterov_triton.gradients import GRADIENTS
from nesterov_triton.interop.options import METHODS

ROOT = Path(__file__).parent.parent
FOLDERS = ("nesterov_triton", "benchmarks", "tests")
PAGES = [ROOT / "README.md", *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md"))]
FRONT = "README.md"
REFERENCE = "nesterov_triton/README.md"
GRADIENTS_PAGE = "nesterov_triton/gradients/README.md"
STEPPING = "nesterov_triton/stepping/README.md"
INTEROP = "nesterov_triton/interop/README.md"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def section(page, title):
    return read(page).split(f"\n## {title}\n")[1].split("\n## ")[0]


def name(page):
    return page.relative_to(ROOT).as_posix()


def examples(page):
    return re.findall(r"^```python\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)


EXAMPLES = [pytest.param(p, i, id=f"{name(p)}-{i}") for p in PAGES for i in range(len(examples(p)))]


def run(page, index):
    torch.manual_seed(0)
    scope = {}
    exec(compile(examples(page)[index], str(page), "exec"), scope)
    return scope


def test_the_example_runs_and_learns():
    scope = run(FRONT, 0)
    assert scope["loss"].item() < 0.5  # ten unit normals summed: variance 10 before training
    stats = scope["model"][1].stats
    assert stats.nfe_forward > 0
    assert stats.nfe_backward > 0


@pytest.mark.filterwarnings("ignore")  # of Lightning's, about loggers and workers
def test_the_example_under_lightning_runs_and_learns(capsys):
    metrics = run(REFERENCE, 1)["trainer"].callback_metrics
    assert metrics["loss"] < 5  # variance 10 before training
    assert metrics["nfe_forward"] > 0


@pytest.mark.parametrize(("page", "index"), [e for e in EXAMPLES if e.id not in (f"{FRONT}-0", f"{REFERENCE}-1")])
def test_every_other_example_runs(page, index, capsys):
    run(page, index)


def test_there_are_two_commands_for_a_fresh_machine():
    commands = re.findall(r"```sh\n(.*?)```", read(FRONT), re.DOTALL)
    assert len(commands) == 2
    assert all(c.startswith("pip install ") for c in commands)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [pytest.param(p, id=name(p)) for p in PAGES])
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_first():
    """Over links from page to page."""
    reached, left = set(), [ROOT / FRONT]
    while left:
        page = left.pop()
        if page not in reached:
            reached.add(page)
            paths = re.findall(r"\]\(([^)\s#]+README\.md)", page.read_text(encoding="utf-8"))
            left += [(page.parent / path).resolve() for path in paths]
    assert reached >= {page.resolve() for page in PAGES}


def test_every_layer_gradient_method_and_status_is_in_its_table():
    models = section(FRONT, "Models")
    for layer in ("NODE", "ANODE", "SONODE", "HBNODE", "GHBNODE", "NesterovNODE", "GNesterovNODE"):
        assert f"| `{layer}(field" in models
    for method in nt.methods.METHODS:
        assert f"`{method}`" in section(REFERENCE, "Layer options")
        assert f"`{method}`" in section(STEPPING, "Methods")
    for method in nt.nystrom.METHODS:
        assert f'| `"{method}"`' in section(STEPPING, "Methods for momentum systems")
    for gradient in GRADIENTS:
        assert f'| `"{gradient}"`' in section(FRONT, "Choosing a gradient")
        assert f'| `"{gradient}"`' in read(GRADIENTS_PAGE)
    for status in nt.Status:
        assert status is nt.Status.SUCCESS or f"| `{status.name}` |" in section(STEPPING, "How a solve ends")


@pytest.mark.parametrize(
    ("quoted", "provoke"),
    [
        ("did you mean", lambda h: nt.NODE(lambda t, y: y, method="dopri")),
        ("at least two times", lambda h: nt.NODE(lambda t, y: y, t=[1.0])),
        ("NaN or infinite times", lambda h: nt.NODE(lambda t, y: y, t=[1.0, float("nan")])),
        ("must be strictly increasing or decreasing", lambda h: nt.NODE(lambda t, y: y, t=[1.0, 1.0])),
        ("must be positive for a Nesterov system", lambda h: nt.NesterovNODE(lambda t, y: y, t=[0.0, 1.0])),
        ("holds NaN or infinite values", lambda h: nt.NODE(lambda t, y: y)(h / 0)),
        ("must be a floating-point tensor", lambda h: nt.NODE(lambda t, y: y)(h.long())),
        ("step_size is missing", lambda h: nt.NODE(lambda t, y: y, method="rk4")),
        ("belongs to fixed-step methods", lambda h: nt.NODE(lambda t, y: y, step_size=0.1)),
        ("belongs to adaptive methods", lambda h: nt.NODE(lambda t, y: y, method="rk4", step_size=0.1, first_step=1)),
        ("does not broadcast with h", lambda h: nt.NODE(lambda t, y: y, rtol=torch.ones(7))(h)),
        ("returned", lambda h: nt.NODE(lambda t, y: y[:1])(h)),
        ("t must lie between", lambda h: nt.NesterovNODE(lambda t, y: y, t=[1.0, 2000.0])),
        (
            "t must be one tensor where it needs gradients",
            lambda h: nt.NODE(lambda t, y: y, t=[0.0, torch.ones((), requires_grad=True)]),
        ),
        ("state of a momentum system must be a pair", lambda h: nt.solve(nt.systems.nesterov(torch.sin), h, (1, 2))),
        ("state x and m must agree", lambda h: nt.solve(nt.systems.nesterov(torch.sin), (h, h[:1]), (1, 2))),
        ("is defined for the Nesterov systems only", lambda h: nt.systems.Momentum(torch.sin, form="exact")),
        ("initial_velocity returned", lambda h: nt.HBNODE(lambda t, y: y, initial_velocity=lambda y: y[:1])(h)),
        ("gate must be elementwise", lambda h: nt.GHBNODE(lambda t, y: y, gate=lambda x: x[:1])(h)),
    ],
)
def test_the_errors_quoted_are_the_errors_raised(quoted, provoke):
    assert quoted in section(REFERENCE, "Errors")
    with pytest.raises((ValueError, TypeError), match=quoted):
        provoke(torch.ones(3, 2))


def test_every_method_of_the_front_door_is_in_its_table():
    text = read(INTEROP)
    for method in METHODS:
        assert re.search(rf"\b{method}\b", text)
    for function in ("odeint", "odeint_adjoint", "odeint_event", "odeint_dense"):
        assert f"`{function}" in text
        assert f"`{function}" in section(FRONT, "Coming from torchdiffeq")
        assert function in nt.__all__


def test_one_import_is_enough():
    (line,) = re.findall(r"```python\n(.*?)\n```", section(FRONT, "Coming from torchdiffeq"), re.DOTALL)
    scope = {}
    exec(line, scope)
    assert scope["odeint"] is nt.odeint_adjoint
    assert examples(INTEROP)[0].strip() == line


def public():
    """Every public class and function, by the name that it is reached by."""
    for name in nt.__all__:
        thing = getattr(nt, name)
        if not inspect.ismodule(thing):
            yield f"nt.{name}", thing
            continue
        own = getattr(thing, "__all__", [n for n in vars(thing) if not n.startswith("_")])
        for inner in own:
            found = getattr(thing, inner)
            if (inspect.isclass(found) or inspect.isfunction(found)) and found.__module__.startswith(thing.__name__):
                yield f"nt.{name}.{inner}", found


@pytest.mark.parametrize(("name", "thing"), [pytest.param(*p, id=p[0]) for p in public()])
def test_every_public_name_says_what_it_is(name, thing):
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    assert thing.__doc__, name
    if inspect.isfunction(thing) and len(inspect.signature(thing).parameters) > 2:
        # Every argument is named, or the function that explains it.
        missing = [p for p in inspect.signature(thing).parameters if p not in thing.__doc__]
        assert not missing or "see `" in thing.__doc__, (name, missing)
    for method, function in vars(thing).items() if inspect.isclass(thing) else ():
        if inspect.isfunction(function) and not method.startswith("_") and not _inherits(thing, method):
            assert function.__doc__, f"{name}.{method}"


def _inherits(thing, method):
    return any(getattr(getattr(base, method, None), "__doc__", None) for base in thing.__mro__[1:])
