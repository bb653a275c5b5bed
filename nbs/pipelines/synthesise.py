"""Make the synthetic rows anew: `python nbs/pipelines/synthesise.py` writes data/ and data/confirmation/.

The first data set is the one that methods are chosen on. The second is of another seed, with a test set of its own, for results on
which nothing was chosen: no row of its validation or test sets is a row of the first data set, or of the embedded backbone's
pretraining. The same bytes come out each time. `make data` runs this and puts the result into DVC's store.
"""

import sys
from pathlib import Path

from command import end_at_ctrl_c

ROOT = Path(__file__).resolve().parents[2]
CONFIRMATION = {"seed": 1, "sizes": {"train": 600, "validation": 400, "test": 1000}}


def synthesise(folder, config):
    "Write both data sets into a folder; `config` is that of the backbone's pretraining. Number of files."
    from ept.data.synthetic import MAKERS, make_task, write_datasets
    from ept.training.pretraining import met_by

    def key(name, row):
        return name, *(v for v in row.values() if isinstance(v, str))

    first = {key(name, row) for name in MAKERS for frame in make_task(name).values() for row in frame.to_dict("records")}
    met = met_by(config)
    files = write_datasets(folder) + write_datasets(Path(folder) / "confirmation", **CONFIRMATION, taken=lambda name, row: key(name, row) in first or met(name, row))
    return len(files)


if __name__ == "__main__":
    end_at_ctrl_c("the same command begins anew")
    sys.path.insert(0, str(ROOT))
    from ept.training.pretraining import PretrainingConfig
    from ept.utils.checking import from_dict
    from ept.utils.locks import only_one
    from ept.utils.reading import read_json

    try:
        with only_one(ROOT / ".dvc" / "tmp" / "coordinator", ROOT):
            config = from_dict(PretrainingConfig, read_json(ROOT / "backbone" / "pretraining.json", "bring it with `dvc pull backbone.dvc`"), "pretraining")
            print(synthesise(ROOT / "data", config), "files")
    except RuntimeError as error:
        sys.exit(f"error: {error}")
