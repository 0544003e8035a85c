import ast
import json
import re
import shutil

import diffusers
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_ddpm import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.hub.card import FORMER_MARK, MARK, TEMPLATE, write_card
from hf_ddpm.hub.figures import rows
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.provenance import model_checksum
from hf_ddpm.utils.markdown import plain
from hf_ddpm.utils.public import strip_local_path
from tests.conftest import TINY_UNET
from tests.hub.conftest import ROOT
from tests.utils.test_markdown import HOSTILE, cells, parse

COMMITTED = sorted((ROOT / "model_cards" / "weights").glob("*"))


@pytest.fixture(scope="module")
def evaluated(run_training, tmp_path_factory):
    """Folder of an evaluated run; tests must not write to it."""
    folder = tmp_path_factory.mktemp("evaluated") / "my-digits"
    options = ["--eval_metrics", "fd,kid,is,pr,nll", "--eval_num_images", "20", "--eval_inference_steps", "2"]
    run_training(folder, "--max_train_steps", "4", *options, "--eval_steps_per_image", "2", "--license", "cc-by-4.0")
    return folder


@pytest.fixture
def copied(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "my-digits", ignore=shutil.ignore_patterns("checkpoints"))


def evaluation_table(text):
    cells = [line.split("|")[1:-1] for line in text.split("## Evaluation")[1].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in cells if "---" not in row[1]][1:]
    return {name: (value.split(" ± ")[0], floor, count) for name, value, floor, count, *_ in rows}


def test_card_values_match_results(evaluated):
    card, results = ModelCard.load(evaluated / "README.md"), json.loads((evaluated / "results.json").read_text())
    expected = {
        "frechet_distance": (results["fd"]["value"], results["fd"]["floor"]),
        "kernel_distance": (results["kid"]["value"], results["kid"]["floor"]),
        "inception_score": (results["is"]["value"], None),
        "precision": (results["pr"]["precision"], results["pr"]["held_out_precision"]),
        "recall": (results["pr"]["recall"], results["pr"]["held_out_recall"]),
        "bits_per_dim": (results["nll"]["total_bpd"], None),
        "exact_copies": (results["memorization"]["exact_copies"], None),
    }
    listed = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in listed.items()} == {k: v for k, (v, _) in expected.items()}
    table = evaluation_table(card.text)
    for kind, (value, floor) in expected.items():
        row = table[listed[kind].metric_name]
        assert row == (f"{value:.4g}", "" if floor is None else f"{floor:.4g}", "20")
    distance = listed["frechet_distance"]
    assert distance.dataset_split == "train" and listed["bits_per_dim"].dataset_split == "test"
    assert distance.metric_args["extractor_sha256"] == results["fd"]["made_by"]["extractor"]["checksum"]
    assert distance.metric_args["num_inference_steps"] == 2


def test_card_describes_run(evaluated):
    card, config = ModelCard.load(evaluated / "README.md"), yaml.safe_load((evaluated / "config.yaml").read_text())
    status = json.loads((evaluated / "status.json").read_text())
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert f"4, batch size 8: {4 * 8} images seen" in card.text and status["hardware"] in card.text
    assert f"| learning rate | {config['learning_rate']:g}" in card.text
    parameters = sum(p.numel() for p in DDPMPipeline.from_pretrained(evaluated).unet.parameters())
    assert f"{parameters:,} parameters" in card.text
    for picture in re.findall(r"\]\((\w+\.png)\)", card.text):
        assert (evaluated / picture).exists()
    assert {"samples.png", "loss.png", "results_nearest.png"} <= set(re.findall(r"\w+\.png", card.text))
    assert str(evaluated.parent) not in card.content  # no local paths


