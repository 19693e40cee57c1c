"""How objects show themselves in a notebook: small tables of HTML."""

import html
from collections.abc import Iterable, Sequence


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Returns a table; texts are escaped, and all columns but the first are aligned to the right."""

    def cell(kind: str, place: int, text: str) -> str:
        return f'<{kind} style="text-align:{"right" if place else "left"}">{html.escape(str(text))}</{kind}>'

    def line(kind: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(kind, place, text) for place, text in enumerate(cells))}</tr>"

    below = f"<p>{html.escape(caption)}</p>" if caption else ""
    head = f"<thead>{line('th', header)}</thead>" if header else ""
    body = "".join(line("td", row) for row in rows)
    return f"<div><b>{html.escape(title)}</b><table>{head}<tbody>{body}</tbody></table>{below}</div>"


def metric_rows(columns: Sequence[dict[str, float]]) -> list[list[str]]:
    """Returns a row per metric of any column: its name, and its value in each."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(f"{column[name]:.4f}" if name in column else "–" for column in columns)] for name in names]
