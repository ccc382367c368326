"""What is named to install must exist where this installation came from."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from fastsae._install import pip_install


@pytest.fixture
def installed(monkeypatch):
    def by(direct_url):
        text = None if direct_url is None else json.dumps(direct_url)
        found = SimpleNamespace(read_text=lambda name: text)
        monkeypatch.setattr(metadata, "distribution", lambda name: found)

    return by


def test_from_a_folder(installed, tmp_path):
    folder = tmp_path / "a b"
    folder.mkdir()
    installed({"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert pip_install("cli").endswith('".[cli]" in the source folder of fastsae')  # it is gone
    (folder / "pyproject.toml").touch()
    assert pip_install("cli") == f'pip install --no-build-isolation -e "{folder}[cli]"'
    installed({"url": folder.as_uri(), "dir_info": {}})
    assert pip_install("serve") == f'pip install --no-build-isolation "{folder}[serve]"'


def test_from_elsewhere(installed, monkeypatch):
    url = "https://example.org/fastsae.git"
    installed({"url": url, "vcs_info": {"vcs": "git", "commit_id": "0"}})
    assert pip_install("cli") == f'pip install "fastsae-kernels[cli] @ git+{url}"'
    installed(None)  # an index
    assert pip_install("cli") == 'pip install "fastsae-kernels[cli]"'

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)  # a source folder on the path
    assert pip_install("cli") == 'pip install "fastsae-kernels[cli]"'
