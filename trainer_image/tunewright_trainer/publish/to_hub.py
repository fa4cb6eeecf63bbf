"""A copy of what was published in a repository of the Hugging Face hub, by the hub's own client.

It comes after everything else is published, and takes nothing back: what goes wrong is told beside it.
"""

import logging
import tempfile
from pathlib import Path
from typing import Final, NoReturn

from tunewright_crds import names
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig, Published, clean
from tunewright_crds.status import MAX_HUB_ERROR, HubCopy
from tunewright_crds.storage import MANIFEST, model_key
from tunewright_trainer.storage import Store, fetch_folder, read_keys
from tunewright_trainer.storage.patience import Unavailable, patiently

log = logging.getLogger(__name__)

_PARAM: Final = "spec.output.hub"


def copy(config: PodConfig, published: Published, store: Store, work: Path) -> HubCopy:
    """Have the served form in the job's repository, as one commit however often it is tried; tells that commit, or why there is none."""
    repository = config.spec.output.hub.repository
    try:
        with tempfile.TemporaryDirectory(prefix="hub-", dir=work) as folder:
            key = model_key(config.job.namespace, config.model_name, config.version, published.uri.rstrip("/").rpartition("/")[2])
            fetch_folder(store, key, Path(folder))
            (Path(folder) / MANIFEST).write_bytes(store.get_bytes(f"{key}/{MANIFEST}"))
            commit = patiently(lambda: _push(config, Path(folder)), what=f"hf://{repository}", translate=_translate)
    except Refusal as refusal:
        log.warning("not copied to hf://%s: %s", repository, refusal.message)
        return HubCopy(error=clean(f"{refusal.code.value}: {refusal.message}", limit=MAX_HUB_ERROR))
    log.info("copied to hf://%s@%s", repository, commit)
    return HubCopy(uri=f"hf://{repository}@{commit}")


def _push(config: PodConfig, folder: Path) -> str:
    """The commit that holds the folder. Its manifest, which names every file with its hash, says whether it is there already."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    wanted, keys = config.spec.output.hub, read_keys(names.HUB_CREDENTIALS)
    api = HfApi(endpoint=keys.get("HF_ENDPOINT"), token=keys.get("HF_TOKEN"), library_name="tunewright")
    api.create_repo(wanted.repository, private=wanted.private, exist_ok=True)
    head = str(api.repo_info(wanted.repository).sha)
    with tempfile.TemporaryDirectory(prefix="hub-") as there:
        try:
            found = Path(api.hf_hub_download(wanted.repository, MANIFEST, revision=head, local_dir=there)).read_bytes()
        except EntryNotFoundError:
            found = b""
    if found == (folder / MANIFEST).read_bytes():
        return head
    told = f"{config.model_name} {config.version}"
    return str(api.upload_folder(repo_id=wanted.repository, folder_path=folder, commit_message=told).oid)


def _translate(error: Exception) -> NoReturn:
    """Raise what an error of the library means."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, XetDownloadError

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        _translate(error.__cause__)  # of a large file
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise Unavailable(f"the hub answered {status}") from error
        if status in (401, 403, 404):
            what = f"the hub does not let us write ({status}): give an HF_TOKEN that may, in {_PARAM}.credentialsSecret"
            raise Refusal(FailureCode.ACCESS_DENIED, what, param=_PARAM) from error
        raise Refusal(FailureCode.CONFIG_INVALID, f"the hub refused: {' '.join(str(error).split())[:300]}", param=_PARAM) from error
    if isinstance(error, OfflineModeIsEnabled):
        raise Refusal(FailureCode.CONFIG_INVALID, "nothing is copied while HF_HUB_OFFLINE is set", param=_PARAM) from error
    if isinstance(error, (httpx2.HTTPError, XetDownloadError, ConnectionError, TimeoutError)):
        raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
    if isinstance(error, ValueError):  # such as metadata that the hub does not take
        raise Refusal(FailureCode.CONFIG_INVALID, " ".join(str(error).split())[:300], param=_PARAM) from error
    raise error
