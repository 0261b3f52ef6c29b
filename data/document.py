"""A document as a list of blocks, written as Markdown and as one self-contained HTML page.

All text may come from strangers (names of files, labels, error messages): it is escaped here, and
nowhere else.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

TEMPLATE = Path(__file__).with_name("card_template.html")
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]|~])")
NUMBER = re.compile(r"[\d.,]+( \([\d.]+ %\))?")
BAR_CHARACTERS = 20
FOLDED_ROWS = 40


@dataclass(frozen=True)
class Bar:
    """A bar; `share` of its full length, 0 to 1."""

    share: float


Cell = str | Bar


@dataclass(frozen=True)
class Heading:
    """Heading of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Verdict:
    """What matters most; the grade colours it."""

    text: str
    grade: Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table with a row of column names, and at least one other row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Code:
    """Text to copy, as it stands."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A picture file."""

    data: bytes
    mime: str
    description: str


@dataclass(frozen=True)
class Exhibit:
    """One sample: its name, and per modality its name and what there is to see."""

    title: str
    subtitle: str
    parts: Sequence[tuple[str, "Picture | Paragraph | Table"]]


@dataclass(frozen=True)
class Gallery:
    """Samples side by side; only in HTML."""

    exhibits: Sequence[Exhibit]


Block = Heading | Paragraph | Verdict | Bullets | Table | Code | Picture | Gallery


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """GitHub-flavoured Markdown."""
    parts = [f"# {_mark(title)}", *(_markdown(block) for block in blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page without scripts and without anything from elsewhere."""
    body = "\n".join(_html(block) for block in blocks)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(title=_esc(title), body=body)


def _printable(text: str) -> str:
    """One line of visible characters; bidirectional overrides and control codes are none."""
    spaced = re.sub(r"\s+", " ", text)
    return "".join(char if char.isprintable() else "\ufffd" for char in spaced)


def _lines(text: str) -> str:
    return "\n".join(
        "".join(char if char.isprintable() else "\ufffd" for char in line)
        for line in text.splitlines()
    )


def _mark(text: str) -> str:
    return MARKDOWN_SPECIAL.sub(r"\\\1", html.escape(_printable(text), quote=False))


def _esc(text: str) -> str:
    return html.escape(_printable(text))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_mark(text)}"
        case Paragraph(text):
            return _mark(text)
        case Verdict(text):
            return f"**{_mark(text)}**"
        case Bullets(texts):
            return "\n".join(f"- {_mark(text)}" for text in texts)
        case Table(columns, rows):
            head = [_mark(column) for column in columns]
            lines = [head, ["---"] * len(head), *([_mark_cell(cell) for cell in r] for r in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Code(text):
            return f"```\n{_lines(text)}\n```"
        case Picture() | Gallery():
            return ""


def _mark_cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return "█" * round(cell.share * BAR_CHARACTERS)
    return _mark(cell)


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_esc(text)}</h2>"
        case Paragraph(text):
            return f"<p>{_esc(text)}</p>"
        case Verdict(text, grade):
            return f'<p class="verdict {grade}">{_esc(text)}</p>'
        case Bullets(texts):
            return "<ul>" + "".join(f"<li>{_esc(text)}</li>" for text in texts) + "</ul>"
        case Table():
            return _html_table(block)
        case Code(text):
            return f"<pre>{html.escape(_lines(text))}</pre>"
        case Picture(data, mime, description):
            source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
            return f'<img src="{source}" alt="{_esc(description)}">'
        case Gallery(exhibits):
            figures = "\n".join(_html_exhibit(exhibit) for exhibit in exhibits)
            return f'<div class="gallery">\n{figures}\n</div>'


def _html_table(table: Table) -> str:
    """Columns of numbers are aligned to the right; a long table is folded."""
    right = [
        all(isinstance(cell, str) and NUMBER.fullmatch(cell) is not None for cell in column)
        for column in zip(*table.rows, strict=True)
    ]
    head = "".join(
        f"<th{_align(is_right)}>{_esc(column)}</th>"
        for column, is_right in zip(table.columns, right, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(_html_cell(*pair) for pair in zip(row, right, strict=True))}</tr>"
        for row in table.rows
    )
    whole = (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
    if len(table.rows) <= FOLDED_ROWS:
        return whole
    return f"<details><summary>{len(table.rows)} rows</summary>\n{whole}\n</details>"


def _align(is_right: bool) -> str:
    return ' class="number"' if is_right else ""


def _html_cell(cell: Cell, is_right: bool) -> str:
    if isinstance(cell, Bar):
        return f'<td class="bar"><div style="width:{100 * cell.share:.1f}%"></div></td>'
    return f"<td{_align(is_right)}>{_esc(cell)}</td>"


def _html_exhibit(exhibit: Exhibit) -> str:
    parts = "\n".join(
        f"<div><span>{_esc(name)}</span>{_html(part)}</div>" for name, part in exhibit.parts
    )
    caption = f"<b>{_esc(exhibit.title)}</b> {_esc(exhibit.subtitle)}"
    return f"<figure>\n<figcaption>{caption}</figcaption>\n{parts}\n</figure>"
