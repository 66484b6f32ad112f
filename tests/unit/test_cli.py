"""The command line's contract: exit codes, one line per fault, and an instant --help."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2ft_ray import cli, node
from s2ft_ray.errors import AdapterError, ConfigError, DataError, JobError, NodeError, S2FTError
from s2ft_ray.node import NodeStatus, ServiceStatus


def _status(state: str = "up", env: dict[str, str] | None = None) -> NodeStatus:
    return NodeStatus(
        home="/home/of/mine",
        port_base=8600,
        services=[
            ServiceStatus("ray", "up", "http://127.0.0.1:8601", 11, "/home/of/mine/logs/ray.log"),
            ServiceStatus("mlflow", state, "http://127.0.0.1:8602", 12, "/home/of/mine/logs/m.log"),
        ],
        env=env or {},
    )


def _raise(error: BaseException):
    def run(_: Path) -> NodeStatus:
        raise error

    return run


def test_help_loads_no_heavy_package() -> None:
    program = (
        "import sys; from s2ft_ray import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print({'ray', 'torch', 'mlflow', 'transformers', 'datasets'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "set()", ran.stderr
    for command in ("up", "down", "status", "check"):
        assert f"\n    {command} " in ran.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a: wrong", "b: wrong"), 2),
        (DataError("rows.jsonl:3: wrong"), 2),
        (AdapterError("of another base"), 2),
        (NodeError("ray: ended"), 1),
        (JobError("lost"), 1),
        (S2FTError("other"), 1),
    ],
)
def test_a_fault_is_one_line_on_stderr_and_decides_the_exit_code(
    error: S2FTError,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(node, "status", _raise(error))
    assert cli.main(["status"]) == code
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"error: {fault}" for fault in error.faults]
    assert printed.out == ""


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "status", _raise(KeyboardInterrupt()))
    assert cli.main(["status"]) == 130


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "s2ft_ray.cli", "status"]
    env = {**os.environ, "S2FT_HOME": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=env, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `head` does, before the first line comes
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "status", _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["status"])


@pytest.mark.parametrize(
    "argv",
    [[], ["sideways"], ["up", "--num-cpus", "0"], ["check"], ["status", "--env", "--json"]],
)
def test_a_wrong_command_line_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2


@pytest.mark.parametrize(("state", "code"), [("up", 0), ("unresponsive", 1), ("down", 1)])
def test_status_exits_0_only_if_every_service_is_up(
    state: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "status", lambda _: _status(state))
    assert cli.main(["status"]) == code
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows[1:]] == [["ray", "up"], ["mlflow", state]]


def test_status_as_json_holds_the_same_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "status", lambda _: _status(env={"RAY_ADDRESS": "127.0.0.1:8600"}))
    assert cli.main(["status", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["state"] == "up"
    assert facts["env"] == {"RAY_ADDRESS": "127.0.0.1:8600"}
    assert [service["pid"] for service in facts["services"]] == [11, 12]


def test_env_lines_survive_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"S2FT_HOME": "/home/of mine/$it", "RAY_AUTH_MODE": "token"}
    monkeypatch.setattr(node, "status", lambda _: _status(env=env))
    assert cli.main(["status", "--env"]) == 0
    lines = capsys.readouterr().out
    shell = 'eval "$LINES_OF_ENV"; printf "%s\\n%s" "$S2FT_HOME" "$RAY_AUTH_MODE"'
    ran = subprocess.run(["sh", "-c", shell], env={"LINES_OF_ENV": lines}, capture_output=True)
    assert ran.stdout.decode().splitlines() == list(env.values())


def test_env_of_a_node_that_is_down_prints_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "never"))
    assert cli.main(["status", "--env"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: nothing is up in ")
    assert not (tmp_path / "never").exists()


def test_check_tells_each_fault_of_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("tenant: acme\nname: bot\ndata: {trian: rows.jsonl}\n")
    assert cli.main(["check", "--config", str(config), "--set", "optim.lr=-1"]) == 2
    faults = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"error: {config}: ") for line in faults)
    assert {line.split(": ")[2] for line in faults} == {"data.train", "data.trian", "optim.lr"}


def test_check_tells_what_a_sound_run_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path))
    rows, config = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    # " odd" is three tokens; six before it, one after it.
    answers = [" odd"] * 197 + [" odd" * 2] * 2 + [" odd" * 4]
    made = ({"prompt": "Number 1 is", "completion": answer} for answer in answers)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    config.write_text(
        f"tenant: acme\nname: bot\ndata: {{train: {rows}, eval: {rows}}}\n"
        "method: {budgets: {down: 0.25}}\noptim: {epochs: 2}\nparallel: {sharding: replicate}\n"
    )
    assert cli.main(["check", "--config", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line[:12].strip(): line[12:] for line in lines}
    channels = 384 // 4
    assert told["trainable"].startswith(f"{4 * channels * 128:,} of 885,888 parameters (5.55%)")
    assert told["data"].startswith("200 rows to train on, 200 held out; 0 dropped, 0 cut to 512")
    assert told["tokens"].startswith("p50 10, p99 13, max 19; 815 of 2,015 are targets")
    assert told["steps"] == "25 of 16 rows"
    pattern = r"about (\d+) MiB on each of 1 worker\(s\) in replicate: base 3\.4, "
    memory = re.match(pattern, told["memory"])
    assert memory is not None
    assert 3 < int(memory[1]) < 100
    assert told["first row"] == "[<|begin|>Number 1 is] odd<|end|>"


def test_down_where_nothing_was_started_is_a_no_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("S2FT_HOME", str(tmp_path / "never"))
    assert cli.main(["down"]) == 0
    assert capsys.readouterr().out == f"nothing is up in {tmp_path / 'never'}\n"
    assert not (tmp_path / "never").exists()
