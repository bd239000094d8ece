"""What `models.weights.import_` says about the weights that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf import UserError

FORMAT = 1
DESCRIPTION = "weights.json"


def read_description(folder: Path) -> dict[str, Any]:
    """made_from, model (settings by section), prefixes of the imported parameters' names, and which of those are fresh.

    Raises UserError for a folder that the import did not make.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not isinstance(content["prefixes"], list):
            raise ValueError(f"format {content['format']}")
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe imported weights ({error!r}): import them again") from error
