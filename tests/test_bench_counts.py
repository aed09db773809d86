"""The guard on counts: what it lets pass and what it stops."""

import json

import pytest

from benchmarks import counts


def test_a_count_may_fall_and_not_grow():
    stored = {"a": {"operators": 50.0, "reads": 1.0}}
    assert counts.worse({"a": {"operators": 49.0, "reads": 1.0}}, stored) == []
    assert counts.worse({"a": {"operators": 50.0 + counts.SLACK / 2, "reads": 1.0}}, stored) == []
    assert counts.worse({"a": {"operators": 51.0, "reads": 1.0}}, stored) == ["a: operators: 51, stored 50"]


def test_a_count_that_is_gone_or_new_is_said():
    stored = {"a": {"operators": 50.0}}
    assert counts.worse({"a": {}}, stored) == ["a: operators: stored, not counted"]
    assert counts.worse({"a": {"operators": 50.0}, "b": {"reads": 0.0}}, stored) == ["b: reads: counted, not stored"]


def test_the_check_fails_by_name_and_says_how_to_renew(monkeypatch, tmp_path, capsys):
    """One model and no peers, against a file in which one operator a step was saved."""
    taken = {"nesterov_triton, NODE": counts.count(counts.ours, "NODE")}
    what = "forward: operators, per accepted step"
    stored = {name: table | {what: table[what] - 1} for name, table in taken.items()}
    stored["nesterov_triton, kernels"] = {}
    stored["torchdiffeq, NODE"] = {what: 1.0}  # peers are no reason to fail
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"versions": {"torch": "2.13"}, "commit": "abc", "tables": stored}))
    monkeypatch.setattr(counts, "STORED", path)
    monkeypatch.setattr(counts, "kernels", dict)
    monkeypatch.setattr(counts, "count_all", lambda solvers: taken)
    with pytest.raises(SystemExit, match="python -m benchmarks counts") as stopped:
        counts.main(["--check"])
    assert stopped.value.code != 0
    assert f"NODE: {what}" in capsys.readouterr().out


def test_a_step_of_the_package_reads_the_host_once_and_torchdiffeqs_more_often():
    ours, theirs = (counts.count(counts.SOLVERS[name], "NODE") for name in ("nesterov_triton", "torchdiffeq"))
    what = "forward: host reads, per accepted step"
    assert ours[what] == 1
    assert theirs[what] > 10
    assert ours["peak memory in states, discrete, per accepted step"] == pytest.approx(1, abs=0.05)
