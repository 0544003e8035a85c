import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.hub.card import write_card
from tests.conftest import TINY_UNET


@pytest.fixture(scope="module")
def evaluated(run_training, tmp_path_factory):
    """The folder of a run that was evaluated; not to be written to."""
    folder = tmp_path_factory.mktemp("evaluated") / "my-digits"
    words = ["--eval_metrics", "fd,kid,is,pr,nll", "--eval_num_images", "20", "--eval_inference_steps", "2"]
    run_training(folder, "--max_train_steps", "4", *words, "--eval_steps_per_image", "2", "--license", "cc-by-4.0")
    return folder


@pytest.fixture
def copied(evaluated, tmp_path):
    return shutil.copytree(evaluated, tmp_path / "my-digits", ignore=shutil.ignore_patterns("checkpoints"))


def numbers_of_the_table(text):
    cells = [line.split("|")[1:-1] for line in text.split("## Evaluation")[1].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in cells if "---" not in row[1]][1:]
    return {name: (value.split(" ± ")[0], floor, count) for name, value, floor, count, *_ in rows}


def test_every_number_of_a_card_is_one_of_the_results(evaluated):
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
    told = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in told.items()} == {k: v for k, (v, _) in expected.items()}
    table = numbers_of_the_table(card.text)
    for kind, (value, floor) in expected.items():
        shown = table[told[kind].metric_name]
        assert shown == (f"{value:.4g}", "" if floor is None else f"{floor:.4g}", "20")
    distance = told["frechet_distance"]
    assert distance.dataset_split == "train" and told["bits_per_dim"].dataset_split == "test"
    assert distance.metric_args["extractor_sha256"] == results["fd"]["made_by"]["extractor"]["checksum"]
    assert distance.metric_args["num_inference_steps"] == 2


def test_a_card_says_what_the_run_was(evaluated):
    card, config = ModelCard.load(evaluated / "README.md"), yaml.safe_load((evaluated / "config.yaml").read_text())
    status = json.loads((evaluated / "status.json").read_text())
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert f"4 of 8 images: {4 * 8} images seen" in card.text and status["hardware"] in card.text
    assert f"learning rate {config['learning_rate']:g}" in card.text
    parameters = sum(p.numel() for p in DDPMPipeline.from_pretrained(evaluated).unet.parameters())
    assert f"{parameters:,} parameters" in card.text
    for picture in re.findall(r"\]\((\w+\.png)\)", card.text):
        assert (evaluated / picture).exists()
    assert {"samples.png", "loss.png", "results_nearest.png"} <= set(re.findall(r"\w+\.png", card.text))
    assert str(evaluated.parent) not in card.content  # no path of this machine


def test_a_run_that_was_not_evaluated_has_a_card_without_figures(trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.eval_results is None and card.data.metrics is None
    assert "has not been evaluated" in card.text and "## Training" in card.text


def test_results_of_other_weights_are_not_told(copied):
    pipe = DDPMPipeline.from_pretrained(copied)
    pipe.unet.conv_out.bias.data += 1
    pipe.save_pretrained(copied)
    card = ModelCard.load(write_card(copied))
    assert card.data.eval_results is None and "has not been evaluated" in card.text


def test_a_pipeline_alone_has_a_card(tmp_path):
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET | {"out_channels": 2}), DDPMScheduler(variance_type="learned"))
    pipe.save_pretrained(tmp_path)
    text = write_card(tmp_path, model_id="org/name").read_text()
    assert 'from_pretrained("org/name")' in text and "Only hf_ddpm samples from it" in text
    assert "## Training" not in text and ".png" not in text and "None" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta_schedule": "quad"}, "given by its values, T = 1000, variances from 0.0001 to 0.02"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "to 1, no signal at the last step"),
        ({"prediction_type": "mean"}, "Only hf_ddpm samples from it"),
    ],
)
def test_a_card_tells_variants_apart(tmp_path, options, said):
    DDPMPipeline(UNet2DModel(**TINY_UNET), DDPMScheduler(**options)).save_pretrained(tmp_path)
    assert said in write_card(tmp_path).read_text()


def test_the_picture_of_other_samples_is_not_shown(copied):
    results = json.loads((copied / "results.json").read_text())
    del results["memorization"]
    (copied / "results.json").write_text(json.dumps(results))
    assert "results_nearest.png" not in write_card(copied).read_text()


def test_the_code_of_a_card_names_a_class(tmp_path):
    unet = UNet2DModel(**TINY_UNET | {"num_class_embeds": 3})
    DDPMPipeline(unet, DDPMScheduler(), {"0": "cat", "1": "dog"}).save_pretrained(tmp_path)
    text = write_card(tmp_path).read_text()
    assert 'pipe(class_labels=["cat"])' in text and "| classes | cat, dog |" in text


def test_a_card_that_a_person_wrote_stays(copied):
    (copied / "README.md").write_bytes(b"mine \xff")
    assert write_card(copied).read_bytes() == b"mine \xff"


def test_a_line_that_a_kill_has_cut_short_costs_no_card(copied):
    before = write_card(copied).read_text()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert write_card(copied).read_text() == before


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "status.json"])
def test_a_broken_file_is_named(copied, name):
    (copied / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} cannot be read") as caught:
        write_card(copied)
    assert "\n" not in str(caught.value)


def test_files_of_an_older_version_or_with_odd_entries_make_a_card(copied, caplog):
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
    assert set(numbers_of_the_table(text)) == {"precision", "recall", "bound on the NLL, bits/dim (estimate)",
                                               "share of exact copies of training images"}  # fmt: skip
    assert all(f"{metric} is left out" in caplog.text for metric in ("fd", "kid", "is"))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("config.yaml", "learning_rate", "much"), ("status.json", "images", "many"), ("export.json", "step", None)],
)
def test_a_wrong_type_is_named_with_its_file(copied, name, key, value):
    read = yaml.safe_load if name.endswith("yaml") else json.loads
    (copied / name).write_text(json.dumps({**read((copied / name).read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"{name}: {key}={value!r}: expected"):
        write_card(copied)
