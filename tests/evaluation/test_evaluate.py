import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.config import Config
from hf_ddpm.evaluation.evaluate import Reference, evaluate
from hf_ddpm.evaluation.options import EvaluateConfig, training_request
from hf_ddpm.evaluation.results import scalars
from hf_ddpm.models.precision import PRECISIONS, Choice
from hf_ddpm.pipelines.loading import load_pipeline
from hf_ddpm.sampling.options import Sampling
from tests.evaluation.pixels import Pixels

FEW = Sampling(num_inference_steps=2)


@pytest.fixture(scope="module")
def request_of(trained):
    def make(**options):
        return EvaluateConfig(model=str(trained), dataset="digits", **{"num_images": 6, **options})

    return make


def test_evaluate_from_options(request_of, tmp_path):
    config, entries = request_of(metrics="nll,pr,fd", steps_per_image=2, output=str(tmp_path / "r.json")), []
    results = evaluate(config, FEW, on_figures=entries.append)
    assert list(results) == ["nll", "pr", "fd", "memorization"]
    assert [list(entry) for entry in entries] == [[name] for name in results]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written.pop("model")["name"] == config.model and written == json.loads(json.dumps(results))
    assert (tmp_path / "r_nearest.png").exists()


def test_reference_is_loaded_once_for_many_models(request_of, trained, tmp_path, monkeypatch):
    config = request_of(metrics="fd,kid")
    pipe, other = (DDPMPipeline.from_pretrained(trained) for _ in range(2))
    other.unet.conv_out.bias.data += 0.1
    reference = Reference(config, pipe.image_shape, Accelerator(cpu=True))
    monkeypatch.setattr("hf_ddpm.evaluation.evaluate.load_images", lambda *args, **options: pytest.fail("loaded again"))
    monkeypatch.setattr("hf_ddpm.evaluation.evaluate.load_pipeline", lambda *args: pytest.fail("loaded again"))
    results = [
        evaluate(config, FEW, pipe=model, reference=reference, output=tmp_path / f"{i}.json")
        for i, model in enumerate((pipe, other, pipe))
    ]
    first, second, third = map(scalars, results)
    assert first == third and first["fd"]["value"] != second["fd"]["value"]
    assert first["fd"]["floor"] == second["fd"]["floor"]
    models = [json.loads((tmp_path / f"{i}.json").read_text())["model"]["checksum"] for i in range(3)]
    assert models[0] == models[2] != models[1]


def test_only_first_process_writes_results(request_of, trained, tmp_path):
    """Simulate the second of two processes; `gather` repeats its rows in place of those of the first."""
    state = Accelerator(cpu=True)
    pipe = DDPMPipeline.from_pretrained(trained)
    config = request_of(metrics="fd", floor=False)
    second = SimpleNamespace(
        process_index=1, num_processes=2, is_main_process=False, device=state.device,
        main_process_first=state.main_process_first, gather=lambda rows: torch.cat([rows, rows]),
    )  # fmt: skip
    reference = Reference(config, pipe.image_shape, second)
    output, images = tmp_path / "r.json", Pixels(6)
    images.path = tmp_path
    assert evaluate(config, FEW, pipe=pipe, images=images, reference=reference, output=output) == {}
    assert not output.exists()


def test_images_of_bound_are_distributed_over_processes(request_of, trained):
    config, pipe = request_of(metrics="nll", steps_per_image=3), DDPMPipeline.from_pretrained(trained)
    state = Accelerator(cpu=True)

    def bound(rank, world):
        process = SimpleNamespace(
            process_index=rank, num_processes=world, is_main_process=rank == 0, device=state.device,
            main_process_first=state.main_process_first, reduce=lambda value, reduction: value,
        )  # fmt: skip
        return Reference(config, pipe.image_shape, process).bound(pipe, 0)

    alone, parts = bound(0, 1), [bound(rank, 2) for rank in range(2)]
    assert [part["num_images"] for part in parts] == [3, 3]
    assert sum(part["total_bpd"] for part in parts) / 2 == pytest.approx(alone["total_bpd"], rel=1e-5)


def test_evaluation_of_run_uses_its_background_for_real_images(tmp_path):
    for split in ("train", "test"):
        for i in range(2):
            (tmp_path / split).mkdir(exist_ok=True)
            Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / split / f"{i}.png")
    dataset = {"dataset": str(tmp_path), "output_dir": str(tmp_path / "run"), "eval_metrics": "nll", "resolution": 8}
    network = {"block_out_channels": [32], "attention_resolutions": 0}
    for background, color in ((None, [255, 127, 127]), ("white", [255, 127, 127]), ("blue", [128, 0, 127])):
        request = training_request(Config.of(**dataset, **network, background=background))
        assert request.background == ("blue" if background == "blue" else None)  # white: as in older results
        images = Reference(request, (3, 8, 8), Accelerator(cpu=True)).held_out[torch.arange(2)]
        assert (images.float() - torch.tensor(color).view(3, 1, 1)).abs().max() <= 1


