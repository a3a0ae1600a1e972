"""Makes privacy/annex_e.json, the table that `privacy.annex_e` applies, from DICOM PS3.15 Table E.1-1 in JSON.

    python deploy/annex_e.py ../shared/data/schemas/ps315_annex_e.json privacy/annex_e.json

The input is `confidentiality_profile_attributes` of innolitics/dicom-standard (MIT) at 7f4749d: 621 rows, read by that project
out of the standard that was current then. Which attribute gets which action is a fact of the standard; names, column titles
and prose are left behind. Each row becomes one short string, so that a change of edition reads as a list of lines in a review:

    "00100040": "Z characteristics=K"      tag: action of the Basic Profile, then what an option that we offer does instead
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

SOURCE = "DICOM PS3.15 Table E.1-1, as in innolitics/dicom-standard 7f4749d (MIT)"
OPTIONS = {
    "rtnLongModifDatesOpt": "dates",  # Retain Longitudinal Temporal Information with Modified Dates
    "rtnPatCharsOpt": "characteristics",  # Retain Patient Characteristics
    "rtnDevIdOpt": "device",  # Retain Device Identity
}
PRIVATE = "ggggeeee-where-gggg-is-odd"


def compact(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Tag ("00080050", "60xx3000" or "private") -> action and options. Raises ValueError for what is not a row of the table."""
    table: dict[str, str] = {}
    for row in rows:
        tag = "private" if row["id"] == PRIVATE else str(row["id"])
        if not re.fullmatch(r"[0-9a-f]{8}|50xxxxxx|60xx[0-9a-f]{4}|private", tag) or tag in table:
            raise ValueError(f"{tag}: no tag, or one that stood there before")
        if not re.fullmatch(r"[XZDUK](/[XZDU]\*?)*", row["basicProfile"]):
            raise ValueError(f"{tag}: {row['basicProfile']} is no action")
        options = [f"{name}={row[column]}" for column, name in OPTIONS.items() if row.get(column)]
        table[tag] = " ".join([row["basicProfile"], *options])
    return dict(sorted(table.items()))


def main() -> None:
    source, target = (Path(argument) for argument in sys.argv[1:3])
    table = compact(json.loads(source.read_text(encoding="utf-8")))
    text = json.dumps({"source": SOURCE, "rows": table}, indent=0)
    target.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
