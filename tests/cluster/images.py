"""The project's images, built from its own Dockerfiles and put into the cluster's containerd without any registry.

An image's tag is a hash of all that goes into it: an image that the cluster has is never built again, and a pod that asks
for a tag gets that very code.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from . import build, lifecycle, node, oci, record
from .build import locked, run, step
from .places import CHECKOUT, ClusterError, cache, places

FOLDERS = {"operator": "operator", "api": "api", "trainer": "trainer_image"}
NAMES = (*FOLDERS, "dev")
DEFAULT = ("operator", "api", "dev")  # the trainer's own image with CUDA is about 6 GB: on the test cluster `dev` stands in
COMMON = ["pyproject.toml", "uv.lock", "README.md", "LICENSE", ".dockerignore", "crds/tunewright_crds"]
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE = ["--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm"]
KEPT_ARCHIVES = 2  # of each image; older ones are of code that is gone
USER = "65532:65532"


def provide(name: str, wanted: Iterable[str]) -> dict[str, str]:
    """Build the images that are new, import those that the cluster lacks, and note their names in its facts.

    Where no cluster of that name is up they are only built: as files that `docker load` and `ctr images import` read.
    """
    build.need_root()
    build.packages(build.IMAGE_PACKAGES)
    at = places(name)
    cluster = record.facts(name) if at.facts.exists() else None
    if cluster and (cluster.external or cluster.control_plane_only):
        raise ClusterError(
            f"cluster {name!r} has no containerd of ours: push the images to a registry that it reads, "
            f"and name them by {', '.join(lifecycle.EXTERNAL_IMAGES.values())}"
        )
    names = {image: reference(image) for image in wanted}
    there = node.ctr(at, "images", "list", "-q").split() if cluster else []
    for image, full_name in names.items():
        if full_name in there:
            print(f"         image {image} is there", flush=True)
            continue
        with locked(cache() / "images.lock"):
            archive = archive_of(image, full_name)
            if not cluster:
                print(f"         image {image} is in {archive}; no cluster {name!r} is up to import it", flush=True)
                continue
            with step(f"import image {image}"):
                node.ctr(at, "images", "import", str(archive))
    if cluster:
        lifecycle.remember_images(name, names)
    return names


def reference(image: str) -> str:
    """The image's full name, with the hash of its sources as the tag."""
    digest = hashlib.sha256(base_key().encode())
    if image == "dev":
        digest.update("\0".join(map(str, [CHECKOUT, *node.dev_mounts()])).encode())
        digest.update(Path(__file__).read_bytes())
    else:
        folder = FOLDERS[image]
        for file in source_files([*COMMON, f"{folder}/Dockerfile", f"{folder}/tunewright_{image}"]):
            digest.update(str(file.relative_to(CHECKOUT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"localhost/tunewright/{image}:{digest.hexdigest()[:12]}"


def source_files(paths: list[str]) -> list[Path]:
    """The files of the paths in a stable order, without what running the code leaves."""
    found: list[Path] = []
    for path in paths:
        place = CHECKOUT / path
        if not place.exists():
            raise ClusterError(f"{path} is missing: no image can be built without it")
        found += [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return sorted(found)


def archive_of(image: str, full_name: str) -> Path:
    """The image as a file, built unless this machine built it before."""
    tag = full_name.rpartition(":")[2]
    archive = cache() / "images" / f"{image}-{tag}.tar"
    if not archive.exists():
        with step(f"build image {image}"):
            scratch = archive.with_suffix(".building")
            scratch.unlink(missing_ok=True)
            write_dev_image(scratch, full_name) if image == "dev" else build_image(image, full_name, scratch)
            scratch.replace(archive)
            forget_old(image, archive.parent)
    return archive


def forget_old(image: str, folder: Path) -> None:
    """Remove the oldest files of an image, and the same in buildah's store."""
    archives = sorted(folder.glob(f"{image}-*.tar"), key=lambda file: file.stat().st_mtime, reverse=True)
    stored = buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()
    for archive in archives[KEPT_ARCHIVES:]:
        full_name = f"localhost/tunewright/{image}:{archive.stem.removeprefix(f'{image}-')}"
        if full_name in stored:
            buildah("rmi", full_name)
        archive.unlink()


def build_image(image: str, full_name: str, archive: Path) -> None:
    """Build by the image's own Dockerfile; the machine's certificates and pip settings are lent to the build only."""
    base = os.environ.get("TUNEWRIGHT_BASE_IMAGE") or stand_in_base()
    pip_settings = cache() / "images" / "pip.conf"
    pip_settings.write_text(lent_pip_settings())
    lent = [f"{pip_settings}:/etc/pip.conf:ro", *([f"{AUTHORITIES}:{AUTHORITIES}:ro"] if AUTHORITIES.exists() else [])]
    buildah(
        *["bud", "--isolation", "chroot", "--network", "host", "--layers", "--pull-never", "--quiet"],
        *[word for volume in lent for word in ("--volume", volume)],
        *["--build-arg", f"BASE_IMAGE={base}", "--tag", full_name],
        *["--file", str(CHECKOUT / FOLDERS[image] / "Dockerfile"), str(CHECKOUT)],
    )
    buildah("push", "--quiet", full_name, f"docker-archive:{archive}:{full_name}")


def buildah(*words: str) -> str:
    """Run buildah on a store of its own, so that nothing of the machine's other images is touched."""
    store = cache() / "images" / "store"
    policy = cache() / "images" / "policy.json"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}\n')
    command, *rest = words
    place = ["--root", str(store), "--runroot", "/run/tunewright-buildah", "--storage-driver", storage_driver()]
    policies = ["--signature-policy", str(policy)] if command in ("bud", "push", "pull") else []
    return run(["buildah", *place, command, *policies, *rest], cwd=CHECKOUT)


def storage_driver() -> str:
    """`overlay` where the kernel lets us mount it over the cache's file system, else the slow `vfs`."""
    probe = cache() / "images" / "overlay-probe"
    folders = [probe / name for name in ("lower", "upper", "work", "merged")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    lower, upper, work, merged = folders
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], capture_output=True, check=False)
    if mounted.returncode == 0:
        run(["umount", str(merged)])
    shutil.rmtree(probe, ignore_errors=True)
    return "overlay" if mounted.returncode == 0 else "vfs"


def lent_pip_settings() -> str:
    """The machine's pip settings, whether they come from files or variables, without paths that the build does not have."""
    lines = ["[global]"]
    # A virtual environment made by uv has no pip: the Python that it was made from does.
    python = shutil.which("python3", path=f"{sys.base_prefix}/bin") or sys.executable
    for line in run([python, "-m", "pip", "config", "list"]).splitlines():
        key, _, value = line.partition("=")
        option = key.rpartition(".")[2]
        if option not in ("cert", "find-links", "cache-dir", "user"):
            lines.append(f"{option} = {value.strip(chr(39))}")
    return "\n".join(lines) + "\n"


def base_key() -> str:
    """Names the base that images are built on."""
    chosen = os.environ.get("TUNEWRIGHT_BASE_IMAGE") or " ".join(BASE)
    return hashlib.sha256(chosen.encode()).hexdigest()[:12]


def stand_in_base() -> str:
    """A Debian with Python in buildah's store, for machines that reach no image registry."""
    full_name = f"localhost/tunewright/base:{base_key()}"
    if full_name not in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        archive = cache() / "images" / "base.oci"
        oci.write_archive(archive, full_name, layers=[base_layer()], config={"Cmd": ["/bin/sh"]})
        image = buildah("pull", "--quiet", f"oci-archive:{archive}").split()[-1]
        buildah("tag", image, full_name)
        archive.unlink()
    return full_name


def provide_base() -> None:
    """Make the stand-in base, unless this machine has it."""
    with locked(cache() / "images.lock"):
        base_layer()


def base_layer() -> Path:
    """The stand-in base's files as one layer; made once a machine, in about three minutes."""
    layer = cache() / "images" / f"base-{base_key()}.layer"
    if layer.exists():
        return layer
    root = cache() / "images" / "base-root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    with step("debootstrap the stand-in base"):
        run(["debootstrap", *BASE[:-1], BASE[-1], str(root), *debian_mirror()])
    for left in [*root.glob("var/cache/apt/**/*.deb"), *root.glob("var/lib/apt/lists/*_*"), *root.glob("var/cache/apt/*.bin")]:
        left.unlink()
    scratch = layer.with_suffix(".building")
    run(
        [
            "tar",
            "-C",
            str(root),
            "--numeric-owner",
            "--sort=name",
            "--exclude=./dev/*",
            "--exclude=./proc/*",
            "--exclude=./sys/*",
            "-cf",
            str(scratch),
            ".",
        ]
    )
    scratch.replace(layer)
    shutil.rmtree(root)
    return layer


def debian_mirror() -> list[str]:
    """The mirror that this machine's apt uses; none leaves the choice to debootstrap."""
    with suppress(ClusterError):
        for line in run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"]).splitlines():
            uri, _, release = line.partition(" ")
            if release == BASE[-1] and uri.startswith("http"):
                return [uri]
    return []


def write_dev_image(archive: Path, full_name: str) -> None:
    """The base with PATH pointing into the checkout's `.venv`, which the runtime class `tunewright-dev` mounts.

    The mounts' parents are readable by all, because `/root` of the base is not and pods do not run as root.
    """
    parents = sorted({parent for mount in node.dev_mounts() for parent in [mount, *mount.parents]} - {Path("/")})
    folders = [oci.File(str(folder).removeprefix("/"), None, mode=0o755) for folder in parents]
    binaries = CHECKOUT / ".venv" / "bin"
    config = {
        "Entrypoint": ["tunewright-trainer"],
        "User": USER,
        "WorkingDir": "/tmp",
        "Env": [f"PATH={binaries}:/usr/local/bin:/usr/bin:/bin", "HOME=/tmp", "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"],
    }
    oci.write_archive(archive, full_name, layers=[base_layer(), oci.layer(folders)], config=config)
