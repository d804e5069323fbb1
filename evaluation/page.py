"""The report of diagnose.py as one HTML page that asks nothing of a network, and as a table for a terminal.

Knows the report, records and their pictures; no model, and not how a figure came about.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..processing_multicoco import open_image
from ..records import DatasetImage
from .experiments import KINDS, name_of
from .measurements import COLLAPSED_COSINE, COLLAPSED_SHARE
from .verdicts import ALPHA, NOT_SHOWN, USED


STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#d6dbe0;--page:#fafbfc;--card:#fff;--mark:#1f6feb;
--good:#1a7f37;--warn:#9a6700}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#98a3ae;--line:#353c44;--page:#15181c;--card:#1d2126;
--mark:#6cb0ff;--good:#57c26f;--warn:#e0b341}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1rem}h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.15rem;margin:0 0 .5rem}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;margin:1rem 0}
p,ul{margin:.4rem 0;max-width:46rem}.soft{color:var(--soft);font-size:.9rem}.verdict{font-size:1.25rem;font-weight:600}
.used{color:var(--good)}.unshown,.warning{color:var(--warn)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:9rem}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
td.heat{background:color-mix(in srgb,var(--mark) calc(var(--v)*70%),transparent);text-align:center}
td.text,th.text{text-align:left}svg{display:block;max-width:100%}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.axis{stroke:var(--line);stroke-width:1.5}.mark{stroke:var(--mark);fill:var(--mark)}.line{stroke:var(--mark);fill:none;stroke-width:2}
.other{stroke:var(--soft);stroke-dasharray:4 3}.two{display:grid;gap:0 2rem}
.two>*{min-width:0}.chart{width:100%;max-width:36rem}
@media (min-width:64rem){.two{grid-template-columns:2fr 3fr}}
.pictures{display:flex;flex-wrap:wrap;gap:.5rem}figure{margin:0}figcaption{font-size:.8rem;color:var(--soft)}
figure img{width:7rem;height:auto;display:block;image-rendering:pixelated}
code,.said{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.15rem .8rem;margin:.3rem 0}dt{color:var(--soft)}
dd{margin:0;min-width:0}
"""


