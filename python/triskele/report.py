"""The pages that demo and bench leave behind: one self-contained HTML file, no scripts, no outside requests."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root{--ink:#1f2933;--muted:#616e7c;--line:#e4e7eb;--ground:#fff;--panel:#f7f9fa;--good:#0b7285;--bad:#b93815}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}h2{font-size:20px;margin:48px 0 8px}
p{margin:6px 0 14px;max-width:78ch}.muted{color:var(--muted)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px;margin:10px 0 18px}
th{font-weight:600;color:var(--muted);text-align:right;padding:6px 10px;border-bottom:2px solid var(--line)}
td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}tr:first-child td{background:var(--panel)}
.faster{color:var(--good);font-weight:600}.slower{color:var(--bad);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:18px;align-items:start}
figure{margin:0;padding:14px;background:var(--panel);border:1px solid var(--line);border-radius:10px}
figure img{width:100%;display:block;border-radius:4px}figure.sharp img{image-rendering:pixelated}
figcaption{font-size:13px;color:var(--muted);margin-top:8px}figcaption b{color:var(--ink)}
.wide{grid-column:1/-1}details{margin:4px 0}summary{cursor:pointer;color:var(--muted)}
pre{font-size:12px;background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px;overflow:auto}
"""


@dataclass(frozen=True)
class Picture:
    """An image with what it shows. sharp: enlarged pixel by pixel; wide: takes a whole row."""

    uri: str
    title: str
    caption: str = ""
    sharp: bool = False
    wide: bool = False


@dataclass
class Section:
    """A heading, a paragraph, tables of (header, rows of cells), pictures, and folded-away texts."""

    title: str
    text: str = ""
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


def ratio_cell(ratio: float) -> str:
    """ "1.42x" in the colour of faster, "0.31x" in that of slower; within 3 % of one: plain."""
    kind = "faster" if ratio > 1.03 else "slower" if ratio < 0.97 else ""
    return f'<span class="{kind}">{ratio:.2f}×</span>'


def decibel(value: float) -> str:
    return "identical" if math.isinf(value) else f"{value:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(picture: Picture) -> str:
    kinds = " ".join(k for k, on in (("sharp", picture.sharp), ("wide", picture.wide)) if on)
    return (f'<figure class="{kinds}"><img src="{picture.uri}" alt="{html.escape(picture.title)}">'
            f"<figcaption><b>{html.escape(picture.title)}</b> {html.escape(picture.caption)}</figcaption></figure>")


def page(title: str, lead: str, sections: list[Section]) -> str:
    """The whole page. Cells of tables are HTML already; every other text is escaped here."""
    parts = [f"<h1>{html.escape(title)}</h1><p class='muted'>{html.escape(lead)}</p>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            parts.append(f"<p>{html.escape(section.text)}</p>")
        parts += [_table(header, rows) for header, rows in section.tables]
        if section.pictures:
            parts.append('<div class="cards">' + "".join(map(_picture, section.pictures)) + "</div>")
        parts += [f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
                  for name, text in section.details]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><main>{''.join(parts)}</main></body></html>")


def write_page(path: Path, title: str, lead: str, sections: list[Section]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, lead, sections), encoding="utf-8")
    return path
