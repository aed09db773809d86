"""The benchmarks' way with a GPU that is lent for minutes: what fails or hangs is said, and nothing else is lost."""

import gc
import json
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from benchmarks import gpu, timing


def fail():
    raise ValueError("mine")


def test_a_contender_that_raises_is_left_out_and_named():
    raised = {}
    seconds = timing.interleave({"a": lambda: None, "b": fail}, rounds=2, warm_up=1, raised=raised)
    assert len(seconds.pop("a")) == 2
    assert not seconds
    assert raised == {"b": "ValueError: mine"}


def test_garbage_is_collected_again_whatever_a_contender_does():
    assert gc.isenabled()
    with pytest.raises(ValueError, match="mine"):
        timing.interleave({"a": fail}, rounds=1)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_command_that_hangs_is_ended_and_said_to_have_hung():
    began = time.monotonic()
    status, said = gpu._run([sys.executable, "-c", "print('begun'); import time; time.sleep(60)"], 2)
    assert status is None
    assert said.startswith("begun")  # nothing is held back
    assert time.monotonic() - began < 30
    status, said = gpu._run([sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert status == 3


def test_what_a_part_had_found_is_there_when_it_fails(tmp_path, monkeypatch):
    def part(scale, found):
        found["first"] = 1
        found["second"] = fail()

    monkeypatch.setitem(gpu.PARTS, "smoke", part)
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    file = tmp_path / "found.json"
    assert gpu.run_part("smoke", file, gpu.TINY) == 1
    assert json.loads(file.read_text()) == {"first": 1}
    assert "ValueError: mine" in file.with_suffix(".failed").read_text()


@pytest.mark.parametrize(
    ("status", "why"), [(0, ""), (None, "timed out after 90 s"), (-9, "ended with status -9"), (1, "ValueError: mine")]
)
def test_a_part_is_a_process_of_its_own(monkeypatch, status, why):
    def wait(command, limit, *_, **__):
        file = gpu.Path(command[command.index("--into") + 1])
        gpu.Found(file)["first"] = 1
        if status == 1:
            file.with_suffix(".failed").write_text(why)
        return status

    monkeypatch.setattr(gpu, "_wait", wait)
    assert gpu.attempt("smoke", 500.0, False) == ({"first": 1}, why)
    assert gpu.attempt("smoke", 5.0, False) == ({}, "no time was left for it")


def test_the_parts_are_merged_and_those_that_failed_are_named(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"latency": {"field": 2.0}, "parts": {"latency": {"date": "then"}}}))
    told = {"smoke": ({"solves unlike the first": 0}, ""), "latency": ({}, "timed out after 45 s")}
    monkeypatch.setattr(gpu, "attempt", lambda name, left, rehearse: told[name])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main(["--rehearse", "--only", "smoke", "latency", "--output", str(output)]) == 1
    found = json.loads(output.read_text())
    assert found["smoke"] == {"solves unlike the first": 0}
    assert found["latency"] == {"field": 2.0}  # as it was
    assert found["parts"]["latency"] == {"date": "then"}
    assert found["failed"] == {"latency": "timed out after 45 s"}
    assert "failed: latency" in capsys.readouterr().out


def test_a_comparison_keeps_the_times_of_the_others(tmp_path):
    found = gpu.Found(tmp_path / "found.json")
    problem = gpu.problem_on(gpu.torch.device("cpu"), gpu.torch.float32, 2, 4)
    chosen = {"forward": lambda: None, "forward, odeint": lambda: None, "train, adjoint": fail}
    with pytest.raises(RuntimeError, match="mine"):
        gpu.compare("small", problem, chosen, gpu.TINY, found)
    assert set(found["small"]["milliseconds"]) == {"forward", "forward, odeint"}
    assert list(found["small"]["ratios"]) == ["forward, odeint / forward"]
    assert found["small"]["raised"] == {"train, adjoint": "ValueError: mine"}
    assert gpu.lines({"solves": found})


def test_figures_of_graphs_are_of_graphs(monkeypatch):
    monkeypatch.setattr(gpu, "GPU", True)
    stats = SimpleNamespace(loop="graph", loop_backward="eager: the captured loop is in use")
    gpu.insist(stats, backward=False)
    with pytest.raises(RuntimeError, match="in use"):
        gpu.insist(stats)


def test_a_sanitizer_cut_short_has_no_exit_status(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: sys.executable)
    ran = []
    monkeypatch.setattr(gpu, "_run", lambda command, limit, **_: ran.append(command) or (None, "loop='graph'"))
    found = gpu.sanitize("racecheck", "graph")
    assert found["timed out"] == 180
    assert "exit" not in found
    assert found["loops"] == ["graph"]
    assert ran[0][ran[0].index("--target-processes") + 1] == "application-only"
    (line,) = gpu.lines({"checks": {"racecheck": found}})
    assert "timed out" in line.what
    assert line.met is None
