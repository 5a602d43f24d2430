"""Contract of the peers' environments: each is made once, and again after a failure, whose reason is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import benchmarking  # noqa: F401 - puts benchmarks/ on sys.path
import numpy as np
import pytest
from harness import peer_environment
from harness.contender import PeerError
from harness.peer_environment import make_environment


def test_pips_reason_is_told(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-file.whl")
    with pytest.raises(PeerError, match=r"^ours: not installed: ERROR: .*no-such-file\.whl"):
        peer_environment._install("ours", [sys.executable, "-m", "pip", "install", missing])


def test_an_environment_is_made_once_and_after_a_failure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    failing = True

    def install(name: str, command: list[str]) -> None:
        commands.append(command)
        (tmp_path / "ours").mkdir(exist_ok=True)
        if failing and "pip" in command:
            raise PeerError(name, "not installed: no network")

    monkeypatch.setattr(peer_environment, "_install", install)
    with pytest.raises(PeerError, match="no network"):
        make_environment("ours", ["numpy==1"], tmp_path)
    failing = False
    for requirements, expected in ((["numpy==1"], 4), (["numpy==1"], 4), (["numpy==2"], 6)):
        assert make_environment("ours", requirements, tmp_path) == tmp_path / "ours" / "bin" / "python"
        assert len(commands) == expected  # venv and pip each time something has to be made
    assert ["--clear", str(tmp_path / "ours")] == commands[4][-2:]
    assert commands[5][-1] == "numpy==2"


@pytest.mark.exhaustive  # makes an environment, which takes seconds
def test_a_real_environment_that_failed_is_not_taken_for_whole(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"^ours: not installed: ERROR: .*no-such-file\.whl"):
        make_environment("ours", [str(tmp_path / "no-such-file.whl")], tmp_path)
    assert not (tmp_path / "ours" / "requirements.txt").exists()  # so that the next run makes it again


@pytest.mark.exhaustive  # makes an environment, which takes seconds
def test_an_environment_over_ours_has_our_packages(tmp_path: Path) -> None:
    # an installed requirement: pip finds it in ours and installs nothing
    python = make_environment("over", ["numpy"], tmp_path, over_ours=True)
    asked = subprocess.run(
        [str(python), "-c", "import numpy; print(numpy.__file__)"], capture_output=True, text=True, check=True
    )
    assert asked.stdout.strip() == np.__file__
    before = (tmp_path / "over" / "requirements.txt").stat().st_mtime_ns
    assert make_environment("over", ["numpy"], tmp_path, over_ours=True) == python
    assert (tmp_path / "over" / "requirements.txt").stat().st_mtime_ns == before
