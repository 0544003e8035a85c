import json

import diffusers
import pytest
from PIL import Image

import hf_ddpm.sampling.generate
from hf_ddpm import DDPMScheduler
from hf_ddpm.paper.options import StepsOptions
from hf_ddpm.paper.steps import caution, in_words, paragraphs, steps, walks
from hf_ddpm.sampling.options import Sampling
from tests.paper.conftest import T

OPTIONS = StepsOptions(steps=[2, 5], samplers=["ddim", "euler"], num_images=40)


def written(context, name="steps"):
    return json.loads((context.folder / f"{name}.json").read_text())


def test_distances_are_those_of_an_evaluation(context, distance):
    steps(context, OPTIONS)
    figures = written(context)
    rows = {row["sampler"]: {point["steps"]: point for point in row["points"]} for row in figures["rows"]}
    assert {name: list(points) for name, points in rows.items()} == {
        "ddpm, fixed_large": [2, 5, T], "ddpm, fixed_small": [2, 5, T], "ddim": [2, 5], "euler": [2, 5],
    }  # fmt: skip
    for name, sampler, variance in [("ddpm, fixed_large", "ddpm", "model"), ("ddpm, fixed_small", "ddpm", None),
                                    ("ddim", "ddim", None)]:  # fmt: skip
        sampling = Sampling(num_inference_steps=5, scheduler=sampler, variance=variance)
        found = distance(40, sampling)
        assert rows[name][5]["value"] == pytest.approx(found["value"], rel=1e-6)
        assert rows[name][5]["floor"] == pytest.approx(found["floor"], rel=1e-6)
        assert rows[name][5]["num_images"] == 40 and rows[name][5]["evaluations"] == 5
    context.pipe.scheduler = DDPMScheduler.from_config(context.pipe.scheduler.config, variance_type="fixed_small")
    found = distance(40, Sampling(num_inference_steps=T))
    assert rows["ddpm, fixed_small"][T]["value"] == pytest.approx(found["value"], rel=1e-6)


def test_the_curves_are_those_of_the_table(context, monkeypatch):
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


def test_the_fewest_steps_are_within_a_tenth_of_all(context):
    steps(context, OPTIONS)
    figures = written(context)
    full = figures["rows"][0]["points"][-1]["value"]
    assert figures["in_all_steps"] == {"sampler": "ddpm, fixed_large", **figures["rows"][0]["points"][-1]}
    for row in figures["rows"]:
        enough = [point["steps"] for point in row["points"] if "value" in point and point["value"] <= 1.1 * full]
        assert row["fewest"] == (min(enough) if enough else None)
    assert figures["rows"][0]["fewest"] is not None


def test_all_that_a_figure_needs_is_written(context):
    steps(context, OPTIONS)
    figures, text = written(context), (context.folder / "steps.md").read_text()
    made = figures["made_by"]
    assert made["extractor"]["name"] == "digits" and len(made["extractor"]["checksum"]) == 64
    assert made["seed"] == 0 and made["options"]["num_images"] == 40 and made["versions"]["torch"]
    assert len(figures["model"]["checksum"]) == 64 and made["dataset"]["held_out_split"] == "test"
    assert "| sampler | 2 | 5 | 20 | within 10% |" in text and "![" in text
    assert "40 images to the 898 of digits (train)" in text and "As many held-out images score" in text
    full = figures["rows"][0]["points"][-1]
    assert f"score {full['floor']:.4g}" in text
    assert f"{full['value']:.4g} ± {full['standard_error']:.2g}" in text
    Image.open(context.folder / "steps.png").verify()
    assert "fewer than all steps takes fixed_small, unless `--variance model` keeps" in text
    assert "fixed_small" not in "".join(paragraphs(figures["rows"][2:], made))  # without rows of both variances


def test_a_sampler_that_cannot_walk_gets_a_dash_and_the_reason(context):
    # pndm needs 4 steps to start with.
    steps(context, StepsOptions(steps=[2, T], samplers=["dpmsolver++", "pndm"], num_images=4))
    *_, solver, pndm = written(context)["rows"]
    reason = "num_inference_steps=2 is not allowed: 4 to 20 with this model and scheduler=pndm"
    assert pndm["points"][0] == {"steps": 2, "failed": reason} and "value" in pndm["points"][1]
    assert all("value" in point for point in solver["points"])
    text = (context.folder / "steps.md").read_text()
    assert f"- pndm, 2 steps: {reason}" in text
    cells = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("|")}
    assert cells["pndm"][2].strip() == "-"
    # Its first three steps are of Runge-Kutta, which takes four evaluations for each.
    assert pndm["points"][1]["evaluations"] == T + 9
    assert "- pndm evaluates the network 9 times more than it takes steps" in text


def test_a_process_of_few_steps_is_walked_in_all_of_them(context):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=10)
    steps(context, StepsOptions(samplers=["ddim"], num_images=4))
    assert "| sampler | 10 | within 10% |" in (context.folder / "steps.md").read_text()


def test_nothing_is_sampled_twice(context, monkeypatch):
    steps(context, OPTIONS)
    before = written(context)["rows"]
    monkeypatch.setattr(
        hf_ddpm.sampling.generate, "generate_images", lambda *args, **kwargs: pytest.fail("they are there")
    )
    steps(context, OPTIONS)
    assert written(context)["rows"] == before


def test_a_learned_variance_is_the_only_one_of_its_model():
    scheduler = DDPMScheduler(variance_type="learned_range")
    assert [walk.name for walk in walks(scheduler, ["ddim"])] == ["ddpm, learned_range", "ddim"]
    assert [walk.name for walk in walks(DDPMScheduler(), [])] == ["ddpm, fixed_small", "ddpm, fixed_large"]


def test_few_images_are_a_reason_for_caution():
    assert caution({"value": 5.0, "standard_error": 0.6}).startswith("With so few images 10% is less than")
    assert caution({"value": 5.0, "standard_error": 0.4}) == "After ± are standard errors."
    assert caution({"value": 5.0}).startswith("Of so few images no error is known")
    assert in_words({"value": 5.0}) == "5" and in_words({"failed": "x"}) == "-"


def test_a_model_of_another_scheduler_is_measured_too(context):
    context.pipe.scheduler = diffusers.DDIMScheduler.from_config(context.pipe.scheduler.config)
    steps(context, StepsOptions(steps=[2], samplers=["ddim"], num_images=4))
    assert [row["sampler"] for row in written(context)["rows"]] == ["ddpm, fixed_large", "ddpm, fixed_small", "ddim"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, r"steps=\[0\] is not allowed: at least 1"),
        ({"steps": [21]}, r"steps=\[21\] is not allowed: at most the 20 of the process"),
        (
            {"samplers": ["heun"]},
            r"samplers=\['heun'\] is not allowed: any of ddim, dpmsolver\+\+, sde-dpmsolver\+\+, unipc, pndm, euler",
        ),
        ({"num_images": 1}, "num_images=1 is not allowed: at least 2"),
        ({"num_images": 900}, "num_images.900.*: .*at most the 899 images in split 'test' of 'digits'"),
    ],
)
def test_wrong_options_are_one_line(context, options, message):
    with pytest.raises(ValueError, match=message):
        steps(context, StepsOptions(**{"steps": [2], **options}))
