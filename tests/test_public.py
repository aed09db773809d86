"""What is offered: `dir` of the package and of its public modules shows what is for users, and nothing else."""

import pytest

import nesterov_triton as nt

MODULES = ("gates", "gradients", "kernels", "methods", "systems", "tableaus", "controllers")


@pytest.mark.parametrize("name", ["", *MODULES])
def test_dir_shows_what_is_public(name):
    module = getattr(nt, name) if name else nt
    shown = [x for x in dir(module) if not x.startswith("__")]
    assert shown == sorted(module.__all__)
    for each in shown:
        owner = getattr(getattr(module, each), "__module__", None)
        assert owner is None or owner.startswith(("nesterov_triton", "typing", "types", "collections.abc")), (
            each,
            owner,
        )
    foreign = {"annotations", "dataclass", "lookup", "torch", "math", "Tensor", "Callable", "cast", "flow", "nn"}
    assert not foreign & set(shown)
    assert "__doc__" in dir(module)


def test_all_of_it_is_there():
    assert {*MODULES} <= {*dir(nt)}
    for module in (nt, *(getattr(nt, name) for name in MODULES)):
        for name in module.__all__:
            assert hasattr(module, name), (module, name)
    assert "__version__" in dir(nt)
