"""The gradl1 command."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gradl1_fast import __version__, backends
from gradl1_fast._extras import install
from gradl1_fast.backends import compiled
from gradl1_fast.cli import app

WIDE = {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}


def gradl1(*args, **env):
    return CliRunner(env={**WIDE, **env}).invoke(app, list(args))


@pytest.mark.parametrize("args", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help_teaches_by_an_example(args):
    result = gradl1(*args)
    assert result.exit_code == 0
    assert "gradl1 demo" in result.output or "gradl1 info" in result.output


@pytest.mark.parametrize("command", ["sweep", "export"])
def test_help_says_that_the_input_keeps_8_bits(command):
    assert "network's input keeps 8 bits" in " ".join(gradl1(command, "--help").output.split())


def test_help_of_the_demo_says_how_long_it_takes():
    assert "minutes" in gradl1("demo", "--help").output


@pytest.mark.parametrize(("seeds", "text"), [(1, "about one minute"), (5, "about 2 minutes")])
def test_the_demo_says_how_long_it_takes_with_more_pairs(seeds, text):
    from gradl1_fast.cli.demo import _duration

    assert _duration(seeds) == text


def test_version():
    assert gradl1("--version").output.strip() == f"gradl1-fast {__version__}"


def test_info_names_versions_devices_and_a_backend_for_each_operation():
    output = gradl1("info").output
    assert all(word in output for word in ("torch", "python", "Backends on cpu", "reference"))
    assert all(op in output for op in backends.OPERATIONS)


def test_info_shows_the_variables_in_force():
    output = gradl1("info", GRADL1_BACKEND="reference").output
    assert "GRADL1_BACKEND" in output


def test_info_gives_the_reason_why_a_backend_cannot(monkeypatch):
    def refuse(op, device):
        raise backends.UnavailableError("the moon is full")

    monkeypatch.setattr(backends, "_LOADERS", {"lunar": refuse, **backends._LOADERS})
    assert "not lunar: the moon is full" in gradl1("info").output


def test_info_names_the_operations_that_a_reason_is_about(monkeypatch):
    def refuse_one(op, device):
        if op == "tap":
            raise backends.UnavailableError("the moon is full")
        return backends.reference

    monkeypatch.setattr(backends, "_LOADERS", {"lunar": refuse_one, **backends._LOADERS})
    assert "not lunar for tap: the moon is full" in gradl1("info").output


def test_info_shows_the_compiled_extension(monkeypatch):
    facts = {"C++ compiler": "GNU 99", "CUDA architectures": "80 90"}
    monkeypatch.setattr(compiled, "describe", lambda: facts)
    output = gradl1("info").output
    assert all(text in output for pair in facts.items() for text in pair)


def test_info_shows_how_to_request_another_backend(monkeypatch):
    other = {"other": lambda op, device: sys}
    monkeypatch.setattr(backends, "_LOADERS", backends._LOADERS | other)
    assert (
        "not other: can, but does not come first; ask for it with GRADL1_BACKEND=other"
        in gradl1("info").output
    )


def test_info_refuses_an_unknown_backend_in_one_sentence():
    result = gradl1("info", GRADL1_BACKEND="wrong")
    assert result.exit_code == 1
    assert "GRADL1_BACKEND: unknown backend 'wrong'" in result.output


def test_the_demo_prints_its_tables_and_writes_its_files(tmp_path):
    result = gradl1("demo", "--quick", "--seeds", "1", "--out", str(tmp_path / "new" / "folder"))
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(
        "Training one pair of networks and timing steps: a few seconds on an idle"
    )
    assert "Test accuracy" in result.output
    assert "eager double backprop" in result.output
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert page.count('role="img"') == 4
    numbers = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert set(numbers) == {"settings", "environment", "accuracy_percent", "step_time", "seconds"}
    assert len(numbers["accuracy_percent"]) == 2 * 16


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    result = gradl1("demo", "--out", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "cannot write to" in result.output
    assert "--out" in result.output


@pytest.mark.parametrize("missing", ["sklearn.datasets", "matplotlib.figure", "jinja2"])
def test_a_missing_package_is_named_before_the_work(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    result = gradl1("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert install("cli") in result.output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_packages_the_command_says_what_to_install(missing):
    code = f"import sys; sys.modules['{missing}'] = None\nfrom gradl1_fast.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"The gradl1 command needs typer and rich: {install('cli')}\n"


def test_the_experiment_prints_its_table_and_writes_its_rows(tmp_path):
    rows = tmp_path / "deep" / "rows.json"
    arguments = ["digits", "--quick", "--methods", "plain, gradl1", "--seeds", "1", "--json", str(rows)]
    arguments += ["--widths", "float; 3,4; 2,float"]
    result = gradl1("experiment", *arguments, "--out", str(tmp_path / "runs"))
    assert result.exit_code == 0, result.output
    assert "gradl1, quantized" in result.output
    assert "float, one seed: plain" in result.output
    found = json.loads(rows.read_text())
    assert {row["method"] for row in found} == {"plain", "gradl1"}
    assert len(found) == 2 * 3 * 3
    assert {(row["w"], row["a"]) for row in found} == {(None, None), (3, 4), (2, None)}
    assert "<html" in (tmp_path / "runs" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenet"], "experiment must be one of fashion-mnist, fashion-mnist-depthwise"),
        (["digits", "--methods", "plain,magic"], "methods must be among plain, asam, gradl1"),
        (["digits", "--methods", ","], "got none"),
        (["digits", "--widths", "4"], "--widths: give pairs of weight and activation bits"),
        (["digits", "--widths", "4,17"], "--widths: widths are float or numbers from 1 to 16, got '17'"),
        (["digits", "--widths", ";"], "widths must hold at least one pair"),
        (["digits", "--regimes", "magic"], "regimes must be among per tensor; per channel"),
        (["fashion-mnist", "--data", "/nowhere"], "dataset-fashion-mnist"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_sentence(arguments, message, tmp_path):
    result = gradl1("experiment", *arguments, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert message in result.output


def test_help_of_the_experiment_explains_every_method():
    output = gradl1("experiment", "--help").output
    assert all(f"{name}:" in output for name in ("plain", "gradl1-unscaled", "qat-4", "kure", "calibrated"))
    assert "Example: gradl1 experiment fashion-mnist" in output
