"""What a reader of the report should look at first, in plain words, each with a link to tokens that show it."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .figures import on_loss_tokens


Row = Mapping[str, Any]

# Tokens of a phrase, and how often it has to stand in a completion
_PHRASE = 5
_REPEATS = 3
# Tokens of a phrase that is shown
_LONGEST = 40
# Characters of a text that a sentence shows
_SHOWN = 100
# Share of the late completions that has to repeat it
_COMMON = 0.2
# A change that is worth a word
_RISE = 1.25
# A token's KL stands out from 8 standard deviations on
_OUTLYING = 8.0


class Finding(NamedTuple):
    """
    A sentence about the run.

    Args:
        kind (`str`):
            `"gaming"`, `"signal"` or `"note"`, in the order of urgency.
        title (`str`):
            A few words.
        text (`str`):
            What was seen, with its numbers.
        link (`str`):
            The place in the report that shows it; empty if there is none.
    """

    kind: str
    title: str
    text: str
    link: str = ""


def link_to(row: Row, token: int | None = None) -> str:
    """The report's address of a completion, or of one of its tokens."""
    address = f"#/{row['mode']}/{row['step']}/{row['group']}/{row['completion']}"
    return address if token is None else f"{address}/{token}"


def find_all(rows: Sequence[Row], figures: Mapping[int, Mapping[str, float]]) -> list[Finding]:
    """
    All findings, the most urgent first.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Every recorded completion of training, by step.
        figures (`Mapping[int, Mapping[str, float]]`):
            What was logged, by step and name; see `credit/figures.py`.
    """
    if not rows:
        return []
    finders: list[Callable[[Sequence[Row]], list[Finding]]] = [
        repeated_phrases,
        without_spread,
        disagreements,
        unjudged,
        truncated,
        kl_outliers,
        unexplained,
    ]
    found = trends(rows, figures)
    for finder in finders:
        found += finder(rows)
    order = ("gaming", "signal", "note")
    return sorted(found, key=lambda finding: order.index(finding.kind))


def shorten(text: str) -> str:
    """What a sentence shows of a text."""
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# Signs of gaming


