"""Contract of ``quaclrs-train``: the original commands; bad input is one line and exit code 2; one packing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from png_trees import PngTree, grid_image, make_rows, write_csv, write_tree

from quaclrs.cli.train import main, parse, to_config
from quaclrs.config import TrainConfig
from quaclrs.experiment import fold

CSV_NAME = "spectrograms_balanced_no_sirens.csv"
CLASSES = ("dog_bark", "drilling", "traffic")

FLAGS = {
    "csv_file": ("a.csv", Path("a.csv"), None),
    "spectrograms_dir": ("images", Path("images"), None),
    "model_name": ("vgg16", "vgg16", "resnet18"),
    "batch_size": ("64", 64, 32),
    "num_workers": ("2", 2, 4),
    "learning_rate": ("0.01", 0.01, 1e-3),
    "weight_decay": ("0.1", 0.1, 1e-5),
    "epochs": ("5", 5, 30),
    "patience": ("3", 3, 7),
    "scheduler": ("cosine", "cosine", "plateau"),
    "device": ("cpu", "cpu", "auto"),
    "output_dir": ("out", Path("out"), Path("results")),
    "fold": ("3", 3, None),
    "shards": ("packed", Path("packed"), None),
    "loader": ("files", "files", "auto"),
    "image_size": ("96", 96, None),
    "seed": ("7", 7, 42),
    "compile": ("inductor", "inductor", "none"),
    "prefetch": ("4", 4, 2),
    "parallel": ("folds", "folds", None),
    "nproc": ("3", 3, None),
    "checkpoint_minutes": ("2.5", 2.5, None),
}
"""Flag to (text, value, default): the original's, then ours."""
SWITCHES = ("pretrained", "freeze_features", "use_amp", "tf32", "sync_bn", "distributed", "resume", "profile", "demo")


def config_of(*flags: str) -> TrainConfig:
    return to_config(parse(flags))


# --- flags ---


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_in_all_its_spellings(name: str) -> None:
    text, value, default = FLAGS[name]
    hyphenated = name.replace("_", "-")
    assert getattr(config_of(), name) == default
    for flags in ([f"--{name}", text], [f"--{name}={text}"], [f"--{hyphenated}", text], [f"--{hyphenated}={text}"]):
        assert getattr(config_of(*flags), name) == value


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_in_all_its_spellings(name: str) -> None:
    assert getattr(parse([]), name) is False
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert getattr(parse([flag]), name) is True


def test_hyphens_in_values_stay() -> None:
    config = config_of("--output-dir", "a-b", "--csv-file=c-d/e-f.csv", "--file-column", "spec-name")
    assert (config.output_dir, config.csv_file, config.columns.file) == (Path("a-b"), Path("c-d/e-f.csv"), "spec-name")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "--model_name resnet18 --batch_size 32 --epochs 30",
            {"model_name": "resnet18", "batch_size": 32, "epochs": 30, "fold": None},
        ),
        ("--model_name mobilenet --fold 1", {"model_name": "mobilenet", "fold": 1, "use_amp": False}),
        ("--model_name efficientnet --use_amp", {"model_name": "efficientnet", "use_amp": True, "fold": None}),
    ],
)
def test_the_originals_example_commands(command: str, expected: dict[str, object]) -> None:
    for pretrained in (False, True):
        config = config_of(*command.split(), *(["--pretrained"] if pretrained else []))
        assert {name: getattr(config, name) for name in expected} == expected
        assert config.pretrained is pretrained


def test_demo_changes_defaults_but_not_what_is_given() -> None:
    demo = config_of("--demo")
    assert (demo.fold, demo.model_name) == (1, "resnet18")
    assert demo.epochs < 30
    assert demo.image_size is not None
    parallel = config_of("--demo", "--parallel", "folds", "--nproc", "2")
    assert (parallel.fold, parallel.epochs < demo.epochs) == (None, True)
    given = config_of("--demo", "--epochs", "9", "--fold", "2")
    assert (given.epochs, given.fold, given.image_size) == (9, 2, demo.image_size)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "quaclrs-train 0.1.0\n"


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert [name for name in (*FLAGS, *SWITCHES) if f"--{name}" not in text] == []


# --- bad input ---


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> PngTree:
    """Three classes in folds 1, 2 and 3, seven rows each; the CSV has the original's name. Read only."""
    root = tmp_path_factory.mktemp("cli")
    written = write_tree(root, make_rows(CLASSES, (1, 2, 3)))
    written.csv_file.rename(root / CSV_NAME)
    return PngTree(root / CSV_NAME, written.spectrograms_dir, written.rows)


