import json

import diffusers
import pytest
from PIL import Image

import hf_ddpm.sampling.generate
from hf_ddpm import DDPMScheduler
from hf_ddpm.paper.options import StepsOptions
from hf_ddpm.paper.steps import as_text, error_note, paragraphs, sampler_variants, steps
from hf_ddpm.sampling.options import Sampling
from tests.paper.conftest import T

OPTIONS = StepsOptions(steps=[2, 5], samplers=["ddim", "euler"], num_images=40)


def written(context, name="steps"):
    return json.loads((context.folder / f"{name}.json").read_text())


def test_distances_equal_those_of_evaluation(context, distance):
    steps(context, OPTIONS)
    figures = written(context)
    rows = {row["sampler"]: {point["steps"]: point for point in row["points"]} for row in figures["rows"]}
    assert {name: list(points) for name, points in rows.items()} == {
        "ddpm, fixed_large": [2, 5, T], "ddpm, fixed_small": [2, 5, T], "ddim": [2, 5], "euler": [2, 5],
    }  # fmt: skip
    for name, sampler, variance in [("ddpm, fixed_large", "ddpm", "model"), ("ddpm, fixed_small", "ddpm", None),
                                    ("ddim", "ddim", None)]:  # fmt: skip
        sampling = Sampling(num_inference_steps=5, scheduler=sampler, variance=variance)
        expected = distance(40, sampling)
        assert rows[name][5]["value"] == pytest.approx(expected["value"], rel=1e-6)
        assert rows[name][5]["floor"] == pytest.approx(expected["floor"], rel=1e-6)
        assert rows[name][5]["num_images"] == 40 and rows[name][5]["evaluations"] == 5
    context.pipe.scheduler = DDPMScheduler.from_config(context.pipe.scheduler.config, variance_type="fixed_small")
    expected = distance(40, Sampling(num_inference_steps=T))
    assert rows["ddpm, fixed_small"][T]["value"] == pytest.approx(expected["value"], rel=1e-6)


def test_curves_show_values_of_table(context, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "hf_ddpm.paper.context.save_curves",
        lambda path, curves, **options: drawn.update({path.name: (curves, options)}),
    )
    steps(context, OPTIONS)
    figures = written(context)
    expected = {
        row["sampler"]: tuple(list(column) for column in zip(*((p["steps"], p["value"]) for p in points), strict=True))
        for row in figures["rows"]
        if (points := [point for point in row["points"] if "value" in point])
    }
    full = figures["in_all_steps"]
    curves, options = drawn["steps.png"]
    assert curves == expected and options["levels"] == {"held-out images": full["floor"]}
    assert options["log_x"] and options["log_y"]


def test_fewest_steps_have_distance_within_tenth_of_all_steps(context):
    steps(context, OPTIONS)
    figures = written(context)
    full = figures["rows"][0]["points"][-1]["value"]
    assert figures["in_all_steps"] == {"sampler": "ddpm, fixed_large", **figures["rows"][0]["points"][-1]}
    for row in figures["rows"]:
        enough = [point["steps"] for point in row["points"] if "value" in point and point["value"] <= 1.1 * full]
        assert row["fewest"] == (min(enough) if enough else None)
    assert figures["rows"][0]["fewest"] is not None


def test_files_contain_origin_table_and_picture(context):
    steps(context, OPTIONS)
    figures, text = written(context), (context.folder / "steps.md").read_text()
    made = figures["made_by"]
    assert made["extractor"]["name"] == "digits" and len(made["extractor"]["checksum"]) == 64
    assert made["seed"] == 0 and made["options"]["num_images"] == 40 and made["versions"]["torch"]
    assert len(figures["model"]["checksum"]) == 64 and made["dataset"]["held_out_split"] == "test"
    assert "| sampler | 2 | 5 | 20 | within 10% |" in text and "![" in text
    assert "40 samples and 898 images of digits (train)" in text and "same number of held-out images scores" in text
    full = figures["rows"][0]["points"][-1]
    assert f"scores {full['floor']:.4g}" in text
    assert f"{full['value']:.4g} ± {full['standard_error']:.2g}" in text
    Image.open(context.folder / "steps.png").verify()
    assert "uses fixed_small by default; `--variance model` keeps the variance of the model" in text
    assert "fixed_small" not in "".join(paragraphs(figures["rows"][2:], made))  # without rows of both variances


