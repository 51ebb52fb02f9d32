"""From a run's folder to the report's HTML: curves, findings, groups, and the template that holds them."""

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .embed import Vocabulary, pack_group
from .figures import curve_order, figures_of_rows, figures_of_state, find_state, on_loss_tokens
from .findings import find_all, groups_of, total
from .read import read_credit


PAGE = Path(__file__).parent / "page"
PAGE_NAME = "credit.html"


def write_page(run_folder: Path, output: Path) -> dict[str, str]:
    """
    Write the report of a run to a file, which is there whole or not at all.

    Args:
        run_folder (`Path`):
            The run's `output_dir`.
        output (`Path`):
            The file, usually `PAGE_NAME` in that folder.

    Returns:
        The reason for each file of the log that was passed over.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as [`page_of_run`].
        OSError: the file cannot be written.
    """
    page, passed_over = page_of_run(run_folder)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, output)
    return passed_over


def page_of_run(run_folder: Path) -> tuple[str, dict[str, str]]:
    """
    The report of a run.

    Args:
        run_folder (`Path`):
            The run's `output_dir`.

    Returns:
        The HTML, and the reason for each file of the log that was passed over.

    Raises:
        FileNotFoundError: no step was recorded.
        ModuleNotFoundError: jinja2 is not installed.
    """
    log = read_credit(run_folder)
    if not log.steps:
        raise FileNotFoundError(f"{run_folder} has no recorded step that can be read. {log.passed_over or ''}")
    steps: list[dict[str, Any]] = []
    groups: list[str] = []
    vocabulary = Vocabulary()
    rows: list[dict[str, Any]] = []
    recorded: dict[int, dict[str, float]] = {}
    for step in log.steps:
        step_rows = step.rows()
        figures = figures_of_rows(step_rows)
        described = []
        for (_, number), group in groups_of(step_rows).items():
            described.append(describe_group(number, group, len(groups)))
            groups.append(pack_group(group, step.settings, vocabulary))
        steps.append({"mode": step.mode, "step": step.step, "groups": described, "settings": step.settings})
        if step.mode == "train":
            recorded[step.step] = figures
            rows += [without_sums(row) for row in step_rows]
    state = find_state(run_folder)
    figures = recorded if state is None else figures_of_state(state)
    index = {
        "sources": [source["name"] for source in (rows or log.steps[0].rows())[0]["sources"]],
        "vocabulary": vocabulary.tokens,
        "steps": steps,
        "curves": curves(figures),
        "findings": [finding._asdict() for finding in find_all(rows, figures or recorded)],
    }
    return render(run_folder.resolve().name, index, groups, note_of(state, log.passed_over)), log.passed_over


def without_sums(row: Mapping[str, Any]) -> dict[str, Any]:
    """What findings are made from: a run's rows as they are may not fit into memory."""
    heavy = ("trainer_logprobs", "old_logprobs", "ref_logprobs", "inference_logprobs", "entropy")
    of_source = ("name", "is_steps", "ends", "returned", "transformed", "withheld")
    kept = {name: value for name, value in row.items() if name not in heavy}
    return {**kept, "sources": [{name: source[name] for name in of_source} for source in row["sources"]]}


def describe_group(number: int, rows: Sequence[Mapping[str, Any]], blob: int) -> dict[str, Any]:
    """What a step's list of groups shows of one."""
    advantages = [value for row in rows for _, value in on_loss_tokens(row, "advantages")]
    totals_K = [[total(row["sources"][k]) for row in rows] for k in range(len(rows[0]["sources"]))]
    given_K = [[value for value in totals if value is not None] for totals in totals_K]
    return {
        "group": number,
        "blob": blob,
        "prompt": rows[0]["prompt"],
        "completions": len(rows),
        "tokens": sum(len(row["token_ids"]) for row in rows),
        "rewards": [statistics.fmean(given) if given else None for given in given_K],
        "flat": not any(advantages),
        "strongest": max(map(abs, advantages), default=0.0),
    }


def curves(figures: Mapping[int, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Each curve with its points, in the order of the page."""
    names = sorted({name for of_step in figures.values() for name in of_step}, key=curve_order)
    return [
        {"name": name, "points": [[step, figures[step][name]] for step in sorted(figures) if name in figures[step]]}
        for name in names
    ]


def note_of(state: Path | None, passed_over: Mapping[str, str]) -> str:
    """Where the curves come from, and what is not in the report."""
    if state is None:
        origin = "Curves are means over the recorded completions: the run has saved no trainer_state.json."
    else:
        origin = f"Curves are the trainer's log, from {state.parent.name}/{state.name}; groups are those recorded."
    return origin + (f" Files passed over: {', '.join(passed_over)}." if passed_over else "")


def render(run: str, index: Mapping[str, Any], groups: Sequence[str], note: str) -> str:
    """
    The page, with everything in it.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('The report needs jinja2: pip install "trl_grpo_ext[report]".') from error
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string((PAGE / "page.html").read_text(encoding="utf-8"))
    # The package's own: the template takes them as they are
    style = (PAGE / "page.css").read_text(encoding="utf-8")
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    return template.render(run=run, index=index, groups=groups, note=note, style=style, script=script)
