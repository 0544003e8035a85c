import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModel

import hf_ddpm.evaluation.evaluate
import hf_ddpm.evaluation.extraction
from hf_ddpm import DDPMPipeline
from hf_ddpm.config import DataConfig
from hf_ddpm.data.sources import choose
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.evaluation.options import EvaluateConfig
from hf_ddpm.hub.figures import rows
from hf_ddpm.sampling.folder import SampleFolder
from tests.conftest import load_script
from tests.evaluation.processors import BitProcessor

ROOT = Path(__file__).parents[2]
ALL = "fid,kid,is,pr"


@pytest.fixture(scope="module")
def main():
    return load_script("evaluate").main


@pytest.fixture(scope="module")
def words(trained):
    return ["--model", str(trained), "--dataset", "digits", "--num_inference_steps", "2"]


def run(main, output, *words):
    assert main([*words, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def metrics_of(results):
    return {
        name: {key: value for key, value in entry.items() if key != "made_by"}
        for name, entry in results.items()
        if isinstance(entry, dict) and "made_by" in entry
    }


@pytest.fixture(scope="module")
def evaluated(main, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    run(main, folder / "results.json", *words, "--metrics", ALL, "--num_images", "40")
    return folder


def test_each_metric_is_saved_when_computed(main, words, tmp_path, monkeypatch):
    def breaks(metric, *sets, compute=hf_ddpm.evaluation.evaluate.compute_metric):
        if metric == "kid":
            raise OSError("no space left")
        return compute(metric, *sets)

    monkeypatch.setattr(hf_ddpm.evaluation.evaluate, "compute_metric", breaks)
    output = tmp_path / "not" / "yet" / "there" / "results.json"
    with pytest.raises(OSError, match="no space left"):
        main([*words, "--metrics", "fd,kid", "--num_images", "4", "--output", str(output)])
    assert set(json.loads(output.read_text())) == {"model", "fd"}


def test_saved_results_match_direct_computation(evaluated, trained):
    results = json.loads((evaluated / "results.json").read_text())
    (samples,) = (evaluated / "results_samples").iterdir()
    images = SampleFolder.read(samples)[torch.arange(40)]
    train = load_images(DataConfig("digits", split="train", resolution=[8], channels=1))[torch.arange(898)]
    extractor = load_extractor("digits")
    distance = frechet_distance(Moments.of(extractor(images).features), Moments.of(extractor(train).features))
    fd = results["fd"]
    assert fd["value"] == pytest.approx(distance, rel=1e-5)
    assert fd["num_images"] == 40 and fd["reference_images"] == 898 and 0 < fd["floor"] < fd["value"]
    made = fd["made_by"]
    assert made["extractor"] == {"name": "digits", "checksum": extractor.checksum}
    assert made["sampling"]["num_inference_steps"] == 2 and made["sampling"]["scheduler"] == "ddpm"
    assert made["dataset"]["reference_split"] == "train" and made["dataset"]["held_out_split"] == "test"
    assert results["model"]["name"] == str(trained) and len(results["model"]["checksum"]) == 64
    assert results["kid"]["floor"] < results["kid"]["value"] and 1 <= results["is"]["value"] <= 10
    assert 0 <= results["pr"]["recall"] < results["pr"]["held_out_recall"] <= 1
    assert results["memorization"]["exact_copies"] == 0
    with Image.open(evaluated / "results_nearest.png") as picture:
        assert picture.size == (4 * 70 + 6, 20 + 8 * 70 + 6)  # with a line of labels and gaps of 6 pixels


def test_floor_compares_held_out_and_reference_images(evaluated):
    train = load_images(DataConfig("digits", split="train", resolution=[8], channels=1))[torch.arange(898)]
    test = load_images(DataConfig("digits", split="test", resolution=[8], channels=1))[torch.arange(899)]
    extractor = load_extractor("digits")
    reference = Moments.of(extractor(train).features)
    drawn = torch.tensor(choose(899, 40, 0))  # drawn at random, because datasets may be sorted
    expected = frechet_distance(Moments.of(extractor(test[drawn]).features), reference)
    floor = json.loads((evaluated / "results.json").read_text())["fd"]["floor"]
    assert floor == pytest.approx(expected, rel=1e-5)


def test_results_do_not_depend_on_batch_size_or_interruptions(main, words, evaluated, tmp_path):
    output = tmp_path / "results.json"
    results = run(main, output, *words, "--metrics", ALL, "--num_images", "40", "--batch_size", "7")
    expected = metrics_of(json.loads((evaluated / "results.json").read_text()))
    assert metrics_of(results) == expected
    (samples,) = (tmp_path / "results_samples").iterdir()
    (samples / "shards" / "000000.npy").write_bytes(b"half of")
    shutil.rmtree(hf_ddpm.evaluation.extraction.CACHE)
    assert metrics_of(run(main, output, *words, "--metrics", ALL, "--num_images", "40")) == expected


def test_existing_metrics_are_kept_for_the_same_model(main, words, evaluated, trained, tmp_path, capsys):
    output = tmp_path / "results.json"
    shutil.copytree(evaluated / "results_samples", tmp_path / "results_samples")
    first = run(main, output, *words, "--metrics", "is", "--num_images", "40")
    assert "fd" not in first
    both = run(main, output, *words, "--metrics", "nll,fd", "--num_images", "4", "--steps_per_image", "2")
    assert both["is"] == first["is"] and both["fd"]["num_images"] == 4 and both["nll"]["num_images"] == 4
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.unet.conv_out.bias.data += 0.1
    pipe.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    words = ["--model", str(tmp_path / "other"), *words[2:]]
    other = run(main, output, *words, "--metrics", "fd", "--num_images", "4")
    assert (
        "is" not in other and "nll" not in other and "replaced the results of another model" in capsys.readouterr().out
    )


def test_existing_samples_are_evaluated(main, words, evaluated, trained, tmp_path):
    expected = metrics_of(json.loads((evaluated / "results.json").read_text()))
    load_script("sample").main([*words[:2], *words[4:], "--num_images", "45", "--output", str(tmp_path / "out")])
    common = ["--dataset", "digits", "--metrics", ALL, "--num_images", "40"]
    from_shards = run(main, tmp_path / "a.json", *common, "--samples", str(tmp_path / "out"))
    assert metrics_of(from_shards) == expected
    assert from_shards["model"] == json.loads((evaluated / "results.json").read_text())["model"]
    (tmp_path / "pictures").mkdir()
    for path in (tmp_path / "out").glob("*.png"):
        shutil.copy(path, tmp_path / "pictures")
    from_pictures = run(main, tmp_path / "b.json", *common, "--samples", str(tmp_path / "pictures"))
    assert metrics_of(from_pictures) == expected and from_pictures["fd"]["made_by"]["sampling"] is None
    every = run(main, tmp_path / "c.json", *common[:4], "--samples", str(tmp_path / "out"))
    assert every["fd"]["num_images"] == 45


def test_sample_arrays_and_folders_give_equal_metrics(main, words, evaluated, tmp_path):
    expected = metrics_of(json.loads((evaluated / "results.json").read_text()))
    out = tmp_path / "out"
    load_script("sample").main([*words[:2], *words[4:], "--num_images", "40", "--format", "npz", "--output", str(out)])
    for name in ("only", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(out / "samples.npz", tmp_path / "only")
    images = np.load(out / "samples.npz")["arr_0"]
    np.savez_compressed(tmp_path / "other" / "samples_40x8x8x1.npz", labels=np.arange(40), images=images)
    np.save(tmp_path / "a.npy", images)
    common = ["--dataset", "digits", "--metrics", ALL, "--num_images", "40", "--samples"]
    for samples in (out, out / "samples.npz", tmp_path / "only", tmp_path / "other", tmp_path / "a.npy"):
        assert metrics_of(run(main, tmp_path / f"{samples.name}.json", *common, str(samples))) == expected


def test_arrays_of_other_types_or_shapes_are_rejected_as_samples(main, tmp_path):
    common = ["--dataset", "digits", "--metrics", "fd", "--output", str(tmp_path / "r.json"), "--samples"]
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 1), np.float32))
    with pytest.raises(ValueError, match=r"a\.npz: float32 of shape \(4, 8, 8, 1\); expected uint8"):
        main([*common, str(tmp_path / "a.npz")])
    np.savez(tmp_path / "a.npz", np.zeros((4, 8), np.uint8))
    with pytest.raises(ValueError, match="a.npz: cannot be read as an array of images: no array has 4 dimensions"):
        main([*common, str(tmp_path / "a.npz")])
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(ValueError, match="a.npz: cannot be read as an array of images: File is not a zip file"):
        main([*common, str(tmp_path / "a.npz")])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="a.txt.*: .*a folder, or a .npz or .npy file"):
        main([*common, str(tmp_path / "a.txt")])
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 6), np.uint8))
    with pytest.raises(ValueError, match="images with 6 channels; expected 1, or metric nll, which takes any number"):
        main([*common, str(tmp_path / "a.npz")])


