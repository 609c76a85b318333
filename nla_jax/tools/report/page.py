"""One self-contained HTML page about a run: headline, examples, documents, a chart of every probe, training, settings.

`render(report)` does not use the network. It draws whatever probes and metrics it is given; it knows by name only
those of the headline and of the warnings, and the panels that several metrics share.
"""

import base64
import hashlib
from html import escape

from .documents import documents
from .examples import examples, picks
from .header import header
from .measurements import measurements
from .report import Report
from .run_facts import the_pair, the_run
from .style import CSS, SCRIPT
from .training import training


def render(report: Report) -> str:
    """The whole page. Its security policy forbids every script but ours, and every request."""
    sections = {
        "Good and bad examples": picks(report),
        "Documents as heat maps": documents(report),
        "Measurements": measurements(report),
        "Training": training(report),
        "All examples": examples(report),
        "Open the pair": the_pair(report),
        "The run": the_run(report),
    }
    links, body = "", ""
    for i, (title, content) in enumerate(sections.items(), 1):
        links += f'<li><a href="#section-{i}">{title}</a></li>'
        body += f'<section id="section-{i}" aria-label="{title}"><h2>{title}</h2>{content}</section>'
    ours = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(report.title)}</title><style>{CSS}</style></head><body>"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav>'
        f"<main>{header(report)}{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
