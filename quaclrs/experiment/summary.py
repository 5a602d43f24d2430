"""``summary.json`` of a model: over all folds with results in its folder, including those of other processes."""

from __future__ import annotations

from quaclrs.experiment.original_outputs import ORIGINAL_SUMMARY_FILE, original_summary
from quaclrs.experiment.results import (
    METRICS_FILE,
    SUMMARY_FILE,
    FoldResult,
    Summary,
    parse_fold_result,
    read_document,
)
from quaclrs.experiment.run import Run
from quaclrs.settings import identity_defaults
from quaclrs.system.atomic_files import write_json
from quaclrs.system.file_locks import folder_lock


def write_summary(run: Run, result: FoldResult) -> Summary:
    """Write ``summary.json`` and ``original_summary.json`` after a fold ended with ``result``."""
    with folder_lock(run.folder):  # several processes may finish a fold at the same time
        results = _results(run, result)
        summary = Summary(
            model_name=run.config.model_name,
            folds=tuple(fold.figures for fold in results),
            provenance=run.provenance(),
        )
        write_json(run.folder / SUMMARY_FILE, summary.to_json())
        write_json(run.folder / ORIGINAL_SUMMARY_FILE, original_summary(results, run.folder))
    return summary


def _results(run: Run, result: FoldResult) -> list[FoldResult]:
    """``result`` and those of the other folds, by fold; folds that were trained with other settings are left out."""
    results = []
    for fold in range(1, run.config.num_folds + 1):
        path = run.fold_folder(fold) / METRICS_FILE
        if fold == result.fold:
            results.append(result)
        elif path.is_file():
            document = read_document(path)
            if {**identity_defaults(run.config), **document.get("run", {})} == run.identity(fold):
                results.append(parse_fold_result(document, path))
    return results
