import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import hf_ddpm
from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.paper.context import FigureContext
from hf_ddpm.paper.distillation import distillation
from hf_ddpm.paper.options import DistillationOptions
from hf_ddpm.sampling.options import Sampling
from tests.conftest import TINY_UNET
from tests.paper.conftest import T


@pytest.fixture(scope="module")
def distilled(model, tmp_path_factory):
    few = {"max_train_steps": 2, "train_batch_size": 8, "num_samples": 2, "start_steps": 5, "levels": 17}
    return hf_ddpm.distill(model, 5, tmp_path_factory.mktemp("figure") / "distilled", dataset="digits", **few)


def test_distances_equal_those_of_evaluation(context, distance, distilled):
    options = DistillationOptions(num_images=8, distilled=str(distilled), shown=3, steps=[5, T])
    distillation(context, options)
    figures = json.loads((context.folder / "distillation.json").read_text())
    rows = {row["model"]: {point["steps"]: point["value"] for point in row["points"]} for row in figures["rows"]}
    assert {name: list(points) for name, points in rows.items()} == {
        "teacher, ddpm": [5, T],
        "teacher, ddim": [5],
        "distilled": [5, 10],
    }
    for sampler in ("ddpm", "ddim"):
        expected = distance(8, Sampling(num_inference_steps=5, scheduler=sampler))["value"]
        assert rows[f"teacher, {sampler}"][5] == pytest.approx(expected, rel=1e-6)
    student = hf_ddpm.DDPMPipeline.from_pretrained(distilled / "5-steps")
    context.pipe.unet, context.pipe.scheduler = student.unet, student.scheduler
    assert rows["distilled"][5] == pytest.approx(distance(8, Sampling(num_inference_steps=5))["value"], rel=1e-6)
    best = min(value for name in ("teacher, ddpm", "teacher, ddim") for value in rows[name].values())
    assert figures["best_of_teacher"]["value"] == best
    assert figures["ratios"] == {str(n): value / best for n, value in rows["distilled"].items()}
    text = (context.folder / "distillation.md").read_text()
    assert "distillation.png" in text and "The distilled model reaches at most 1.5 times this distance with" in text
    assert np.asarray(Image.open(context.folder / "distillation-samples.png")).std() > 0
    assert (context.folder / "distillation.png").exists()


def test_distilled_must_be_folder_with_stages(context, tmp_path):
    with pytest.raises(ValueError, match="--distilled nowhere: expected an output folder of hf-ddpm distill"):
        DistillationOptions(distilled="nowhere")
    with pytest.raises(ValueError, match="--distilled .*: expected an output folder .* folders such as 8-steps"):
        distillation(context, DistillationOptions(distilled=str(tmp_path)))


def test_steps_out_of_range_are_rejected(context, distilled):
    for steps, message in (([0], "--steps 0: expected at least 1"), ([T + 1], f"--steps {T + 1}: expected 1 to {T}")):
        with pytest.raises(ValueError, match=message):
            distillation(context, DistillationOptions(distilled=str(distilled), steps=steps))


def test_built_in_guidance_is_not_applied_again(context, tmp_path, monkeypatch):
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=5e-3, beta_end=0.5)
    names = {str(digit): str(digit) for digit in range(10)}
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=11)
    DDPMPipeline(unet, scheduler, names).save_pretrained(tmp_path / "classes")
    few = {"max_train_steps": 1, "train_batch_size": 8, "num_samples": 2, "start_steps": 5, "levels": 17}
    few |= {"dataset": "digits", "class_column": "label", "guidance_scale": 2.0}
    folder = hf_ddpm.distill(tmp_path / "classes", 5, tmp_path / "distilled", **few)
    options = DistillationOptions(num_images=2, distilled=str(folder), steps=[5], shown=2)

    def guided_by(scale):
        given = replace(context.options, model=str(tmp_path / "classes"), guidance_scale=scale, class_labels=["3", "5"])
        return FigureContext(given, context.accelerator)

    with pytest.raises(ValueError, match="--guidance_scale 1.0: expected 2, the scale that .* was distilled with"):
        distillation(guided_by(1.0), options)
    used = []
    monkeypatch.setattr(
        FigureContext, "samples", lambda self, count, sampling: used.append(sampling) or torch.zeros(count, 1, 8, 8)
    )
    monkeypatch.setattr(FigureContext, "distance", lambda *args: {"value": 1.0, "num_images": 2, "reference_images": 2})
    distillation(guided_by(2.0), options)
    scales = [(sampling.scheduler, sampling.num_inference_steps, sampling.guidance_scale) for sampling in used]
    # All steps of the teacher are for the picture. The student of 10 steps only learned v from the images; the student
    # of 5 steps also learned the guidance.
    assert scales == [("ddpm", 5, 2.0), ("ddim", 5, 2.0), ("ddpm", T, 2.0), ("ddpm", 5, 1.0), ("ddpm", 10, 2.0)]