def test_samples_and_real_images_have_same_background(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * (i + 1))
        picture.save(tmp_path / "images" / f"{i}.png", transparency=0)
    paths = {"samples": str(tmp_path / "images"), "dataset": str(tmp_path / "images")}
    config = EvaluateConfig(metrics="fd", floor=False, extractor="digits", background="#404040", **paths)
    results = evaluate(config, output=tmp_path / "r.json")
    assert results["memorization"]["exact_copies"] == 1


@pytest.mark.parametrize(
    ("metrics", "prefix", "remedy"),
    [
        ("nll", "", "--split train"),
        ("nll", "eval_", "--eval_split train"),
        ("fd,kid", "", "--floor false"),
        ("fd,nll", "eval_", "--eval_split train --eval_floor false"),
    ],
)
def test_error_without_held_out_images_suggests_working_options(trained, tmp_path, metrics, prefix, remedy):
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / f"{i}.png")
    common = {"model": str(trained), "dataset": str(tmp_path), "extractor": "digits", "steps_per_image": 2}
    message = f"no split 'test'.*train; to evaluate without held-out images, add {remedy}$"
    with pytest.raises(ValueError, match=message):
        Reference(EvaluateConfig(prefix=prefix, metrics=metrics, **common), (1, 8, 8), Accelerator(cpu=True))
    arguments = remedy.replace(f"--{prefix}", "").split()
    arguments = {
        name: False if value == "false" else value for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    config = EvaluateConfig(prefix=prefix, metrics=metrics, output=str(tmp_path / "r.json"), **common, **arguments)
    results = evaluate(config, FEW)
    assert set(metrics.split(",")) <= set(results)
    if "nll" in metrics:
        assert results["nll"]["num_images"] == 6 and results["nll"]["made_by"]["dataset"]["split"] == "train"


def test_error_with_several_splits_lists_only_splits(trained):
    assert EvaluateConfig(metrics="fd,nll", floor=False, model="m", dataset="d").without_held_out("a") == "--split a"
    config = EvaluateConfig(model=str(trained), dataset="digits", split="dev")
    with pytest.raises(ValueError, match="no split 'dev'.*train, test$"):
        Reference(config, (1, 8, 8), Accelerator(cpu=True))


def test_skipped_images_are_counted(trained, tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no picture")
    options = {"floor": False, "extractor": "digits", "skip_bad_images": True}
    config = EvaluateConfig(model=str(trained), dataset=str(tmp_path), metrics="fd", num_images=2, **options)
    real = Reference(config, (1, 8, 8), Accelerator(cpu=True)).features()
    assert len(real.reference) == 3 and real.made_by["dataset"]["reference_skipped"] == 1


def record_dtypes(monkeypatch):
    """Return a list that collects the data types used by the networks of loaded pipelines."""
    types = []

    def load(model, device):
        pipe = load_pipeline(model, device)
        pipe.unet.conv_in.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
        return pipe

    monkeypatch.setattr("hf_ddpm.evaluation.evaluate.load_pipeline", load)
    return types


@pytest.mark.parametrize("metrics", ["fd,nll", "nll"])
def test_automatic_precision_is_used_for_images_but_not_for_bound(request_of, tmp_path, monkeypatch, metrics):
    choices, lines, types = [], [], record_dtypes(monkeypatch)
    monkeypatch.setattr("hf_ddpm.sampling.generate.choose_precision", lambda *args, **more: (
        choices.append(args), Choice("bf16", "precision bf16: chosen"))[1])  # fmt: skip
    config = request_of(metrics=metrics, steps_per_image=2, output=str(tmp_path / "r.json"))
    results = evaluate(config, FEW, log=lines.append)
    assert results["nll"]["made_by"]["mixed_precision"] == "no" and types[0] == torch.float32
    if metrics == "nll":
        assert choices == lines == [] and set(types) == {torch.float32}
        return
    assert len(choices) == 1 and lines == ["precision bf16: chosen"] and types[-1] == torch.bfloat16
    assert results["fd"]["made_by"]["sampling"]["mixed_precision"] == "bf16"
    assert "mixed_precision" not in results["fd"]["made_by"]  # this key is only for nll
    # The second evaluation reuses the images.
    del types[:]
    again = evaluate(request_of(metrics="fd", output=str(tmp_path / "r.json")), FEW, log=lines.append)
    assert types == [] and len(choices) == 1 and again["fd"]["value"] == results["fd"]["value"]
    assert lines[1].startswith("precision bf16, like the existing images in ")


def test_explicit_precision_is_also_used_for_bound(request_of, tmp_path, monkeypatch):
    types, bounds = record_dtypes(monkeypatch), {}
    for precision in ("no", "bf16"):
        config = request_of(metrics="nll", steps_per_image=2, output=str(tmp_path / f"{precision}.json"))
        (bounds[precision],) = evaluate(config, replace(FEW, mixed_precision=precision)).values()
        assert set(types) == {PRECISIONS[precision]}
        del types[:]
        written = json.loads((tmp_path / f"{precision}.json").read_text())["nll"]
        assert written["made_by"]["mixed_precision"] == precision
    exact, rounded = (bounds[precision]["total_bpd"] for precision in ("no", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.01) and rounded != exact