@pytest.fixture
def own_tree(tree: PngTree, tmp_path: Path) -> PngTree:
    """A copy of ``tree`` that may be changed."""
    shutil.copytree(tree.csv_file.parent, tmp_path / "data")
    return PngTree(tmp_path / "data" / CSV_NAME, tmp_path / "data" / "spectrograms", tree.rows)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, so that no default path leads to data; no existing results are touched. And without plots,
    which take longer than the training.
    """
    monkeypatch.setattr(fold, "write_plots", lambda *_: [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


QUICK = "--model_name mobilenet --image_size 8 --batch_size 8 --epochs 1 --num_workers 0 --gradcam_per_class 0"


def data_flags(tree: PngTree) -> list[str]:
    return ["--csv_file", str(tree.csv_file), "--spectrograms_dir", str(tree.spectrograms_dir)]


def training_flags(tree: PngTree) -> list[str]:
    return [*data_flags(tree), *QUICK.split(), "--num_folds", "3", "--loader", "files"]


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line on stderr that refuses ``flags``."""
    capsys.readouterr()
    try:
        code: str | int | None = main(flags)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("quaclrs-train: error: ")
    assert output.err.endswith("\n")
    assert "epoch" not in output.out  # nothing was trained
    return output.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--fold 11", "--fold 11: there are folds 1 to 10"),
        ("--fold 0", "--fold 0: there are folds 1 to 10"),
        ("--num_folds 3 --fold 4", "--fold 4: there are folds 1 to 3"),
        ("--num_folds 2", "--num_folds 2: at least 3"),
        ("--batch_size 1", "--batch_size 1: at least 2"),
        ("--epochs 0", "--epochs 0: at least 1"),
        ("--patience 0", "--patience 0: at least 1"),
        ("--learning_rate 0", "--learning_rate 0.0: must be positive"),
        ("--learning_rate nan", "--learning_rate nan: must be positive"),
        ("--learning_rate inf", "--learning_rate inf: must be positive and finite"),
        ("--weight_decay=-1", "--weight_decay -1.0: must be finite and not negative"),
        ("--seed=-1", "--seed -1: not negative"),
        ("--num_workers=-1", "--num_workers -1: not negative"),
        ("--keep_checkpoints 0", "--keep_checkpoints 0: at least 1"),
        ("--gradcam_per_class=-1", "--gradcam_per_class -1: not negative"),
        ("--scheduler step", "--scheduler"),
        ("--batch_size many", "--batch_size: invalid int value: 'many'"),
        ("--batch-size", "--batch_size: expected one argument"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),  # no abbreviations: a later flag could change their meaning
        (
            "--distributed --device cpu",
            "--distributed: no GPU to be used here; give --nproc N for N processes on the CPU",
        ),
        ("--loader dail", "--loader dail: choose one of auto, resident, mapped, dali, files"),
        ("--model_name resnet50", "--model_name resnet50: choose one of alexnet, vgg16, resnet18,"),
        (
            "--model_name resnet19",
            ", several with commas, or all; did you mean resnet18?\n",
        ),
        ("--model_name vgg16,Resnet_18", "--model_name Resnet_18: choose one of alexnet"),
        ("--loader map", "files; did you mean mapped?\n"),
        ("--loader qqq", "dali, files\n"),
        ("--scheduler cosin", "--scheduler cosin: choose one of plateau, cosine, none; did you mean cosine?\n"),
        ("--compile cudagraphs", "; did you mean cudagraph?\n"),
        (
            "--use_amp --amp_dtype bfloat",
            "--amp_dtype bfloat: choose one of float16, bfloat16; did you mean bfloat16?\n",
        ),
        ("--parallel fold", "--parallel fold: choose folds; did you mean folds?\n"),
        ("--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs; see quaclrs-train --help\n"),
        ("--label_column Class", "--fold_column; did you mean class?\n"),
        ("--device gpu", "--device gpu: choose auto, cpu, cuda or cuda:N"),
        ("--device meta", "--device meta: choose auto, cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99: torch sees"),
        ("--model_name alexnet --image_size 62", "--image_size 62: alexnet needs at least 63 pixels"),
        ("--model_name inception --image_size 224", "--image_size 224: inception needs at least 299 pixels"),
        ("--image_size 0", "--image_size 0: mobilenet needs at least 1 pixels"),
        ("--image_size=-5", "--image_size -5: mobilenet needs at least 1 pixels"),
    ],
)
def test_flags_that_cannot_work(flags: str, expected: str, tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, *training_flags(tree), *("--num_folds 10 " + flags).split())
    assert list(Path.cwd().iterdir()) == []  # nothing was written


