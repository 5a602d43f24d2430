"""Contract of settings.py: a run's identity, its flags and the values it refuses derive from the declared settings."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from quaclrs.cli import train
from quaclrs.config import TrainConfig
from quaclrs.errors import TrainingError, UsageError
from quaclrs.experiment.run import Run
from quaclrs.settings import (
    NOT_NEGATIVE,
    Settings,
    at_least,
    check_requirements,
    identity_defaults,
    identity_entries,
    setting,
)
from quaclrs.training.architectures import ARCHITECTURES
from quaclrs.training.checkpoint import refuse_other_run
from quaclrs.training.distributed import World


@dataclass(frozen=True, kw_only=True)
class Extended(TrainConfig):
    """What a later version adds: one field for each kind of setting."""

    label_smoothing: float = setting(0.0, affects_result=True, group="training", help="0 to 1", requires=NOT_NEGATIVE)
    teacher: Path | None = setting(None, affects_result=True, group="training", help="to distil from")  # noqa: RUF009
    verbose: bool = setting(False, affects_result=False, group="run", help="say more")


def run_of(config: TrainConfig) -> Run:
    """A run as far as its identity goes."""
    return Run(
        config=config,
        dataset=cast(Any, SimpleNamespace(identity="sha256 of the data")),
        samples={},
        loader=cast(Any, SimpleNamespace(pixels="exact", replicated=True)),
        device=torch.device("cpu"),
        image_size=config.image_size or 224,
        global_batch=config.batch_size,
        world=World(),
        signals=cast(Any, None),
        log=print,
    )


# --- the identity ---


def test_the_identity_is_the_one_that_earlier_runs_saved() -> None:
    """Otherwise runs that began before could not be resumed. A setting younger than those runs has a default."""
    saved = {
        **{"model_name": "resnet18", "pretrained": False, "freeze_features": False, "image_size": 224},
        **{"global_batch": 32, "epochs": 30, "patience": 7, "learning_rate": 1e-3, "weight_decay": 1e-5},
        **{"scheduler": "plateau", "use_amp": False, "compute_dtype": "torch.float32", "tf32": False},
        **{"sync_bn": False, "seed": 42, "fold": 3, "num_folds": 10},
        **{"data": "sha256 of the data", "pixels": "exact", "order": "global"},
    }
    now = run_of(TrainConfig()).identity(3)
    assert {name: now[name] for name in saved} == saved
    assert set(now) - set(saved) <= set(identity_defaults(TrainConfig()))
    amp = run_of(TrainConfig(use_amp=True, amp_dtype="float16")).identity(1)
    assert (amp["use_amp"], amp["compute_dtype"]) == (True, "torch.float16")


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_field_says_whether_it_affects_the_result(field: dataclasses.Field[Any]) -> None:
    """And what affects it is represented in the identity."""
    assert isinstance(field.metadata["affects_result"], bool)
    identity = run_of(TrainConfig()).identity(1)
    if field.metadata["affects_result"]:
        assert set(field.metadata["identity"] or [field.name]) <= set(identity)
    else:
        assert field.name not in identity


def test_a_new_field_is_compared_without_another_edit(tmp_path: Path) -> None:
    before, after = run_of(Extended()), run_of(Extended(label_smoothing=0.1, teacher=Path("a/b"), verbose=True))
    saved, now = json.loads(json.dumps(before.identity(1))), after.identity(1)
    assert (saved["label_smoothing"], now["label_smoothing"], now["teacher"]) == (0.0, 0.1, "a/b")
    assert "verbose" not in now
    refuse_other_run(tmp_path, saved, before.identity(1))
    with pytest.raises(
        TrainingError, match=r"\(label_smoothing was 0.0, now 0.1; teacher was None, now 'a/b'\); use the same settings"
    ):
        refuse_other_run(tmp_path, saved, now)


def test_a_run_from_before_a_setting_existed_had_its_default(tmp_path: Path) -> None:
    saved = json.loads(json.dumps(run_of(TrainConfig()).identity(1)))
    assert "label_smoothing" not in saved
    refuse_other_run(tmp_path, saved, run_of(Extended()).identity(1), identity_defaults(Extended()))
    now = Extended(label_smoothing=0.1)
    with pytest.raises(TrainingError, match=r"\(label_smoothing was 0.0, now 0.1\); use the same settings"):
        refuse_other_run(tmp_path, saved, run_of(now).identity(1), identity_defaults(now))
    del saved["data"]  # which has no default
    with pytest.raises(TrainingError, match=r"\(data was None, now "):
        refuse_other_run(tmp_path, saved, run_of(Extended()).identity(1), identity_defaults(Extended()))


def test_a_field_without_metadata_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match=r"Forgetful\.momentum: declare it as setting\(default, affects_result="):

        class Forgetful(TrainConfig):
            momentum: float = 0.9

    with pytest.raises(TypeError, match="affects_result"):
        setting(0.9)  # type: ignore[call-arg]  # that is the point


def test_an_entry_that_nobody_provides_is_an_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Misspelt(TrainConfig):
        warm_up: int = setting(0, affects_result=True, identity=("warmup",))

    assert "warmup" in identity_entries(Misspelt())
    with pytest.raises(AttributeError, match="warmup"):
        run_of(Misspelt()).identity(1)


# --- refused values ---


@dataclass(frozen=True, kw_only=True)
class _Small(Settings):
    count: int | None = setting(None, affects_result=False, requires=at_least(2, ", for a pair"))
    kind: str = setting("a", affects_result=False, choices=("a", "b"))

    def __post_init__(self) -> None:
        check_requirements(self)


def test_values_are_refused_by_the_fields_own_words() -> None:
    assert _Small(count=2, kind="b").count == 2
    with pytest.raises(UsageError, match=r"^--count 1: at least 2, for a pair$"):
        _Small(count=1)
    with pytest.raises(UsageError, match=r"^--kind c: choose one of a, b$"):
        _Small(kind="c")


# --- flags ---


def test_a_new_field_is_a_flag_without_another_edit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "TrainConfig", Extended)
    config = train.to_config(train.parse(["--label-smoothing", "0.1", "--teacher=a/b", "--verbose"]))
    assert config == Extended(label_smoothing=0.1, teacher=Path("a/b"), verbose=True)
    with pytest.raises(UsageError, match=r"--label_smoothing -1.0: not negative"):
        train.to_config(train.parse(["--label_smoothing=-1"]))
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    assert re.search(r"\ntraining:\n.*--label_smoothing LABEL_SMOOTHING\s+0 to 1.*\nrun:\n", shown, re.DOTALL)


def test_the_help_lists_the_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, last = ARCHITECTURES
    monkeypatch.setitem(ARCHITECTURES, "one_more", ARCHITECTURES["resnet18"])
    text = " ".join(train._parser().format_help().split())
    assert text.count(f"{last} or one_more; several with commas, or all") == 1
