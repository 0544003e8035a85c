"""Files of a Space: the app, its requirements, and a wheel of this package."""

import base64
import hashlib
import shutil
from importlib import metadata
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import hf_ddpm

NAME = "hf_ddpm"
EXTRA = '; extra == "space"'
CACHES = shutil.ignore_patterns("__pycache__")
WHEEL = "Wheel-Version: 1.0\nGenerator: hf_ddpm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_space(folder: Path) -> None:
    """Write the files of a Space that runs the current version of this package, which is not on PyPI.

    Raises:
        ValueError: If the package is not installed, so that its requirements are unknown.
    """
    shutil.copytree(Path(__file__).parent / "space", folder, ignore=CACHES, dirs_exist_ok=True)
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()), encoding="utf-8")
    write_wheel(folder)


def requirements() -> list[str]:
    """Return the requirements of the package and of its demo, as lines of a requirements file."""
    lines = _distribution().requires or []
    return [line.removesuffix(EXTRA) for line in lines if "extra ==" not in line or line.endswith(EXTRA)]


def write_wheel(folder: Path) -> Path:
    """Write a wheel of the running package, reproducibly and also from an editable install."""
    distribution = _distribution()
    stem = f"{NAME}-{distribution.version}"
    info = f"{stem}.dist-info"
    package = Path(hf_ddpm.__file__).parent
    files = {f"{NAME}/{file.relative_to(package).as_posix()}": file.read_bytes() for file in _files(package)}
    texts = {name: distribution.read_text(name) for name in ("METADATA", "entry_points.txt", "licenses/LICENSE")}
    texts["METADATA"] = texts["METADATA"] or distribution.read_text("PKG-INFO")  # from the egg-info of a clone
    files |= {f"{info}/{name}": text.encode() for name, text in texts.items() if text}
    files[f"{info}/WHEEL"] = WHEEL.encode()
    record = [f"{name},sha256={_checksum(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,\n"]).encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with ZipFile(path, "w", ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            entry = ZipInfo(name)  # with a fixed date
            entry.compress_type, entry.external_attr = ZIP_DEFLATED, 0o644 << 16
            wheel.writestr(entry, content)
    return path


def _distribution() -> metadata.Distribution:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"{NAME} is not installed, so its requirements are unknown; run pip install -e .") from error


def _files(package: Path) -> list[Path]:
    """Return the files of a package, without caches and hidden files."""
    files = sorted(path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(package).parts)]


def _checksum(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
