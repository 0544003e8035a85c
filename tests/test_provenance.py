import subprocess

import torch

from hf_ddpm.provenance import provenance, revision


def git(folder, *words):
    identity = ["-c", "user.name=n", "-c", "user.email=e@e.e"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_revision_is_read_from_checkout_of_file(tmp_path, monkeypatch):
    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    assert revision(file) is None  # no checkout
    git(tmp_path, "init", "-q")
    assert revision(file) is None  # not tracked
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = revision(file)
    assert len(clean) == 40 and int(clean, 16)
    file.write_text("changed")
    assert revision(file) == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert revision(file) is None  # no git


def test_provenance_has_versions_device_and_date():
    made = provenance(torch.device("cpu"))
    assert made["versions"].keys() == {"hf_ddpm", "torch", "diffusers", "python"}
    assert made["versions"]["torch"] == torch.__version__ and made["device"].startswith("cpu (")
    assert made["date"].endswith("+00:00")
