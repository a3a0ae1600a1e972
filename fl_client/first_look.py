"""What a first look at a file finds, as the index keeps it.

Apart from `fl_client.headers`, which looks: what trains on an index that was made before needs no DICOM reader in memory.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

View = Literal["frontal", "lateral", "unknown"]


@dataclass(frozen=True)
class Header:
    """What the index keeps of one file; text is "" where the file says nothing.

    `plane`: where a CT slice lies, as position, row, column and spacing; empty for a radiograph. `lossy`: whether the pixels
    were compressed with loss before they came here. `acquisition`: which passage of the scanner, where a series holds several.
    `inverted`: a picture whose header says that bright means air; DICOM files say so themselves.
    """

    patient: str = ""
    study_uid: str = ""
    series_uid: str = ""
    sop_uid: str = ""
    accession: str = ""
    modality: str = ""
    view: View = "unknown"
    manufacturer: str = ""
    sex: str = ""
    age_years: float | None = None
    lossy: bool = False
    acquisition: str = ""
    inverted: bool = False
    plane: list[float] = field(default_factory=list)
    size: list[int] = field(default_factory=list)  # of a CT slice: rows, columns

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))