def test_card_of_run_without_evaluation(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.eval_results is None and card.data.metrics is None
    assert "has not been evaluated" in card.text and "## Training" in card.text


def test_training_writes_card_without_loading_model(run_training, tmp_path, monkeypatch):
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    run_training(tmp_path / "run", "--max_train_steps", "4")
    monkeypatch.undo()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "## Training" in card
    assert write_card(tmp_path / "run").read_text() == card  # equal to the card from the files


@pytest.mark.parametrize("change", ["weights", "scheduler"])
def test_card_ignores_files_about_other_weights(copied, change):
    pipe = DDPMPipeline.from_pretrained(copied)
    if change == "weights":
        pipe.unet.conv_out.bias.data += 1
    else:
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.save_pretrained(copied)
    card = ModelCard.load(write_card(copied))
    assert card.data.eval_results is None and card.data.license is None and card.data.datasets is None
    assert "has not been evaluated" in card.text and "## Training" not in card.text and ".png" not in card.text


def without_results(folder):
    (folder / "results.json").unlink()


def other_results(folder):
    results = json.loads((folder / "results.json").read_text())
    results["model"]["checksum"] = "0" * 64
    (folder / "results.json").write_text(json.dumps(results))


def other_export(folder):
    (folder / "export.json").write_text(json.dumps({"step": 4, "images": 32, "checksum": "0" * 64}))


@pytest.mark.parametrize(
    ("make_stale", "figures", "training"),
    [
        (without_results, False, True),
        (other_results, False, True),
        (other_export, True, False),
        (lambda folder: (folder / "export.json").unlink(), True, False),
    ],
    ids=["no results", "other results", "other export", "no export"],
)
def test_stale_source_files_are_ignored(copied, make_stale, figures, training):
    make_stale(copied)
    card = ModelCard.load(write_card(copied))
    assert (card.data.eval_results is not None) == ("results_nearest.png" in card.text) == figures
    for part in ("## Training", "(samples.png)", "(loss.png)"):
        assert (part in card.text) == training
    assert (card.data.license is not None) == training


def test_metrics_after_exported_step_are_ignored(copied):
    before, curve = write_card(copied).read_text(), (copied / "loss.png").read_bytes()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    later = json.loads(lines[-1]) | {"step": 6, "images": 48, "loss": 1000.0}
    (copied / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(later)]) + "\n")
    assert write_card(copied).read_text() == before and "4, batch size 8: 32 images seen" in before
    assert (copied / "loss.png").read_bytes() == curve


def rewrite(folder, name, read, write, **changes):
    (folder / name).write_text(write(read((folder / name).read_text()) | changes))


def test_card_shows_weight_decay(copied):
    assert "| optimizer | Adam, gradient" in write_card(copied).read_text()
    rewrite(copied, "config.yaml", yaml.safe_load, yaml.safe_dump, weight_decay=0.01)
    assert "| optimizer | AdamW, weight decay 0.01, gradient" in write_card(copied).read_text()


@pytest.mark.parametrize("is_hub_id", [True, False])
def test_only_recorded_hub_ids_keep_their_namespace(copied, is_hub_id):
    names = {"dataset": "acme/faces", "init_from": "acme/model"}
    rewrite(copied, "config.yaml", yaml.safe_load, yaml.safe_dump, **names)
    ids = {"hub_ids": list(names.values()) if is_hub_id else []}
    rewrite(copied, "export.json", json.loads, json.dumps, **ids)
    results = json.loads((copied / "results.json").read_text())
    for metric in ("fd", "nll"):
        results[metric]["made_by"] |= {"dataset": {"name": "acme/faces", "split": "test"}, **ids}
    results["fd"]["made_by"]["extractor"]["name"] = "acme/model"
    (copied / "results.json").write_text(json.dumps(results))
    card = ModelCard.load(write_card(copied))
    assert card.data.datasets == (["acme/faces"] if is_hub_id else None)
    listed = {result.metric_type: result for result in card.data.eval_results}
    assert listed["bits_per_dim"].dataset_name == ("acme/faces" if is_hub_id else "faces")
    assert listed["frechet_distance"].metric_args["extractor"] == ("acme/model" if is_hub_id else "model")
    assert ("acme" in card.content) == is_hub_id


def test_card_of_pipeline_without_run(tmp_path):
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET | {"out_channels": 2}), DDPMScheduler(variance_type="learned"))
    pipe.save_pretrained(tmp_path)
    text = write_card(tmp_path, model_id="org/name").read_text()
    assert 'from_pretrained("org/name")' in text
    assert "hf_ddpm: `diffusers.DDPMPipeline` does not support a learned variance" in text
    assert "## Training" not in text and ".png" not in text and "None" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta_schedule": "quad"}, "custom, T = 1000, betas from 0.0001 to 0.02"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "to 1, zero terminal SNR"),
        ({"prediction_type": "mean"}, "`diffusers.DDPMPipeline` does not support predictions of the mean"),
    ],
)
def test_card_describes_scheduler(tmp_path, options, expected):
    DDPMPipeline(UNet2DModel(**TINY_UNET), DDPMScheduler(**options)).save_pretrained(tmp_path)
    assert expected in write_card(tmp_path).read_text()