def test_unsupported_numbers_of_steps_have_dash_and_reason(context):
    # pndm needs at least 4 steps.
    steps(context, StepsOptions(steps=[2, T], samplers=["dpmsolver++", "pndm"], num_images=4))
    *_, solver, pndm = written(context)["rows"]
    reason = "--num_inference_steps 2: expected 4 to 20 with this model and --scheduler pndm"
    assert pndm["points"][0] == {"steps": 2, "failed": reason} and "value" in pndm["points"][1]
    assert all("value" in point for point in solver["points"])
    text = (context.folder / "steps.md").read_text()
    assert f"- pndm, 2 steps: {reason}" in text
    cells = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("|")}
    assert cells["pndm"][2].strip() == "-"
    # Its first three steps are Runge-Kutta steps with four evaluations each.
    assert pndm["points"][1]["evaluations"] == T + 9
    assert "- pndm needs 9 more network evaluations than steps" in text


def test_default_steps_of_short_process_are_all_steps(context):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=10)
    steps(context, StepsOptions(samplers=["ddim"], num_images=4))
    assert "| sampler | 10 | within 10% |" in (context.folder / "steps.md").read_text()


def test_all_steps_can_be_left_out(context):
    steps(context, StepsOptions(steps=[2, 5], all_steps=False, samplers=["ddim"], num_images=4))
    figures, text = written(context), (context.folder / "steps.md").read_text()
    assert [[point["steps"] for point in row["points"]] for row in figures["rows"]] == [[2, 5]] * 3
    assert "in_all_steps" not in figures and "the distance of ddpm, fixed_large in 5 steps" in text


def test_existing_samples_are_reused(context, monkeypatch):
    steps(context, OPTIONS)
    before = written(context)["rows"]
    monkeypatch.setattr(
        hf_ddpm.sampling.generate, "generate_images", lambda *args, **kwargs: pytest.fail("sampled again")
    )
    steps(context, OPTIONS)
    assert written(context)["rows"] == before


def test_learned_variance_is_not_compared_with_fixed_ones():
    scheduler = DDPMScheduler(variance_type="learned_range")
    assert [variant.name for variant in sampler_variants(scheduler, ["ddim"])] == ["ddpm, learned_range", "ddim"]
    expected = ["ddpm, fixed_small", "ddpm, fixed_large"]
    assert [variant.name for variant in sampler_variants(DDPMScheduler(), [])] == expected


def test_error_note_warns_about_few_images():
    assert "so few images it exceeds 10%" in error_note({"value": 5.0, "standard_error": 0.6})
    assert error_note({"value": 5.0, "standard_error": 0.4}) == "Values are given ± standard error."
    assert error_note({"value": 5.0}).startswith("With so few images there is no standard error")
    assert as_text({"value": 5.0}) == "5" and as_text({"failed": "x"}) == "-"


def test_model_with_another_scheduler_is_measured(context):
    context.pipe.scheduler = diffusers.DDIMScheduler.from_config(context.pipe.scheduler.config)
    steps(context, StepsOptions(steps=[2], samplers=["ddim"], num_images=4))
    assert [row["sampler"] for row in written(context)["rows"]] == ["ddpm, fixed_large", "ddpm, fixed_small", "ddim"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, r"--steps 0: expected at least 1"),
        ({"steps": [21]}, r"--steps 21: expected at most 20, the number of diffusion steps"),
        (
            {"samplers": ["heun"]},
            r"--samplers heun: expected any of ddim, dpmsolver\+\+, sde-dpmsolver\+\+, unipc, pndm, euler",
        ),
        ({"num_images": 1}, "--num_images 1: expected at least 2"),
        ({"num_images": 900}, "num_images.900.*: .*at most the 899 images in split 'test' of 'digits'"),
    ],
)
def test_invalid_options_are_rejected(context, options, message):
    with pytest.raises(ValueError, match=message):
        steps(context, StepsOptions(**{"steps": [2], **options}))
