"""Real fields beside the repository, through a hand-made image list."""

from pathlib import Path

import pandas as pd
import pytest

REAL_IMAGES = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "real-images"


def real_list(path: Path) -> Path:
    """Two real fields of source_1 with different channel orders, and a pilot field that lacks two channels."""
    if not REAL_IMAGES.exists():
        pytest.skip(f"{REAL_IMAGES} is not there")
    manifest = pd.read_csv(REAL_IMAGES / "manifest.csv", dtype="str")
    rows = []
    for folder, images in manifest[manifest["dataset"].str.startswith("cpg")].groupby(manifest["file"].str.split("/").str[0]):
        first = images.iloc[0]
        batch = {"20221005": "Batch1_20221004", "20221013": "Batch4_20221012"}.get(folder[-8:], "pilot")
        row = {"Metadata_Source": first["lab"].split()[0], "Metadata_Batch": batch, "Metadata_Plate": folder}
        row |= {"Metadata_Well": first["well"], "Metadata_Site": first["site"]}
        row |= {
            f"URL_Orig{channel}": str(REAL_IMAGES / file) for channel, file in zip(images["channel"], images["file"], strict=True)
        }
        rows.append(row)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path
