"""What the shipped specification says, and which machines it lets run."""

import dataclasses

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.machine import Machine, this_machine
from sparsedeploy.runtimes.specification import load_runtime, runtime_for_target, runtime_names

MACHINE = Machine("Linux", "x86_64", "any", ("avx2", "sse4_2"), 2, None, None)


def test_every_shipped_runtime_loads_and_has_its_files() -> None:
    assert "deepsparse" in runtime_names()
    for name in runtime_names():
        runtime = load_runtime(name)
        assert runtime.requirements.is_file()
        assert runtime.worker.is_file()
        assert runtime.python[0] <= runtime.python[1]


def test_deepsparse_pins_the_last_release_that_installs_and_sends_no_usage_reports() -> None:
    runtime = load_runtime("deepsparse")
    pins = runtime.requirements.read_text().splitlines()
    assert "deepsparse==1.8.0" in pins
    assert all("==" in pin for pin in pins if not pin.startswith("#"))
    assert runtime.environment["NM_DISABLE_ANALYTICS"] == "1"
    assert [runtime.accepts_python((3, minor)) for minor in (8, 9, 11, 12)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"system": "Windows"}, "runs on Linux, this is Windows"),
        ({"machine": "aarch64"}, "runs on x86_64, this is aarch64"),
        ({"flags": ("sse4_2",)}, "needs a processor with avx2 or avx512f"),
    ],
)
def test_machine_that_cannot_run_it_is_told_why(change: dict[str, object], words: str) -> None:
    runtime = load_runtime("deepsparse")
    assert runtime.why_not_here(MACHINE) is None
    assert words in str(runtime.why_not_here(dataclasses.replace(MACHINE, **change)))


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"unknown runtime 'deepsparce'. Known: .*deepsparse"):
        load_runtime("deepsparce")
    assert runtime_for_target("deepsparse").name == "deepsparse"
    with pytest.raises(UserError, match=r"no runtime here runs an artifact of target 'abacus'") as error:
        runtime_for_target("abacus")
    targets = error.value.fix.removeprefix("Export for one of: ").rstrip(".").split(", ")
    assert targets == sorted(set(targets))


def test_this_machine_is_described() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.processor
    assert machine.system in ("Linux", "Darwin", "Windows")
