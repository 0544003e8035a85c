"""Public contents of a run's files: without local paths, regardless of the working folder."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hf_ddpm.hub.card import write_card
from hf_ddpm.hub.push import model_files, public_content
from tests.conftest import TINY_RUN, load_script
from tests.hub.conftest import ROOT


def published(folder):
    """Return the public contents by file."""
    contents = {name: public_content(folder / name) for name in model_files(folder)}
    return {name: item.read_bytes() if isinstance(item, Path) else item for name, item in contents.items()}


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """The working folder, with images in data/acme-confidential."""
    (tmp_path / "data" / "acme-confidential").mkdir(parents=True)
    for gray in range(12):
        Image.new("L", (8, 8), 20 * gray).save(tmp_path / "data" / "acme-confidential" / f"{gray}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


DATA = ("--dataset", "data/acme-confidential", "--channels", "1", "--resolution", "8", "--levels", "256")
SHORT = ("--max_train_steps", "2", "--eval_inference_steps", "2", "--eval_num_images", "8")


def test_relative_paths_are_stripped_from_another_working_folder(acme, run_training, tmp_path_factory, monkeypatch):
    run_training(Path("runs/secret/one"), *DATA, *SHORT, "--eval_metrics", "nll", "--eval_split", "train")
    arguments = [
        "--model",
        "runs/secret/one",
        "--dataset",
        "data/acme-confidential",
        "--metrics",
        "nll",
        "--split",
        "train",
    ]
    load_script("evaluate").main([*arguments, "--num_images", "4", "--output", "runs/secret/one/results_more.json"])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    folder = acme / "runs" / "secret" / "one"
    assert "`acme-confidential`, split train" in write_card(folder).read_text()
    contents = published(folder)
    assert {"config.yaml", "results.json", "results_more.json", "README.md"} <= set(contents)
    for name, content in contents.items():
        for private in (b"data/acme", b"runs/", b"secret", str(acme).encode()):
            assert private not in content, name
    assert yaml.safe_load(contents["config.yaml"])["dataset"] == "acme-confidential"
    assert json.loads(contents["results_more.json"])["model"]["name"] == "one"


def test_deleted_folder_is_not_mistaken_for_hub_id(acme, run_training, trained):
    (acme / "runs").mkdir()
    (acme / "runs" / "base").symlink_to(trained)
    run_training(Path("runs/one"), *SHORT, "--init_from", "runs/base")
    (acme / "runs" / "base").unlink()
    run_training(Path("runs/one"), *SHORT, "--init_from", "runs/base", "--max_train_steps", "4")
    assert json.loads(Path("runs/one/export.json").read_text())["hub_ids"] == []
    assert b"runs/base" not in b"".join(published(Path("runs/one")).values())


def test_names_not_recorded_as_hub_ids_are_treated_as_paths(folder):
    options = {"dataset": "data/acme", "init_from": "s3://acme/model?sig=1", "output_dir": "runs/acme/x", "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / "evaluations.jsonl").write_text(json.dumps({"step": 1, "request": {"dataset": "data/acme"}}) + "\n")
    figure = {"value": 1.0, "made_by": {"dataset": {"name": "data/acme"}, "request": {"samples": "/out/acme"}}}
    results = {"model": {"name": "runs/acme", "checksum": "0"}, "fd": figure, "odd": 3}
    (folder / "results.json").write_text(json.dumps(results))
    contents = published(folder)
    expected = {"dataset": "acme", "init_from": "model", "output_dir": "x", "seed": 0}
    assert yaml.safe_load(contents["config.yaml"]) == expected
    assert json.loads(contents["evaluations.jsonl"])["request"]["dataset"] == "acme"
    public = json.loads(contents["results.json"])
    assert public["fd"]["made_by"] == {"dataset": {"name": "acme"}, "request": {"samples": "acme"}}
    assert public["model"] == {"name": "acme", "checksum": "0"} and public["odd"] == 3


def test_recorded_hub_ids_are_kept(folder):
    (folder / "export.json").write_text(json.dumps({"hub_ids": ["org/faces"]}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": "org/faces", "init_from": "org/model"}))
    figures = {
        name: {"made_by": {"dataset": {"name": "org/faces"}, "hub_ids": ids}}
        for name, ids in {"fd": ["org/faces", "org/model"], "kid": []}.items()
    }
    (folder / "results.json").write_text(json.dumps({"model": {"name": "org/model", "checksum": "0"}, **figures}))
    contents = published(folder)
    assert yaml.safe_load(contents["config.yaml"]) == {"dataset": "org/faces", "init_from": "model"}
    public = json.loads(contents["results.json"])
    assert public["model"]["name"] == "org/model" and public["fd"] == figures["fd"]
    assert public["kid"]["made_by"]["dataset"]["name"] == "faces"


def test_load_path_is_removed_from_configurations(folder):
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"_name_or_path": "/home/acme/model"}))
        assert json.loads(published(folder)[name]) == config


@pytest.mark.hub
@pytest.mark.slow
def test_hub_id_of_initial_model_is_kept(hub, trained, tmp_path):
    hub.push(trained, "org/base")
    arguments = ["--max_train_steps", "2", "--init_from", "org/base", "--push_to_hub", "--hub_model_id", "org/new"]
    script = ROOT / "scripts" / "train.py"
    code, output, errors = hub.run(script, *TINY_RUN, *arguments, "--output_dir", tmp_path / "run")
    assert code == 0 and "pushed the model to org/new" in errors + output, errors
    files = hub.files("org/new")
    assert yaml.safe_load(files["config.yaml"])["init_from"] == "org/base"
    assert b"| started from | `org/base` |" in files["README.md"]
