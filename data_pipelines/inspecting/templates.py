"""Where pages come from; no torch here, so that a page can be made on a login node."""

from __future__ import annotations

from pathlib import Path

import jinja2

TEMPLATES = Path(__file__).parent


def template_environment(*folders: Path) -> jinja2.Environment:
    """Templates of these folders and of this one; what comes from samples is escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