def early_and_late(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The first and the last third, of at least one each."""
    third = max(1, len(values) // 3)
    return list(values[:third]), list(values[-third:])


def trend(figures: Mapping[int, Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """Mean of a figure in the first and in the last third of the steps that have it; `None` for fewer than 3 steps."""
    values = [figures[step][name] for step in sorted(figures) if name in figures[step]]
    if len(values) < 3:
        return None
    early, late = early_and_late(values)
    return statistics.fmean(early), statistics.fmean(late)


def trends(rows: Sequence[Row], figures: Mapping[int, Mapping[str, float]]) -> list[Finding]:
    """Steps that become more or shorter while outcomes do not rise, and process rewards that part from outcomes."""
    sources = rows[0]["sources"]
    is_process = {s["name"]: any(row["sources"][k]["is_steps"] for row in rows) for k, s in enumerate(sources)}
    outcomes = [name for name, process in is_process.items() if not process]
    last = link_to(rows[-1])
    found = []
    outcome_trends = [trend(figures, f"rewards/{name}/mean") for name in outcomes]
    rises = any(pair is not None and pair[1] > pair[0] + 0.02 * max(1.0, abs(pair[0])) for pair in outcome_trends)
    beside = f" {' and '.join(outcomes)} did not rise." if outcomes else " No outcome source says whether that helps."
    for name in [name for name, process in is_process.items() if process]:
        steps = trend(figures, f"rewards/{name}/steps")
        if steps is not None and steps[1] >= _RISE * steps[0] and not rises:
            text = f"{name}: {steps[0]:.1f} steps per completion early, {steps[1]:.1f} late.{beside}"
            found.append(Finding("gaming", "More steps, no better outcomes", text, last))
        length = trend(figures, f"rewards/{name}/tokens_per_step")
        if length is not None and length[1] * _RISE <= length[0]:
            text = f"{name}: {length[0]:.1f} tokens per step early, {length[1]:.1f} late."
            found.append(Finding("gaming", "Steps become shorter", text, last))
        for outcome in outcomes:
            corr = trend(figures, f"rewards/{name}/corr/{outcome}")
            if corr is not None and corr[0] > 0.2 and corr[1] < corr[0] / 2:
                text = f"The correlation of {name} with {outcome} fell from {corr[0]:.2f} to {corr[1]:.2f}."
                found.append(Finding("gaming", "Process rewards part from outcomes", text, last))
    return found


def phrase_counts(ids: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """Where each phrase of a completion stands, without overlaps, for those that stand there often."""
    places: dict[tuple[int, ...], list[int]] = {}
    for start in range(len(ids) - _PHRASE + 1):
        of_phrase = places.setdefault(tuple(ids[start : start + _PHRASE]), [])
        if not of_phrase or start >= of_phrase[-1] + _PHRASE:
            of_phrase.append(start)
    return {phrase: starts for phrase, starts in places.items() if len(starts) >= _REPEATS}


def period(ids: Sequence[int], starts: Sequence[int]) -> int:
    """Tokens of the whole phrase, if it stands again right where it ends; else of the part that was counted."""
    first, second, third = starts[:3]
    is_periodic = list(ids[first:second]) == list(ids[second:third]) and second - first <= _LONGEST
    return second - first if is_periodic else _PHRASE


def repeated_phrases(rows: Sequence[Row]) -> list[Finding]:
    """The phrase that most late completions repeat, if early ones did so less than half as often."""
    steps = sorted({row["step"] for row in rows})
    early, late = (set(part) for part in early_and_late(steps))
    repeated_early: Counter[tuple[int, ...]] = Counter()
    repeated_late: Counter[tuple[int, ...]] = Counter()
    # The completion that repeats a phrase most is the one to look at
    shown: dict[tuple[int, ...], tuple[Row, list[int]]] = {}
    for row in rows:
        phrases = phrase_counts(row["token_ids"])
        if row["step"] in late:
            repeated_late.update(phrases.keys())
            for phrase, starts in phrases.items():
                if phrase not in shown or len(starts) > len(shown[phrase][1]):
                    shown[phrase] = (row, starts)
        elif row["step"] in early:
            repeated_early.update(phrases.keys())
    if not repeated_late:
        return []
    phrase, count = max(repeated_late.items(), key=lambda item: (item[1], len(shown[item[0]][1])))
    late_rows = sum(row["step"] in late for row in rows)
    early_rows = max(1, sum(row["step"] in early for row in rows))
    share = count / late_rows
    share_early = repeated_early[phrase] / early_rows if early != late else 0.0
    if share < _COMMON or share < 2 * share_early:
        return []
    row, starts = shown[phrase]
    token = starts[0]
    words = shorten("".join(row["tokens"][token : token + period(row["token_ids"], starts)]))
    text = (
        f"{words!r} stands {_REPEATS} times or more in {share:.0%} of the late completions ({share_early:.0%} of the "
        f"early ones); {len(starts)} times in the one that is linked."
    )
    return [Finding("gaming", "A phrase is repeated", text, link_to(row, token))]


# ---------------------------------------------------------------------------------------------------------------------
# Where there is little to learn from


def groups_of(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    """Completions by step and group."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["group"]), []).append(row)
    return groups


def without_spread(rows: Sequence[Row]) -> list[Finding]:
    """Groups whose advantages are all 0."""
    groups = list(groups_of(rows).values())
    flat = [group for group in groups if not any(any(row["advantages"]) for row in group)]
    if not flat:
        return []
    text = (
        f"{len(flat)} of {len(groups)} recorded groups have advantage 0 on every token: nothing is learnt from them."
    )
    return [Finding("signal", "Groups without spread", text, link_to(flat[-1][0]))]


def unjudged(rows: Sequence[Row]) -> list[Finding]:
    """Completions that no source, or that one source, does not judge, and steps without a score."""
    found = []
    for k, source in enumerate(rows[0]["sources"]):
        name = source["name"]
        missing = [row for row in rows if not any(v is not None for v in row["sources"][k]["returned"])]
        if missing:
            text = f"{name} does not judge {len(missing)} of {len(rows)} completions."
            found.append(Finding("signal", "Unjudged completions", text, link_to(missing[-1])))
        unscored = [row for row in rows if row not in missing and None in row["sources"][k]["returned"]]
        if unscored:
            token = unscored[-1]["sources"][k]["ends"][unscored[-1]["sources"][k]["returned"].index(None)]
            text = f"{name} leaves steps of {len(unscored)} of {len(rows)} completions without a score."
            found.append(Finding("note", "Unscored steps", text, link_to(unscored[-1], token)))
        withheld = [row for row in rows if row not in missing and row["sources"][k]["withheld"]]
        if withheld:
            text = f"Its gate withholds what {name} gives to {len(withheld)} of {len(rows)} completions."
            found.append(Finding("note", "Withheld rewards", text, link_to(withheld[-1])))
    return found


def truncated(rows: Sequence[Row]) -> list[Finding]:
    """Completions that reached the largest length."""
    cut = [row for row in rows if row["truncated"]]
    if not cut:
        return []
    text = f"{len(cut)} of {len(rows)} completions end at the largest length."
    return [Finding("signal", "Truncated completions", text, link_to(cut[-1], len(cut[-1]["token_ids"]) - 1))]


def disagreements(rows: Sequence[Row]) -> list[Finding]:
    """The completion that one source ranks first in its group and another last, by the widest margin."""
    names = [source["name"] for source in rows[0]["sources"]]
    widest: tuple[float, Row, Sequence[Row], int, int] | None = None
    for group in groups_of(rows).values():
        scores = [standard_scores([total(row["sources"][k]) for row in group]) for k in range(len(names))]
        for a in range(len(names)):
            for b in range(len(names)):
                for row, high, low in zip(group, scores[a], scores[b], strict=True):
                    margin = min(high, -low)
                    if margin > 0.5 and (widest is None or margin > widest[0]):
                        widest = (margin, row, group, a, b)
    if widest is None:
        return []
    _, row, group, a, b = widest

    def beside_its_group(k: int) -> str:
        given = [total(other["sources"][k]) for other in group]
        mean = statistics.fmean(value for value in given if value is not None)
        return f"{names[k]} gives {total(row['sources'][k]):.3g} (mean of the group: {mean:.3g})"

    text = f"At step {row['step']}, {beside_its_group(a)} where {beside_its_group(b)}."
    return [Finding("signal", "Sources disagree", text, link_to(row))]


def total(source: Mapping[str, Any]) -> float | None:
    """Sum of what a source gives to a completion, before its gate; `None` if it does not judge it."""
    values = [value for value in source["transformed"] if value is not None]
    return sum(values) if values else None


def standard_scores(values: Sequence[float | None]) -> list[float]:
    """In standard deviations from the mean; 0 without spread or without a value."""
    given = [value for value in values if value is not None]
    spread = statistics.stdev(given) if len(given) > 1 else 0.0
    if spread <= 1e-9:
        return [0.0] * len(values)
    mean = statistics.fmean(given)
    return [0.0 if value is None else (value - mean) / spread for value in values]


def kl_outliers(rows: Sequence[Row]) -> list[Finding]:
    """The token with the largest KL, if it stands far out."""
    tokens = [(value, row, token) for row in rows for token, value in on_loss_tokens(row, "kl")]
    if len(tokens) < 2:
        return []
    values = [value for value, _, _ in tokens]
    mean = statistics.fmean(values)
    spread = statistics.pstdev(values)
    value, row, token = max(tokens, key=lambda entry: entry[0])
    if spread <= 1e-9 or value < mean + _OUTLYING * spread:
        return []
    outliers = sum(other >= mean + _OUTLYING * spread for other in values)
    text = (
        f"{outliers} of {len(values)} tokens have a KL of {_OUTLYING:g} standard deviations above the mean "
        f"({mean:.2g} nats). The largest, {shorten(row['tokens'][token])!r}, has {value:.2f} nats."
    )
    return [Finding("signal", "KL outliers", text, link_to(row, token))]


def unexplained(rows: Sequence[Row]) -> list[Finding]:
    """Completions whose advantages the report cannot take apart."""
    opaque = [row for row in rows if not row["explained"]]
    if not opaque:
        return []
    text = (
        f"Of {len(opaque)} of {len(rows)} completions the sum that made the advantage is not known: the estimator, or "
        "compute_advantages of a subclass, is your own."
    )
    return [Finding("note", "Advantages of your own", text, link_to(opaque[-1]))]