def test_picture_without_results_is_not_shown(copied):
    results = json.loads((copied / "results.json").read_text())
    del results["memorization"]
    (copied / "results.json").write_text(json.dumps(results))
    assert "results_nearest.png" not in write_card(copied).read_text()


def test_card_code_uses_class_names(tmp_path):
    unet = UNet2DModel(**TINY_UNET | {"num_class_embeds": 3})
    DDPMPipeline(unet, DDPMScheduler(), {"0": "cat", "1": "dog"}).save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert (
        'pipe(batch_size=2, class_labels=["cat", "dog"], guidance_scale=2.0)' in text and "diffusers import" not in text
    )
    assert "| classes | cat, dog |" in text


def code_blocks(text):
    return [token.content for token in parse(text) if token.type == "fence" and token.info == "python"]


VARIANTS = {
    "default": ({}, {}, None),
    "other steps": ({}, {"num_train_timesteps": 40}, None),
    "range": ({"out_channels": 2}, {"variance_type": "learned_range"}, None),
    "velocity": ({}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, None),
    "not square": ({"sample_size": (8, 16)}, {"beta_schedule": "quad", "timestep_spacing": "trailing"}, None),
    "RGBA": ({"in_channels": 4, "out_channels": 4}, {}, None),
    "learned": ({"out_channels": 2}, {"variance_type": "learned"}, "does not support a learned variance"),
    "mean": ({}, {"prediction_type": "mean"}, "does not support predictions of the mean"),
    "two channels": ({"in_channels": 2, "out_channels": 2}, {}, None),
    "classes": ({"num_class_embeds": 3}, {}, "does not support class labels"),
    "one class": ({"num_class_embeds": 1}, {}, "does not support class labels"),
}


def execute_card(folder):
    """Run all code blocks of a card in order; return the pipelines and the text."""
    text = write_card(folder, model_id=str(folder)).read_text()
    pipes, names = [], {}
    for block in code_blocks(text):
        exec(compile(block, "card", "exec"), names)
        pipes.append(names["pipe"])
    return pipes, text


@pytest.mark.parametrize(("unet", "scheduler", "obstacle"), VARIANTS.values(), ids=VARIANTS)
def test_card_code_runs_and_shows_diffusers_if_it_gives_equal_images(tmp_path, monkeypatch, unet, scheduler, obstacle):
    called = {}
    torch.manual_seed(0)
    steps = scheduler.get("num_train_timesteps", 1000)
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET | unet), DDPMScheduler(**scheduler))
    pipe.save_pretrained(tmp_path)
    for kind in (DDPMPipeline, diffusers.DDPMPipeline):  # 1000 steps would be slow
        monkeypatch.setattr(kind, "__call__", record_call(called, kind, kind.__call__))
    pipes, text = execute_card(tmp_path)
    assert [type(pipe) for pipe in pipes] == ([] if obstacle else [diffusers.DDPMPipeline]) + [DDPMPipeline]
    assert (obstacle or "With diffusers") in text
    monkeypatch.undo()
    if obstacle is None:
        given = called[diffusers.DDPMPipeline].get("num_inference_steps", 1000)
        assert given == steps  # all steps, as in this package
        images = [
            pipe(1, torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np").images
            for pipe in map(quiet, pipes)
        ]
        assert abs(images[0] - images[1]).max() < 1e-3


def record_call(called, kind, whole):
    """Return a pipeline call that takes 20 steps and records its arguments."""

    def call(self, *args, **options):
        called[kind] = options
        return whole(self, *args, **options | {"num_inference_steps": 20})

    return call


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_card_of_another_scheduler_requires_this_package(tmp_path):
    DDPMPipeline(UNet2DModel(**TINY_UNET), DDIMScheduler()).save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert "does not support the DDIMScheduler of this model" in text and len(code_blocks(text)) == 1


@pytest.mark.parametrize("name", ["cat", "😀", "猫", "it's", 'a "b"', "a\u2028b", "\\"])
def test_card_code_samples_classes_by_name_with_guidance(tmp_path, monkeypatch, name):
    unet = UNet2DModel(**TINY_UNET | {"num_class_embeds": 3})  # two classes and the null class
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=2), {"0": name, "1": "dog"}).save_pretrained(tmp_path)
    called = {}
    monkeypatch.setattr(DDPMPipeline, "__call__", record_call(called, "ours", lambda pipe, **_: pipe))
    monkeypatch.setattr(DDPMPipeline, "images", [], raising=False)
    execute_card(tmp_path)
    assert called["ours"] == {"batch_size": 2, "class_labels": [name, "dog"], "guidance_scale": 2.0}


