"""Run folders edited by hand, for tests that need one which training does not make."""

import json
import pathlib

from tim4rec_jax.json_files import read_sealed, sealed
from tim4rec_jax.run_manifest import MANIFEST, file_digest, read_manifest, write_manifest


def reseal(run: pathlib.Path) -> None:
    """Makes the manifest that of the files as they are now."""
    manifest = read_manifest(run)
    fingerprint = json.loads((run / "environment.json").read_text())["data_fingerprint"]
    digests = {name: [file_digest(run / name)] for name in manifest.files}
    write_manifest(run, manifest._replace(files=digests, data_fingerprint=fingerprint))


def make_old(run: pathlib.Path) -> None:
    """Makes a run one of the version that had no manifest."""
    (run / MANIFEST).unlink()
    for file in run.glob(f"checkpoints/*/*/{MANIFEST}"):
        manifest = read_sealed(file)
        del manifest["run"]
        file.write_text(json.dumps(sealed(manifest)))