def test_case_does_not_matter(tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*training_flags(tree), "--fold", "1", "--model_name", "MobileNet", "--loader", "Files"]) == 0
    metrics = json.loads(Path("results/mobilenet/fold_1/metrics.json").read_text())
    assert (metrics["model_name"], metrics["loader"]) == ("mobilenet", "files")
    assert main([*training_flags(tree), "--fold", "1", "--model_name", "mobilenet", "--resume"]) == 0  # the same run
    assert "finished before" in capsys.readouterr().out


def test_cuda_without_a_gpu(tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "--device cuda: torch sees 0 CUDA device(s) here; use --device auto or cpu" in refused(
        capsys, *training_flags(tree), "--device", "cuda"
    )


def test_half_an_environment_of_torchrun_is_refused(
    tree: PngTree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "sets WORLD_SIZE=2 but RANK=''; start with torchrun, or unset WORLD_SIZE" in refused(
        capsys, *training_flags(tree)
    )


def test_data_that_is_not_there(tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{CSV_NAME}: cannot read the CSV (No such file or directory); check --csv_file" in refused(capsys)
    for loader in ("files", "dali"):
        line = refused(capsys, *training_flags(tree), "--loader", loader, "--csv_file", "no.csv")
        assert "no.csv: cannot read the CSV (No such file or directory); check --csv_file" in line
        line = refused(capsys, *training_flags(tree), "--loader", loader, "--spectrograms_dir", "nowhere")
        assert "nowhere" in line
        assert "check --spectrograms_dir" in line
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("loader", ["files", "dali"])
def test_a_folder_of_images_that_is_the_wrong_one(
    loader: str, own_tree: PngTree, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*training_flags(own_tree), "--loader", loader, "--spectrograms_dir"]
    above, one_fold = own_tree.spectrograms_dir.parent, own_tree.spectrograms_dir / "fold1"
    missing = f"(of {own_tree.csv_file}'s folds, those of 1-3 are missing); check --spectrograms_dir"
    assert refused(capsys, *flags, str(above)).endswith(
        f"error: {above}: has no folder fold1 {missing}; {own_tree.spectrograms_dir} has it\n"
    )
    shutil.rmtree(own_tree.spectrograms_dir / "fold3")
    line = refused(capsys, *flags, str(own_tree.spectrograms_dir))
    assert "has no folder fold3 " in line
    assert "those of 3 are missing" in line
    shutil.rmtree(own_tree.spectrograms_dir / "fold2")
    (first,) = [file.name for file in one_fold.iterdir()][:1]
    assert f"{one_fold / first}: is no folder; check --spectrograms_dir" in refused(
        capsys, *flags, str(one_fold / first)
    )
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("loader", ["files", "dali"])
def test_a_missing_image(loader: str, own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    own_tree.path(4).unlink()
    first = next(row for row in range(len(own_tree.rows)) if own_tree.path(row) == own_tree.path(4))
    line = refused(capsys, *training_flags(own_tree), "--loader", loader)
    assert str(own_tree.path(4)) in line
    named = {f"row {row + 1}:" for row in range(first, len(own_tree.rows)) if own_tree.path(row) == own_tree.path(4)}
    assert any(row in line for row in named)


@pytest.mark.parametrize("loader", ["files", "dali"])
def test_a_damaged_image(loader: str, own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Found in training (files) or in packing (dali); the message names the file."""
    path = own_tree.path(5)
    path.write_bytes(path.read_bytes()[:-40])
    line = refused(capsys, *training_flags(own_tree), "--loader", loader)
    assert str(path) in line
    assert "truncated or damaged" in line


def rewrite(tree: PngTree, rows: list[dict[str, str]]) -> PngTree:
    """``tree`` with ``rows`` in its CSV."""
    write_csv(tree.csv_file, rows)
    return PngTree(tree.csv_file, tree.spectrograms_dir, rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fold": "0"}, "row 3: column 'fold' is '0', not a "),
        ({"fold": "two"}, "row 3: column 'fold' is 'two', not a "),
        ({"class": "nan"}, "row 3: column 'class' is 'nan', a missing value"),
        ({"spec_file_name": "../x.png"}, "row 3: the image '../x.png' is absolute or climbs out"),
    ],
)
def test_a_bad_row(
    change: dict[str, str], expected: str, own_tree: PngTree, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | change if i == 2 else row for i, row in enumerate(own_tree.rows)]
    assert f"{own_tree.csv_file}: {expected}" in refused(capsys, *training_flags(rewrite(own_tree, rows)))


def test_a_csv_that_is_none(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    own_tree.csv_file.write_text("")
    assert "the CSV is empty" in refused(capsys, *training_flags(own_tree))
    own_tree.csv_file.write_text("name,fold,class\na,1,b\n")
    assert "no column 'spec_file_name'; it has: name, fold, class; name yours with --file_column" in refused(
        capsys, *training_flags(own_tree)
    )


def test_more_folds_than_the_protocol_has(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"fold": "5"} if i == 0 else row for i, row in enumerate(own_tree.rows)]
    moved = rewrite(own_tree, rows)
    moved.path(0).parent.mkdir()
    grid_image("dog_bark", seed=0).save(moved.path(0))
    assert "has a fold 5, but the protocol has 3; give --num_folds 5 or mend the CSV" in refused(
        capsys, *training_flags(moved)
    )


def test_fewer_folds_than_ten(tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Only folds with an empty part are refused: of folds 1 to 3, fold 1 (validation fold 10) and all from 4 on."""
    flags = [*training_flags(tree), "--num_folds", "10"]
    assert "--fold 1: its validation fold(s) 10 have no rows (folds with rows: 1, 2, 3)" in refused(
        capsys, *flags, "--fold", "1"
    )
    assert "--fold 4: its test fold(s) 4 have no rows" in refused(capsys, *flags, "--fold", "4")
    assert "--fold 1: its validation fold(s) 10 have no rows" in refused(
        capsys, *flags
    )  # all of them, so before the first
    assert not Path("results").exists()
    assert main([*flags, "--fold", "2"]) == 0
    assert main([*flags, "--fold", "3"]) == 0
    assert sorted(path.name for path in Path("results/mobilenet").glob("[!.]*")) == [
        *("fold_2", "fold_3", "original_summary.json", "run_status.json", "summary.json")
    ]


def test_no_rows_to_train_on(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in own_tree.rows if row["fold"] != "3"]
    assert "--fold 2: its training fold(s) (3,) have no rows (folds with rows: 1, 2)" in refused(
        capsys, *training_flags(rewrite(own_tree, rows)), "--fold", "2"
    )


def test_a_class_without_training_rows(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row for row in own_tree.rows if (row["class"], row["fold"]) != ("drilling", "3")]
    line = refused(capsys, *training_flags(rewrite(own_tree, rows)), "--fold", "2")
    assert line.strip().endswith(
        "--fold 2: no training rows for class drilling (rows in fold(s): 1, 2) in its training fold(s) 3; train the "
        "folds that have all classes (--fold 1, --fold 3), add rows, or take the class out of the CSV"
    )
    line = refused(capsys, *training_flags(rewrite(own_tree, rows)))  # all folds: before the first is trained
    assert "--fold 2: no training rows for class drilling" in line


def test_an_output_folder_that_cannot_be_written(tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("in the way")
    for output_dir in ("file", "file/below"):
        line = refused(capsys, *training_flags(tree), "--output_dir", output_dir)
        assert f"cannot write {output_dir}: " in line
        assert "choose a folder that can be written" in line
    assert Path("file").read_text() == "in the way"


def test_shards_that_do_not_fit(
    tree: PngTree, png_shards: Path, rgb_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK.split(), "--fold", "1", "--shards"]
    line = refused(capsys, *flags, str(png_shards), "--csv_file", str(tree.csv_file))
    assert f"{png_shards}: packed from another CSV" in line
    assert str(tree.csv_file) in line
    assert "--image_size 8: " in refused(capsys, *flags, str(rgb_shards))
    assert "already resized to 32; use --image_size 32" in refused(capsys, *flags, str(rgb_shards))
    assert "--loader dali: " in refused(capsys, *flags, str(rgb_shards), "--loader", "dali")
    assert "manifest.json: no such file; make shards with quaclrs-pack" in refused(capsys, *flags, "nowhere")

    changed = tmp_path / "changed"
    shutil.copytree(png_shards, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    for change, expected in (
        ({"version": 99}, "format version 99, this quaclrs reads version "),
        ({"encoding": "webp"}, "unknown encoding 'webp' (known: "),
    ):
        (changed / "manifest.json").write_text(json.dumps(manifest | change))
        assert f"{changed}/manifest.json: {expected}" in refused(capsys, *flags, str(changed))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--fold 11", "--fold 11: there are folds 1 to 10"),
        ("--batch-size x", "invalid int value"),
        pytest.param("--device cpu", f"{CSV_NAME}: cannot read the CSV", marks=pytest.mark.exhaustive),  # loads torch
    ],
)
def test_errors_of_the_real_command(flags: str, expected: str) -> None:
    """What a user gets: a process with an exit code, and one line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "quaclrs.cli", *flags.split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("quaclrs-train: error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


# --- the usual way: nothing but the CSV and the folder ---


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of the files below ``folder``."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_packs_once_beside_the_csv(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run with another fold and other settings reuses the shards; another CSV gets its own."""
    flags = [*data_flags(own_tree), *QUICK.split(), "--num_folds", "3"]
    assert main([*flags, "--fold", "1"]) == 0
    (cache,) = (own_tree.csv_file.parent / "quaclrs_shards").iterdir()
    packed = contents(cache)
    assert {"manifest.json", "metadata.csv", "samples.npy", "fold01/fold01-000000.tar"} <= set(packed)
    assert f"shards: {cache}" in capsys.readouterr().out
    assert main([*flags, "--fold", "2", "--learning_rate", "0.01"]) == 0
    assert contents(cache) == packed
    assert list((own_tree.csv_file.parent / "quaclrs_shards").iterdir()) == [cache]
    metrics = json.loads(Path("results/mobilenet/fold_2/metrics.json").read_text())
    assert metrics["loader"] == "dali"
    assert metrics["data"]["encoding"] == "png"

    assert main([*flags, "--loader", "files", "--shards", str(cache), "--fold", "1", "--output_dir", "other"]) == 0
    metrics = json.loads(Path("other/mobilenet/fold_1/metrics.json").read_text())
    assert (metrics["loader"], metrics["data"]["num_samples"]) == ("files", len(own_tree.rows))

    rewrite(own_tree, own_tree.rows[:-1])
    assert main([*flags, "--fold", "1", "--output_dir", "third"]) == 0
    assert len(list((own_tree.csv_file.parent / "quaclrs_shards").iterdir())) == 2
    assert contents(cache) == packed


@pytest.mark.parametrize(
    "as_a_process", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["called", "process"]
)
def test_in_a_folder_that_holds_the_data(
    as_a_process: bool, own_tree: PngTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like the original trainer, without any path."""
    root, flags = own_tree.csv_file.parent, [*QUICK.split(), "--fold", "2"]
    monkeypatch.chdir(root)
    if as_a_process:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "quaclrs.cli", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=one_thread)
        out, err = done.stdout, done.stderr
    else:
        assert main(flags) == 0
        out, err = capsys.readouterr()
    assert err == ""
    summary = json.loads((root / "results/mobilenet/summary.json").read_text())
    *_, last = out.splitlines()
    assert f"mobilenet: test accuracy {summary['mean_test_accuracy']:.2%} over 1 fold(s)" in last
    assert last.endswith("results in results/mobilenet (start with summary.json and fold_*/plots)")
    assert "epoch 1/1: train loss" in out  # plain lines where there is no terminal
    assert "\r" not in out


def test_training_tells_what_packing_found(own_tree: PngTree, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that share an image, and a recording in two folds, which leaks training data into the test, are reported."""
    rows = [dict(row) for row in own_tree.rows]
    rows[0]["fsID"] = next(row["fsID"] for row in rows if row["fold"] != rows[0]["fold"])
    write_csv(own_tree.csv_file, [*rows, rows[1]])
    assert main([*data_flags(own_tree), *QUICK.split(), "--num_folds", "3", "--fold", "1", "--loader", "files"]) == 0
    told = capsys.readouterr().out
    assert "rows share their image with another row" in told
    assert (
        f"recording(s) (fsID) lie in more than one fold, which leaks training data into the test: {rows[0]['fsID']}"
        in told
    )


@pytest.mark.parametrize("flag", ["--csv_file", "--spectrograms_dir", "--shards"])
def test_the_demo_brings_its_own_data(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{flag} mine: --demo brings its own data" in refused(capsys, "--demo", flag, "mine")