def test_saved_statistics_replace_the_reference_split(main, words, evaluated, tmp_path):
    expected = json.loads((evaluated / "results.json").read_text())["fd"]
    (samples,) = (evaluated / "results_samples").iterdir()
    stats, common = str(tmp_path / "stats.npz"), ["--samples", str(samples), "--metrics", "fd", "--num_images", "40"]
    saved = run(main, tmp_path / "a.json", *common, "--dataset", "digits", "--save_reference_stats", stats)["fd"]
    assert saved["value"] == expected["value"]
    train = load_images(DataConfig("digits", split="train", resolution=[8], channels=1))[torch.arange(898)]
    features = load_extractor("digits")(train).features.double().numpy()
    arrays = np.load(stats)
    np.testing.assert_allclose(arrays["mu"], features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(arrays["sigma"], np.cov(features, rowvar=False), atol=1e-6)
    alone = run(main, tmp_path / "b.json", *common, "--extractor", "digits", "--reference_stats", stats)
    assert alone["fd"]["value"] == pytest.approx(expected["value"], rel=1e-9) and "floor" not in alone["fd"]
    checksum = hashlib.sha256((tmp_path / "stats.npz").read_bytes()).hexdigest()
    assert alone["fd"]["made_by"]["reference_stats"] == {"name": "stats.npz", "sha256": checksum}
    assert "memorization" not in alone
    (row,) = rows(alone)
    assert (row.data, row.split) == ("stats.npz", None)
    combined = run(main, tmp_path / "c.json", *common, "--dataset", "digits", "--reference_stats", stats)["fd"]
    assert combined["floor"] == pytest.approx(expected["floor"], rel=1e-9)
    assert combined["value"] == pytest.approx(expected["value"], rel=1e-9)


def test_invalid_reference_statistics_are_rejected(main, words, evaluated, tmp_path):
    (samples,) = (evaluated / "results_samples").iterdir()
    path, output = tmp_path / "s.npz", ["--output", str(tmp_path / "r.json")]
    common = ["--samples", str(samples), "--extractor", "digits", "--reference_stats", str(path), *output, "--metrics"]
    eye = np.eye(64)
    for arrays, message in [
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "s.npz: 3 dimensions, but features of extractor 'digits' have 64"),
        ({"mu": np.zeros(64)}, "s.npz: array is missing .*sigma"),
        ({"mu": np.zeros(64), "sigma": np.eye(3)}, r"mu \(64,\) and sigma \(3, 3\); expected shapes"),
        ({"mu": np.full(64, np.nan), "sigma": eye}, "expected finite values of mu and sigma"),
        ({"mu": np.zeros(64), "sigma": np.triu(np.ones((64, 64)))}, "expected a covariance matrix sigma"),
        ({"mu": np.zeros(64), "sigma": eye.astype(int)}, "float64 and int64; expected floats"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            main([*common, "fd"])
    np.savez(path, mu=np.zeros(64), sigma=eye)
    for metric in ("kid", "pr"):
        with pytest.raises(ValueError, match=f"metrics.*{metric}.*: needs real images; expected --dataset"):
            main([*common, f"fd,{metric}"])
    with pytest.raises(ValueError, match="^--dataset is missing: expected --dataset NAME"):
        main(["--samples", str(samples), "--metrics", "fd", *output])
    with pytest.raises(ValueError, match="^--num_images is missing: expected the number of images to sample"):
        main([*words[:2], *common[2:], "fd"])
    assert not (tmp_path / "r.json").exists()


def test_copies_of_training_images_are_detected(main, tmp_path):
    images = load_images(DataConfig("digits", split="train", resolution=[8], channels=1))[torch.arange(50)]
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number:05d}.png")
    common = ["--dataset", "digits", "--metrics", "fd", "--samples", str(tmp_path)]
    results = run(main, tmp_path / "results.json", *common)
    assert results["memorization"]["exact_copies"] == 1 and results["fd"]["num_images"] == 50
    sheet = np.asarray(Image.open(tmp_path / "results_nearest.png"))
    np.testing.assert_array_equal(sheet[26:, 6:70], sheet[26:, 76:140])


def test_any_number_of_images_is_allowed_without_floor(main, words, tmp_path):
    results = run(
        main, tmp_path / "r.json", *words, "--metrics", "fd", "--num_images", "901", "--floor", "false",
        "--num_inference_steps", "1", "--batch_size", "256",
    )  # fmt: skip
    assert results["fd"]["num_images"] == 901 and "floor" not in results["fd"]
    few = ["--metrics", "fd,nll", "--num_images", "4", "--steps_per_image", "2", "--floor", "false"]
    assert "floor" not in run(main, tmp_path / "r.json", *words, *few)["fd"]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    AutoModel.from_config(AutoConfig.for_model("dinov2", mlp_ratio=2, **small)).save_pretrained(folder)
    BitProcessor(size={"height": 28, "width": 28}, do_center_crop=False).save_pretrained(folder)
    return str(folder)


def test_any_image_model_can_extract_features(main, words, dinov2, tmp_path):
    results = run(main, tmp_path / "r.json", *words, "--metrics", "fd,pr", "--num_images", "8", "--extractor", dinov2)
    assert results["fd"]["made_by"]["extractor"]["name"] == dinov2 and results["fd"]["value"] > 0
    with pytest.raises(
        ValueError, match="^--metrics is: extractor .* has no classes; expected extractor digits or inception"
    ):
        main([*words, "--metrics", "is", "--extractor", dinov2, "--output", str(tmp_path / "r.json")])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--metrics fd,fvd", "metrics.*fvd.*: .*any of fd, kid, is, pr, nll, separated by commas"),
        ("--metrics fd,", "metrics.*: .*any of fd, kid"),
        ("--extractor no/such/model", r"extractor 'no/such/model': cannot be loaded \(.*; expected digits, inception"),
        ("--extractor digits --extractor_weights x", "extractor_weights.*x.*: does not apply to extractor 'digits'"),
        (
            "--num_images 900",
            "num_images.900.*: .*at most the 899 images in split 'test' of 'digits', or --floor false",
        ),
        ("--num_images 1 --metrics fd", "num_images.1.*: .*at least 2 for fd"),
        ("--num_images 1 --metrics kid", "num_images.1.*: .*at least 2 for kid"),
        ("--num_images 3 --metrics is,pr", "num_images.3.*: .*at least 4 for pr"),
        ("--num_images 0", "num_images.0.*: .*at least 1"),
        ("--batch_size 0", "batch_size.0.*: .*at least 1"),
        ("--levels 300", "levels.300.*: .*2 to 256 for metrics of generated images"),
        ("--split dev", "--dataset digits: no split 'dev'"),
        ("--reference_split dev", "--dataset digits: no split 'dev'"),
        ("--samples nowhere", "samples.*nowhere.*: does not exist; expected a folder, or a .npz or .npy file"),
        ("--samples .", "--samples .: folder contains no samples; expected shards"),
        ("--num_inference_steps 2000", "num_inference_steps"),
        ("--scheduler ddpm --eta 1", "--eta 1.0: expected 0 with --scheduler ddpm"),
        ("--output .", "output.*: is a folder; expected a file"),
    ],
)
def test_invalid_evaluate_options_are_one_line(main, words, tmp_path, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    output = ["--metrics", "fd", "--num_images", "4", "--output", "results.json"]
    with pytest.raises(ValueError, match=message) as caught:
        main([*words, *output, *wrong.split()])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results.json").exists()


def test_samples_of_another_format_or_model_are_rejected(main, words, trained, evaluated, tmp_path):
    output = ["--output", str(tmp_path / "r.json")]
    common = ["--dataset", "digits", "--metrics", "fd", "--samples", str(tmp_path), *output]
    with pytest.raises(ValueError, match="^--model is missing: expected --model or --samples"):
        main([*common[:2], *output])
    with pytest.raises(
        ValueError, match=r"^--metrics nll \(default\): needs --model; with --samples, expected fd, kid, is or pr$"
    ):
        main([*common[:2], "--samples", str(tmp_path), *output])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="extractor 'digits': images with 3 channels; expected 1"):
        main(common)
    with pytest.raises(
        ValueError, match=r"--samples .*: images of shape \(3, 8, 8\); expected \(1, 8, 8\), like the model"
    ):
        main([*common, "--model", str(trained)])
    Image.new("L", (8, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="extractor 'digits': images of 9x8 pixels; expected 8x8"):
        main(common)
    for name in "abcd":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    Image.new("L", (9, 8)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"e.png: image has shape \(1, 8, 9\); expected \(1, 8, 8\)"):
        main(common)
    Image.new("L", (8, 8)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match="num_images.6.*: .*at most the 5 images of --samples "):
        main([*common, "--num_images", "6"])
    (tmp_path / "e.png").write_text("no picture")
    with pytest.raises(ValueError, match="e.png: not an image"):
        main(common)
    pipe = DDPMPipeline.from_pretrained(trained)
    pipe.unet.conv_out.bias.data += 0.1
    pipe.save_pretrained(tmp_path / "other")
    (samples,) = (evaluated / "results_samples").iterdir()
    with pytest.raises(ValueError, match="--samples .*: generated by another model, .*; expected samples of --model "):
        main([*common, "--samples", str(samples), "--model", str(tmp_path / "other")])
    assert not (tmp_path / "r.json").exists()


def test_output_file_of_another_format_is_rejected_and_kept(main, words, tmp_path):
    (tmp_path / "r.json").write_text("precious")
    with pytest.raises(ValueError, match="r.json: not a results file"):
        main([*words, "--metrics", "fd", "--output", str(tmp_path / "r.json")])
    assert (tmp_path / "r.json").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # the error is raised before sampling


@pytest.mark.slow
def test_two_processes_compute_the_same_metrics(main, words, evaluated, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    more = ["--metrics", f"{ALL},nll", "--num_images", "40", "--steps_per_image", "2"]
    command = [sys.executable, *launcher, str(ROOT / "scripts" / "evaluate.py"), *words, *more]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "r.json")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = metrics_of(json.loads((tmp_path / "r.json").read_text()))
    nll, alone = measured.pop("nll"), run(main, tmp_path / "one.json", *words, *more[:1], "nll", *more[2:])["nll"]
    assert nll["num_images"] == alone["num_images"] == 40
    assert nll["total_bpd"] == pytest.approx(alone["total_bpd"], rel=1e-6)
    assert measured == metrics_of(json.loads((evaluated / "results.json").read_text()))


def test_data_options_default_to_run_of_model(trained, tmp_path):
    """Dataset, levels, splits and extractor come from its config.yaml unless they are given."""
    config = EvaluateConfig(model=str(trained), metrics="fd")
    assert (config.dataset, config.levels, config.extractor) == ("digits", 17, "digits")
    assert (config.split, config.reference_split, config.floor) == ("test", "train", True)
    assert EvaluateConfig(model=str(trained), metrics="fd", split="train", floor=False).split == "train"
    run = tmp_path / "run"
    run.mkdir()
    options = yaml.safe_load((trained / "config.yaml").read_text()) | {"split": "test", "eval_split": "train"}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    config = EvaluateConfig(model=str(run), metrics="fd")
    assert (config.split, config.reference_split) == ("train", "test")
    config = EvaluateConfig(model=str(run), metrics="fd", dataset="other", extractor="digits")
    assert (config.dataset, config.split, config.reference_split, config.levels) == ("other", "test", "train", 256)
