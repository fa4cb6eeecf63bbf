"""Forms of a whole model for other programs than Python's: ONNX and GGUF. Each form is a module, with its writer and what its file gives when it is run.

check_forms(spec, base_folder)  # before anything is trained
"""

import json
from pathlib import Path

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import JobSpec, OutputForm

PARAM = "spec.output.formats"


def check_forms(spec: JobSpec, folder: Path) -> None:
    """Refuse (ConfigInvalid) a form that cannot be made of the base model in ``folder``, of which only the small files need be there."""
    wanted = set(spec.output.formats) & {OutputForm.ONNX, OutputForm.GGUF}
    if not wanted:
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("is_encoder_decoder"):
        form = min(wanted)
        raise Refusal(FailureCode.CONFIG_INVALID, f"format {form}: encoder-decoder models are not written yet; leave it out", param=PARAM)
    if OutputForm.GGUF in wanted:
        from tunewright_trainer.exports import to_gguf

        to_gguf.check(folder)
