"""Write small container images without a container tool: an OCI layout in one tar file."""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
CREATED = "1970-01-01T00:00:00Z"  # equal content gives an equal image


@dataclass(frozen=True)
class File:
    """A file, or a folder where `content` is None, of a layer."""

    path: str
    content: bytes | None
    mode: int = 0o644


def layer(files: list[File]) -> bytes:
    """An uncompressed layer; equal files give equal bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in files:
            entry = tarfile.TarInfo(file.path)
            entry.mode = file.mode
            if file.content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(file.content)
                tar.addfile(entry, io.BytesIO(file.content))
    return packed.getvalue()


def write_archive(to: Path, name: str, *, layers: list[bytes | Path], config: dict[str, Any]) -> None:
    """Write the image `name` as an archive for `ctr images import` or `buildah pull oci-archive:`.

    A layer is bytes or an uncompressed tar file. `config` holds the image's Entrypoint, User, Env and the like.
    """
    described = [(describe(one, LAYER), one) for one in layers]
    image = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [description["digest"] for description, _ in described]},
        # one entry a layer, or buildah refuses to build on the image
        "history": [{"created": CREATED, "created_by": "tests.cluster"} for _ in layers],
    }
    image_bytes = json.dumps(image).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": describe(image_bytes, CONFIG),
        "layers": [description for description, _ in described],
    }
    manifest_bytes = json.dumps(manifest).encode()
    # containerd reads its own annotation, buildah the standard one
    annotations = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "manifests": [{**describe(manifest_bytes, MANIFEST), "annotations": annotations}]}
    with tarfile.open(to, mode="w") as tar:
        add(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        add(tar, "index.json", json.dumps(index).encode())
        for name_of_blob, blob in {digest(one): one for one in (manifest_bytes, image_bytes, *layers)}.items():
            add(tar, f"blobs/sha256/{name_of_blob}", blob)


def describe(blob: bytes | Path, media_type: str) -> dict[str, Any]:
    size = len(blob) if isinstance(blob, bytes) else blob.stat().st_size
    return {"mediaType": media_type, "digest": f"sha256:{digest(blob)}", "size": size}


def digest(blob: bytes | Path) -> str:
    if isinstance(blob, bytes):
        return hashlib.sha256(blob).hexdigest()
    with blob.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add(tar: tarfile.TarFile, path: str, blob: bytes | Path) -> None:
    entry = tarfile.TarInfo(path)
    if isinstance(blob, bytes):
        entry.size = len(blob)
        tar.addfile(entry, io.BytesIO(blob))
        return
    entry.size = blob.stat().st_size
    with blob.open("rb") as file:
        tar.addfile(entry, file)