@pytest.mark.slow
def test_card_lists_other_weights_and_how_to_load_them(copied):
    average = DDPMPipeline.from_pretrained(copied)
    average.unet.conv_out.bias.data += 1
    for name in ("ema-0.5", "best"):
        average.save_pretrained(copied / name)
    pipes, text = execute_card(copied)
    assert "other weights of the same run: `ema-0.5/`, `best/`" in text
    assert torch.equal(pipes[-1].unet.conv_out.bias, average.unet.conv_out.bias)


def test_committed_card_matches_template():
    card = (ROOT / "model_cards" / "ddpm-digits.md").read_text()
    template = TEMPLATE.read_text()
    always = re.sub(
        r"{% if (obstacle|num_classes|other_weights|stages).*?{% e(lse|ndif) -?%}", "", template, flags=re.DOTALL
    )
    lines = [line for line in always.splitlines() if len(line.split()) > 4 and not re.search(r"[{}]", line)]
    card = card.replace("(ddpm-digits/", "(")
    assert [line for line in lines if line not in card] == ["The model has not been evaluated."]
    assert len(lines) > 8


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_weights_are_those_of_their_results(folder):
    pipe = load_pipeline(str(folder), "cpu")
    assert pipe.unet.dtype == torch.float32 and pipe.class_names[0] == "airplane"
    results = json.loads((folder / "results.json").read_text())
    assert results["model"]["checksum"] == model_checksum(pipe)
    stock = diffusers.UNet2DModel.from_pretrained(folder / "unet")  # the stock pipeline takes no classes
    x, t, c = torch.randn(1, 3, 32, 32, generator=torch.manual_seed(0)), torch.tensor([500]), torch.tensor([3])
    with torch.no_grad():
        torch.testing.assert_close(stock(x, t, c).sample, pipe.unet(x, t, c).sample, rtol=1e-4, atol=1e-5)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 10e6
    texts = [file.read_text() for file in files if file.suffix in {".json", ".yaml", ".jsonl"}]
    assert not any(re.search(r"[ \"]/", text) for text in texts)  # no paths of the machine they were made on


def test_committed_card_contains_results_of_weights():
    folder = COMMITTED[0]
    data = ModelCard.load(ROOT / "model_cards" / f"{folder.name}.md").data
    measured = {row.type: row.value for row in rows(json.loads((folder / "results.json").read_text()))}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == measured


def test_card_written_by_person_is_kept(copied):
    (copied / "README.md").write_bytes(b"mine \xff")
    assert write_card(copied).read_bytes() == b"mine \xff"


@pytest.mark.parametrize("mark", [MARK, FORMER_MARK])
def test_generated_card_is_updated_until_its_mark_is_deleted(copied, mark):
    (copied / "README.md").write_text(f"{mark}\nold")
    text = write_card(copied).read_text()
    assert MARK in text and FORMER_MARK not in text and "old" not in text.splitlines()
    (copied / "README.md").write_text(text.replace(MARK, "mine"))
    assert "mine" in write_card(copied).read_text()