def text(value: Any) -> str:
    """Any text that did not stand in this file, safe inside HTML and its attributes."""
    return html.escape(str(value), quote=True)


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def points(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in points of a percent."""
    if found is None:
        return "-"
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def p_value(found: Mapping[str, Any] | None) -> str:
    """McNemar's p of a difference, if it has one."""
    return "-" if found is None or found["mcnemar_p"] is None else f"{found['mcnemar_p']:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself on a narrow screen. Cells are HTML; a cell that begins with `<td` is whole."""
    lines = ["<div class=scroll><table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def heat(value: float | None) -> str:
    """A table cell that is the darker, the larger the share."""
    return "<td>-</td>" if value is None else f'<td class=heat style="--v:{value:.3f}">{percent(value)}</td>'


def span(found: Mapping[str, Any] | None) -> str:
    """The interval of a difference, drawn from -100 to +100 points with a line at 0."""
    if found is None:
        return ""
    low, middle, high = (100 + 100 * found[name] for name in ("low", "difference", "high"))
    return (
        '<svg viewBox="0 0 200 14" width="160" height="11" role="img" aria-label="interval">'
        '<path class=axis d="M0 7H200M100 0V14"/>'
        f'<path class=line d="M{low:.1f} 7H{high:.1f}"/><circle class=mark cx="{middle:.1f}" cy="7" r="4"/></svg>'
    )


def difference_cells(found: Mapping[str, Any] | None, *, drawn: bool = False) -> list[str]:
    """Cells of a difference: its points, its interval as a drawing if wanted, its p."""
    return [points(found), *([span(found)] if drawn else []), p_value(found)]


def line_chart(
    places: Sequence[tuple[float, Mapping[str, Any]]], across: str, other: float | None, mark: float
) -> str:
    """Rates with intervals against a number; a dashed line at `other`, a dotted one at the number `mark`."""
    width, height, left, top, bottom = 360, 210, 38, 8, 36
    first, last = places[0][0], max(places[-1][0], places[0][0] + 1)
    at = lambda x: left + 10 + (x - first) / (last - first) * (width - left - 24)  # noqa: E731
    up = lambda y: top + (1 - y) * (height - top - bottom)  # noqa: E731
    parts = [f'<svg class=chart viewBox="0 0 {width} {height}" role="img" aria-label="accuracy against {across}">']
    for y in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path class=axis d="M{left} {up(y):.1f}H{width}"/>')
        parts.append(f'<text x="{left - 5}" y="{up(y) + 4:.1f}" text-anchor="end">{100 * y:.0f}</text>')
    parts.append(f'<path class=axis stroke-dasharray="2 3" d="M{at(mark):.1f} {top}V{up(0):.1f}"/>')
    if other is not None:
        parts.append(f'<path class=other d="M{left} {up(other):.1f}H{width}"/>')
    known = [(x, found) for x, found in places if found["rate"] is not None]
    line = " ".join(f"{at(x):.1f},{up(found['rate']):.1f}" for x, found in known)
    parts.append(f'<polyline class=line points="{line}"/>')
    for x, found in known:
        parts.append(f'<path class=line d="M{at(x):.1f} {up(found["low"]):.1f}V{up(found["high"]):.1f}"/>')
        parts.append(f'<circle class=mark cx="{at(x):.1f}" cy="{up(found["rate"]):.1f}" r="3.5"/>')
    for x, _ in places:
        parts.append(f'<text x="{at(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{(left + width) / 2:.1f}" y="{height - 4}" text-anchor="middle">{across}</text></svg>')
    return "".join(parts)


def section(title: str, *parts: str) -> str:
    """A part of the page; empty pieces are left out."""
    return f"<section><h2>{title}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def loss_table(experiments: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A table with a row for each experiment that was made: accuracy, flips, loss against the intact run."""
    head = ("", "accuracy", "answers flipped", "intact minus this, points [95 %]", "", "McNemar's p", "samples")
    rows = []
    for name, label in names.items():
        if name in experiments:
            accuracy, flips, loss = (experiments[name][kind] for kind in ("accuracy", "flips", "loss"))
            cells = [label, percent(accuracy["rate"]), percent(flips["rate"]), *difference_cells(loss, drawn=True)]
            rows.append([*cells, str(accuracy["samples"])])
    return table(head, rows)


def draw_attention(
    records: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """
    For each sample with a picture its question, and the picture as data URIs: plain, then under each query's
    attention.

    Args:
        samples (`list[dict]`): Attention of the first records, from [`measure_attention`].
    """
    drawn = []
    for row, (record, sample) in enumerate(zip(records, samples, strict=False)):
        if not sample["picture"]:
            continue
        image = _small(record, row)
        weights = np.array(sample["picture"])  # (queries, P)
        weights /= weights.max()
        side = math.isqrt(weights.shape[1])
        pictures = [_data_uri(image)]
        for query in weights:
            mask = Image.fromarray((255 * query.reshape(side, side)).astype(np.uint8))
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            dark = Image.eval(image, lambda value: value // 5)
            pictures.append(_data_uri(Image.composite(image, dark, mask)))
        drawn.append((record["question"], pictures))
    return drawn


def draw_pictures(records: Sequence[Mapping[str, Any]], count: int) -> list[str | None]:
    """The first picture of each of the first records as a data URI; `None` of one without."""
    first = records[: min(count, len(records))]
    return [_data_uri(_small(record, row)) if record["images"] else None for row, record in enumerate(first)]


def _small(record: Mapping[str, Any], row: int) -> Image.Image:
    """The first picture of a record, 112 pixels wide."""
    image = record["images"][0]
    image = open_image(image.open() if isinstance(image, DatasetImage) else image, row, 0)
    return image.resize((112, max(1, round(112 * image.height / image.width))), Image.Resampling.NEAREST)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


FOLLOWING = {
    "own_picture": "the own picture",
    "same_answer": "the own picture, beside a donor of the own answer",
    "donors_picture": "the donor's picture",
}
WITHOUT_DONOR = {
    "own_picture": "a decoy's",
    "same_answer": "donor's, with the thoughts of one that had the own answer",
    "donors_picture": "donor's, with a decoy's thoughts",
}


def verdict_section(report: Mapping[str, Any]) -> str:
    """What the tests say, in words."""
    found = report.get("thoughts")
    parts = []
    if found is None:
        trained = report["model"]["trained_thoughts"]
        words = f"It was asked without the {trained} thoughts of its training" if trained else "It has no thoughts"
        parts.append(f"<p class=verdict>{words}.</p>")
    else:
        kind = "used" if found["verdict"] == USED else "unshown"
        parts.append(f"<p class='verdict {kind}'>The thoughts are {found['verdict']}.</p>")
        harm = ", or ".join(text(KINDS[kind]) for kind in found["harmful"])
        harm = f"accuracy falls when all thoughts are replaced by {harm}" if harm else "no replacement costs accuracy"
        follows = "".join(
            f"<li>under {FOLLOWING[name]}: <b>{percent(row['donor']['rate'])}</b> of {row['donor']['samples']} cases; "
            f"beside it, {WITHOUT_DONOR[name]}: {percent(row['decoy']['rate'])}</li>"
            for name, row in found["following"].items()
        )
        parts.append(
            f"<p>Damage: {harm}.</p><p>Content: with the thoughts of a donor, a sample that had another answer, the "
            f"answer is the donor's</p><ul>{follows}</ul>"
        )
        if found["used_indices"]:
            names = ", ".join(str(index + 1) for index in found["used_indices"])
            parts.append(f"<p>Shown to be used by itself: thought {names} of {report['model']['num_thoughts']}.</p>")
        for warning in report["geometry"]["warnings"]:
            parts.append(f"<p class=warning>Collapse: {text(warning)} (section Geometry).</p>")
    if picture := report.get("picture"):
        parts.append(f"<p>The picture is <b>{picture['verdict']}</b>.</p>")
        if "through_verdict" in picture:
            parts.append(f"<p>What the thoughts took from the picture is <b>{picture['through_verdict']}</b>.</p>")
    if control := report.get("control"):
        parts.append(
            f"<p>Against the control <code>{text(control['name'])}</code> ({text(control['mode'])}): accuracy "
            f"{points(control['accuracy_above_control'])} points.</p>"
        )
    if report["verdict_tests"]["number"]:
        parts.append(rule(report["verdict_tests"]["number"]))
    return section("Verdict", *parts)


def rule(num_tests: int) -> str:
    """How the verdicts are reached, in the page's words; [`judge_thoughts`] and [`judge_picture`] are the rule."""
    return (
        f"<details class=soft><summary>The rule</summary><p>The verdicts of this page rest on {num_tests} tests. A "
        f"test holds if the paired bootstrap interval at the level 1 - {ALPHA} / {num_tests} lies above 0 and "
        f"McNemar's exact p (for shares of a point: the sign test's) is below {ALPHA} / {num_tests}.</p>"
        f"<p>Thoughts are “{USED}” if at least one of "
        f"{len(KINDS)} kinds of damage to all of them costs accuracy <i>and</i> answers follow the donor of the "
        "thoughts: under the own picture more often than they agree with a decoy, a sample drawn in the same way "
        "whose thoughts are not fed, or more often than with the thoughts of a sample that had the own answer; or "
        "under the donor's picture more often than with the decoy's thoughts. A single "
        "thought is, if besides accuracy falls when, after the loop, it alone is replaced by the mean or by the "
        "donor's.</p><p>The picture is, if a grey or another one costs accuracy. What thoughts took from it is, if "
        "with the right or the wrong picture for the answer, thoughts of the right one give more right answers than "
        f"those of the wrong one.</p><p>Anything else is “{NOT_SHOWN}”, which is not “not used”.</p></details>"
    )


def numbers_section(report: Mapping[str, Any]) -> str:
    """Accuracy against the number of thoughts."""
    experiments, trained = report["experiments"], report["model"]["num_thoughts"]
    rows = {
        row["num_thoughts"]: row for name, row in experiments.items() if name == "intact" or name.startswith("budget-")
    }
    rows = dict(sorted(rows.items()))
    control = report.get("control")
    other = control["experiments"]["intact"]["accuracy"]["rate"] if control else None
    chart = line_chart([(count, row["accuracy"]) for count, row in rows.items()], "thoughts", other, trained)
    body = [
        [
            str(count),
            percent(row["accuracy"]["rate"]),
            f"{percent(row['accuracy']['low'])} - {percent(row['accuracy']['high'])}",
            f"{row['new_tokens']:.1f}",
            *(difference_cells(row["loss"]) if count != trained else ("", "")),
        ]
        for count, row in rows.items()
    ]
    head = ("thoughts", "accuracy", "95 %", "generated tokens", "asked minus this, points [95 %]", "McNemar's p")
    note = f"<p class=soft>Accuracy in percent. Dotted: the {trained} thoughts that all else on this page is about."
    note += " Dashed: the control.</p>" if control else "</p>"
    return section("How many thoughts", f"<div class=two><div>{chart}{note}</div><div>{table(head, body)}</div></div>")


def damage_section(report: Mapping[str, Any]) -> str:
    """All thoughts replaced, and one at a time."""
    experiments, count = report["experiments"], report["model"]["num_thoughts"]
    names = {"intact": "intact"} | {f"{kind}-all": text(label) for kind, label in KINDS.items()}
    names |= {"noise-all-after": "noise of the norm of the untouched thought, after the loop"}
    parts = [
        "<p class=soft>All thoughts replaced. Zeros, noise and the pause embedding are unlike any thought, so a loss "
        "there may only say that the input is unfamiliar; the mean and a swap are closer to what was trained.</p>",
        loss_table(experiments, names),
    ]
    for place, words in (
        ("inside", "inside the loop: later thoughts follow from the replaced one"),
        ("after", "after the loop: the other thoughts stay as they were"),
    ):
        rows = [
            [text(label)]
            + [heat(experiments[name_of(kind, index, place, count)]["flips"]["rate"]) for index in range(count)]
            for kind, label in KINDS.items()
        ]
        head = ("answers flipped", *(f"thought {index + 1}" for index in range(count)))
        parts += [f"<p>One thought replaced, {words}</p>", table(head, rows)]
    return section("Thoughts replaced", *parts)


def swap_section(report: Mapping[str, Any]) -> str:
    """Whose answer is given with the thoughts of another sample."""
    found = report["thoughts"]
    names = {"swap-all": "donor had another answer", "swap_same-all": "donor had the same answer"}
    shares = {
        "own as before; the donor had another": found["stays"],
        "own as before; the donor had the same": found["stays_with_same_answer"],
    }
    rows = []
    for name, row in found["following"].items():
        shares |= {f"donor's; {FOLLOWING[name]}": row["donor"]}
        shares |= {f"{WITHOUT_DONOR[name]}; {FOLLOWING[name]}": row["decoy"]}
        rows.append([FOLLOWING[name], *difference_cells(row["test"], drawn=True)])
    answers = [
        [label, percent(value["rate"]), f"{percent(value['low'])} - {percent(value['high'])}", str(value["samples"])]
        for label, value in shares.items()
    ]
    return section(
        "Thoughts of another sample",
        "<p class=soft>“Answer” is here what the model itself answers untouched, right or wrong. The question is the "
        "sample's own. Thoughts that hold a place rather than the answer give the donor's answer only under the "
        "donor's picture.</p>",
        table(("the answer is", "share", "95 %", "samples"), answers),
        table(("donor minus decoy", "points [95 %]", "", "McNemar's p"), rows),
        loss_table(report["experiments"], names),
    )


def picture_section(report: Mapping[str, Any]) -> str:
    """Grey and other pictures for thoughts, answer or both."""
    names = {"intact": "own picture"}
    for name, label in (("grey", "a grey picture"), ("other", "another sample's picture")):
        names |= {
            f"{name}-both": f"{label} for both",
            f"{name}-thoughts": f"{label} for the thoughts only",
            f"{name}-answer": f"{label} for the answer only",
        }
    parts = [
        "<p class=soft>Thoughts recorded under one picture are fed while the prompt holds the other. The layers above "
        "a fed thought still attend to the picture of the prompt.</p>",
        loss_table(report["experiments"], names),
    ]
    if control := report.get("control"):
        parts.append(f"<p>The control <code>{text(control['name'])}</code>:</p>")
        parts.append(loss_table(control["experiments"], names))
    return section("Picture", *parts)


def bottleneck_section(report: Mapping[str, Any]) -> str:
    """The answer without sight of picture or question."""
    names = {
        "intact": "the answer sees all",
        "sees-no_image": "all but the picture",
        "sees-thoughts_only": "only the thoughts",
    }
    return section(
        "What the answer sees",
        "<p class=soft>A bottleneck, not a seal: thoughts have seen picture and question, and their keys and values "
        "in every layer carry what they saw. The model was not trained this way, so a loss may only say that it is "
        "unfamiliar.</p>",
        loss_table(report["experiments"], names),
    )


def lens_section(report: Mapping[str, Any]) -> str:
    """How often a replaced step is read from a thought."""
    has_control = any("control" in row for row in report["lens"])
    head = ["", "step", "first", "first five", "by chance", "first minus chance [95 %]", "McNemar's p"]
    head += ["control", "first minus control [95 %]", "McNemar's p"] if has_control else []
    rows = []
    for row in report["lens"]:
        cells = [f"thought {row['index'] + 1}", str(row["step"] + 1)]
        cells += [heat(row[name]["rate"]) for name in ("top1", "top5", "chance")] + difference_cells(
            row["above_chance"]
        )
        if "control" in row:
            cells += [heat(row["control"]["rate"]), *difference_cells(row["above_control"])]
        rows.append(cells + [""] * (len(head) - len(cells)))
    return section(
        "Logit lens",
        "<p class=soft>How often the token that <code>lm_head</code> reads from the state that makes a thought (with "
        "constant thoughts: the state before it) is the first token of the written step that the thought replaced. "
        "By chance: the step of another sample. It shows what can be read, not what is used: the last hidden state is "
        "trained to predict tokens in any model, so compare with a control.</p>",
        table(head, rows) if rows else "<p>The records have no written steps.</p>",
    )


def interval(found: Mapping[str, Any]) -> str:
    """The interval of a share."""
    return "-" if found["rate"] is None else f"{percent(found['low'])} - {percent(found['high'])}"


def readings_section(report: Mapping[str, Any], pictures: Sequence[str | None]) -> str:
    """What each group of thoughts reads as, over all records and in some."""
    found = report["readings"]
    control = found.get("control")
    head = ["group", "reads right", "95 %", "as its step", "records", "as the answer", "records"]
    head += ["the control's", "95 %"] if control else []
    rows = []
    for group, row in enumerate(found["groups"]):
        cells = [str(group + 1), heat(row["all"]["rate"]), interval(row["all"])]
        for kind in ("step", "answer"):
            cells += [percent(row[kind]["rate"]), str(row[kind]["samples"])]
        if control and group < len(control["groups"]):
            other = control["groups"][group]["all"]
            cells += [heat(other["rate"]), interval(other)]
        rows.append(cells + [""] * (len(head) - len(cells)))
    whole = f"{percent(found['all']['rate'])} of a record's groups read as what they stand for"
    whole += f"; of the control's {percent(control['all']['rate'])}" if control else ""
    parts = [
        "<p class=soft>Each group of thoughts is given alone to the same language model, which was trained to write "
        "the step that the group replaced, or behind the last step the answer. Of a control with constant thoughts "
        "the states that thoughts would have been are read: they were trained in the same way, and nothing of them is "
        "handed on. So this shows what can be read, not what is used.</p>",
        f"<p>{whole}.</p>",
        table(head, rows),
    ]
    for sample, picture in zip(found["samples"], pictures, strict=True):
        figure = f'<figure><img src="{picture}" alt="picture"></figure>' if picture else ""
        body = [
            [
                str(group + 1),
                f"<td class='text said'>{text(' | '.join(row['stands_for']) or '?')}</td>",
                reading_cell(row),
                *([reading_cell(row["control"])] if "control" in row else []),
            ]
            for group, row in enumerate(sample["groups"])
        ]
        head = ["group", "stands for", "reads", *(["the control's reads"] if control else [])]
        body = [row + [""] * (len(head) - len(row)) for row in body]
        parts.append(
            f"<p class=said>{text(sample['question'])}</p><div class=pictures>{figure}{table(head, body)}</div>"
        )
    return section("What the thoughts say", *parts)


def reading_cell(row: Mapping[str, Any]) -> str:
    """A text that was read, marked where it is right; unmarked where the record does not say."""
    kind, mark = {True: ("used", "✓ "), False: ("unshown", "✗ "), None: ("", "")}[row["right"]]
    return f"<td class='text said {kind}'>{mark}{text(row['reads'])}</td>"


def edits_section(report: Mapping[str, Any]) -> str:
    """Whether answers follow a group that was made to read as another step."""
    found = report["edits"]
    rows = []
    for label, row in [*((str(row["group"] + 1), row) for row in found["groups"]), ("all", found["all"])]:
        cells = [label, str(row["followed"]["samples"])]
        cells += [percent(row["followed"]["rate"]), interval(row["followed"]), percent(row["stayed"]["rate"])]
        apart = row["followed_where_they_differ"]
        cells += [str(apart["samples"]), heat(apart["rate"]), interval(apart)]
        cells += [percent(row[name]["rate"]) for name in ("stayed_where_they_differ", "reads_as_edit", "next_reads")]
        rows.append(cells)
    head = ("group", "records", "followed", "95 %", "stayed", "where the two differ", "followed", "95 %", "stayed")
    return section(
        "A thought made to say another step",
        "<p class=soft>The thoughts of one group are replaced, inside the loop, by the mean of the thoughts that read "
        "as another step on other records. Followed: the answer is what the recipe's rule derives from that step on "
        "the record's own picture. Stayed: it is the untouched run's. The two may be the same answer, so the records "
        "where they differ are counted by themselves. It is shown, and no part of the verdict.</p>",
        f"<p>{edit_sentence(found['all'])}</p>",
        table((*head, "the group reads as its edit", "the next as what follows"), rows),
    )


def edit_sentence(found: Mapping[str, Any]) -> str:
    """The read-edit experiment in one sentence."""
    apart, stayed = found["followed_where_they_differ"], found["stayed_where_they_differ"]
    if not apart["samples"]:
        return "A group made to read as another step: no record where that asks for another answer."
    return (
        f"A group made to read as another step: the answer follows in {percent(apart['rate'])} of "
        f"{apart['samples']} cases in which it had to change, and stays in {percent(stayed['rate'])}."
    )


def geometry_section(report: Mapping[str, Any]) -> str:
    """Norms, cosines, spread and rank of thoughts."""
    parts = []
    for name, geometry in (("", report["geometry"]), ("control: ", report.get("control", {}).get("geometry"))):
        if geometry is None:
            continue
        norms = [
            [name + label, f"{row['mean']:.3g}", f"{row['low']:.3g} - {row['high']:.3g}"]
            for label, row in geometry["norms"].items()
        ]
        within = [*(f"{cosine:.3f}" for cosine in geometry["cosine_with_next"]), ""]
        columns = (geometry["cosine_across_samples"], within, geometry["spread"], geometry["effective_rank"])
        shape = [
            [f"{name}thought {number}", f"{across:.3f}", cosine, percent(share), f"{rank:.1f}"]
            for number, (across, cosine, share, rank) in enumerate(zip(*columns, strict=True), start=1)
        ]
        shape.append([name + "all", "", "", "", f"{geometry['effective_rank_of_all']:.1f}"])
        head = ("", "cosine across samples", "cosine with the next", "spread", "effective rank")
        parts += [table(("norm of", "mean", "90 % of them"), norms), "<br>", table(head, shape), "<br>"]
        parts += [f"<p class=warning>Collapse: {text(name + warning)}.</p>" for warning in geometry["warnings"]]
    parts.append(
        "<p class=soft>Spread: squared distance from the mean over squared norm, the share of a thought that differs "
        "between samples. Effective rank: exponential of the entropy of the squared singular values, centred. The "
        f"rule of collapse: a spread under {percent(COLLAPSED_SHARE)}, or a mean cosine with the next thought over "
        f"{COLLAPSED_COSINE}.</p>"
    )
    return section("Geometry", *parts)


def attention_section(report: Mapping[str, Any], pictures: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Where positions look, as shares and over pictures."""
    found = report["attention"]
    count = len(found["shares"]) - 1
    labels = [f"makes thought {index + 1}" for index in range(count)] + ["writes the answer's first token"]
    rows = [[label, *(heat(share) for share in shares)] for label, shares in zip(labels, found["shares"], strict=True)]
    parts = [
        f"<p class=soft>Mean over layers, heads and {found['samples']} samples, from the position that does what is "
        "named. Attention says where a position looks, not what it takes from there.</p>",
        table(("position that", "picture", "question and other text", "thoughts"), rows),
    ]
    captions = ["picture", *(f"makes thought {index + 1}" for index in range(count)), "writes the answer"]
    for question, uris in pictures:
        figures = [
            f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
            for uri, caption in zip(uris, captions, strict=True)
        ]
        parts.append(f"<p class=said>{text(question)}</p><div class=pictures>{''.join(figures)}</div>")
    return section("Attention", *parts)


def example_section(report: Mapping[str, Any]) -> str:
    """Some samples as plain text."""
    parts = []
    for example in report["examples"]:
        items = {"record": example["id"], "question": example["question"]}
        items |= {"steps": " → ".join(example["steps"]), "answer": example["answer"]}
        items |= {f"written, {name}": written for name, written in example["written"].items()}
        if "donor" in example:
            items["that other's answer"] = example["donor"]["prediction"]
        if "lens" in example:
            items["lens"] = " | ".join(" ".join(repr(token) for token in tokens) for tokens in example["lens"])
        body = "".join(f"<dt>{text(name)}</dt><dd class=said>{text(value)}</dd>" for name, value in items.items())
        parts.append(f"<dl>{body}</dl><hr>")
    return section("Samples", *parts)


def page(
    report: Mapping[str, Any],
    pictures: Sequence[tuple[str, Sequence[str]]],
    pictures_read: Sequence[str | None] = (),
) -> str:
    """
    The whole report as one HTML page that asks nothing of a network.

    Args:
        pictures: From [`draw_attention`].
        pictures_read: From [`draw_pictures`], of the samples whose thoughts were read.
    """
    model = report["model"]
    parts = [verdict_section(report)]
    if any(name.startswith("budget-") for name in report["experiments"]):
        parts.append(numbers_section(report))
    if "thoughts" in report:
        parts += [damage_section(report), swap_section(report)]
    if "picture" in report:
        parts.append(picture_section(report))
    if "readings" in report:
        parts.append(readings_section(report, pictures_read))
    if "edits" in report:
        parts.append(edits_section(report))
    if "thoughts" in report:
        parts += [bottleneck_section(report), lens_section(report), geometry_section(report)]
        parts.append(attention_section(report, pictures))
    parts.append(example_section(report))
    title, data = f"Diagnosis of {text(model['name'])}", text(report["settings"]["data"])
    return f"""<!DOCTYPE html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
<p class=soft>mode {text(model["mode"])}, {model["num_thoughts"] or "no"} thoughts (trained with
{text(model["trained_thoughts"] or "none")}), {report["samples"]} samples of <code>{data}</code>. Intervals are of
95 %, paired by sample (bootstrap, 10,000 draws); p is McNemar's exact one, not corrected unless a rule says so.</p>
{chr(10).join(parts)}
</main></body></html>
"""


def report_table(report: Mapping[str, Any]) -> str:
    """The report as a table for the terminal."""
    width = max(map(len, report["experiments"])) + 2
    lines = [
        f"{'experiment':{width}}{'accuracy':>9}{'flipped':>9}  {'intact minus this, points [95 %]':>32}  {'p':>8}"
    ]
    for name, row in report["experiments"].items():
        accuracy, flips = percent(row["accuracy"]["rate"]), percent(row["flips"]["rate"])
        lines.append(f"{name:{width}}{accuracy:>9}{flips:>9}  {points(row['loss']):>32}  {p_value(row['loss']):>8}")
    if found := report.get("thoughts"):
        lines.append(f"\nThe thoughts are {found['verdict']}.")
        for name, row in found["following"].items():
            donor, decoy = percent(row["donor"]["rate"]), percent(row["decoy"]["rate"])
            beside = f"{WITHOUT_DONOR[name]}: {decoy}"
            lines.append(f"Under {FOLLOWING[name]}, the answer is the donor's in {donor} ({beside}).")
    if read := report.get("readings"):
        beside = f" (the control's: {percent(read['control']['all']['rate'])})" if "control" in read else ""
        share = percent(read["all"]["rate"])
        lines.append(f"Groups of thoughts that read as their step, or as the answer: {share}{beside}.")
    if edits := report.get("edits"):
        lines.append(edit_sentence(edits["all"]))
    return "\n".join(lines)