def test_truncated_metrics_line_is_ignored(copied):
    before = write_card(copied).read_text()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert write_card(copied).read_text() == before


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "status.json"])
def test_error_names_damaged_file(copied, name):
    (copied / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name}: cannot be read: ") as caught:
        write_card(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_escaped_in_card(copied, name):
    unet = UNet2DModel(**TINY_UNET | {"num_class_embeds": 3})
    pipe = DDPMPipeline(unet, DDPMScheduler(), {"0": name, "1": "dog"})
    pipe.save_pretrained(copied)
    checksum = model_checksum(pipe)
    rewrite(copied, "export.json", json.loads, json.dumps, checksum=checksum, hub_ids=[])
    rewrite(
        copied, "config.yaml", yaml.safe_load, yaml.safe_dump, dataset=name, init_from=name, split=name, license=name
    )
    results = json.loads((copied / "results.json").read_text())
    results["model"]["checksum"] = checksum
    results["fd"]["made_by"]["dataset"] |= {"name": name, "reference_split": name}
    results["fd"]["made_by"]["extractor"]["name"] = name
    (copied / "results.json").write_text(json.dumps(results))
    card = ModelCard.load(write_card(copied, model_id=f"org/{name}"))
    public, displayed = strip_local_path(name), plain(name)
    rows = {row[0]: row[1:] for row in cells(card.text) if row}
    assert rows["classes"] == [f"{displayed}, dog"]
    assert rows["data"][0].startswith(f"{plain(public)}, split {displayed}, ")
    assert rows["started from"] == [plain(public)]
    assert rows["Frechet distance"][3] == f"{plain(public)}, {displayed}" and len(rows["Frechet distance"]) == 5
    headings = [token.tag for token in parse(card.text) if token.type == "heading_open"]
    assert headings == ["h1", *["h2"] * 6]  # Use, Model, Training, Evaluation, Limits, Citation
    assert not [token for token in parse(card.text) if token.type == "html_block"][1:]  # only the mark
    # The YAML metadata contain the same names.
    assert card.data.license == displayed and card.data.model_name == plain(f"org/{name}".split("/")[-1])
    fd = next(result for result in card.data.eval_results if result.metric_type == "frechet_distance")
    assert (fd.dataset_name, fd.dataset_split) == (plain(public), displayed)
    assert fd.metric_args["extractor"] == plain(public)
    # The code is valid Python and contains the names of the class and the model.
    block = next(token.content for token in parse(card.text) if token.type == "fence" and token.info == "python")
    strings = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert f"org/{name}" in strings and name in strings


def test_card_shows_precision_of_bound_computed_in_bf16(copied):
    results = json.loads((copied / "results.json").read_text())
    for precision, text in (("no", ""), ("bf16", ", precision bf16")):
        results["nll"]["made_by"]["mixed_precision"] = precision
        (copied / "results.json").write_text(json.dumps(results))
        card = ModelCard.load(write_card(copied))
        assert f"2 terms per image, seed 0{text}; " in card.text
        bound = next(result for result in card.data.eval_results if result.metric_type == "bits_per_dim")
        assert bound.metric_args.get("mixed_precision", "no") == precision


def test_card_from_files_of_older_version_or_with_odd_entries(copied, caplog):
    options = yaml.safe_load((copied / "config.yaml").read_text())
    for name in ("ema_warmup", "horizontal_flip", "init_from"):
        options.pop(name)
    (copied / "config.yaml").write_text(yaml.safe_dump({**options, "of_another_version": 3}))
    with (copied / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe\n{"step": 4}\n{"step": "4", "loss": 1, "images": 3}\n{"step": 4, "images": 3, "loss": null}\n'
        )
    results = json.loads((copied / "results.json").read_text())
    del results["fd"]["made_by"]
    (copied / "results.json").write_text(json.dumps({**results, "kid": 3, "is": None, "note": ["x"]}))
    text = write_card(copied).read_text()
    assert set(evaluation_table(text)) == {"precision", "recall", "bound on the NLL, bits/dim (estimate)",
                                               "share of exact copies of training images"}  # fmt: skip
    assert all(f"skipped {metric}, its entry is damaged" in caplog.text for metric in ("fd", "kid", "is"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("config.yaml", "learning_rate", "much"), ("status.json", "images", "many"), ("export.json", "step", None)],
)
def test_error_names_key_of_wrong_type_and_its_file(copied, name, key, value):
    read = yaml.safe_load if name.endswith("yaml") else json.loads
    (copied / name).write_text(json.dumps({**read((copied / name).read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"{name}: {key}={value!r}: expected"):
        write_card(copied)
