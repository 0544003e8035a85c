"""Figures of an untrained network, and of the exact network for Gaussian data: files, results, theory."""

import json
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler, UNet2DModel
from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.precision_recall import nearest
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.images import to_signed
from hf_ddpm.paper import everything
from hf_ddpm.paper.context import FigureContext, sheet
from hf_ddpm.paper.inpainting import inpainting, masks
from hf_ddpm.paper.interpolate import interpolate, least_similar
from hf_ddpm.paper.lossy_reconstruct import lossy_reconstruct
from hf_ddpm.paper.nearest_neighbors import as_points, nearest_neighbors
from hf_ddpm.paper.options import (
    FIGURES,
    AllOptions,
    FigureOptions,
    InpaintingOptions,
    InterpolateOptions,
    LossyReconstructOptions,
    NearestNeighborsOptions,
    ProgressiveOptions,
    RateDistortionOptions,
    SchedulesOptions,
    SharedLatentOptions,
    StepsOptions,
)
from hf_ddpm.paper.progressive import progressive
from hf_ddpm.paper.rate_distortion import is_monotonic, rate_distortion
from hf_ddpm.paper.schedules import schedules, with_schedule
from hf_ddpm.paper.shared_latent import shared_latent
from hf_ddpm.paper.steps import steps
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.plots import save_curves
from hf_ddpm.utils.seeds import FIGURES as FIGURE_NOISE
from hf_ddpm.utils.seeds import SAMPLES, generator
from tests.conftest import TINY_UNET, load_script
from tests.paper.conftest import T


def written(context, name):
    parts = (context.folder / f"{name}.md").read_text().split("\n\n")
    pictures = [i for i, part in enumerate(parts) if part.startswith("![")]
    assert pictures and all(re.fullmatch(r"\*.+\.\*", parts[i + 1].strip(), re.DOTALL) for i in pictures)  # captions
    return json.loads((context.folder / f"{name}.json").read_text())


@pytest.fixture
def drawn(context, monkeypatch):
    """The curves passed to the plots, by file name; the plots are still drawn."""
    recorded = {}

    def record(path, curves, save=save_curves, **options):
        assert path.parent == context.folder
        recorded[path.name] = {**curves, **(options.get("levels") or {})}
        return save(path, curves, **options)

    monkeypatch.setattr("hf_ddpm.paper.context.save_curves", record)
    return recorded


@pytest.fixture
def labels(context, monkeypatch):
    """Column labels of pictures and frame titles of animations, in the order of drawing."""
    recorded, animate = [], context.animate

    def record(rows, columns):
        recorded.append(columns)
        return sheet(rows, columns)

    for module in ("progressive", "interpolate"):
        monkeypatch.setattr(f"hf_ddpm.paper.{module}.sheet", record)
    monkeypatch.setattr(context, "animate", lambda *args: [recorded.append(args[-1]), animate(*args)])
    return recorded


def test_progressive_ends_with_samples_of_seed(context, distance, drawn):
    options = ProgressiveOptions(shown=3, columns=4, frames=7, num_images=5)
    progressive(context, options)
    moments = written(context, "progressive")["moments"]
    assert [moment["t"] for moment in moments] == [20, 13, 7, 1]
    errors = [moment["rmse"] for moment in moments]
    assert errors[-1] == 0 and all(error > 0 for error in errors[:-1])
    expected = distance(5, Sampling(num_inference_steps=T))
    assert moments[-1]["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert moments[-1]["floor"] == pytest.approx(expected["floor"], rel=1e-5)
    with Image.open(context.folder / "progressive.gif") as animation:
        assert animation.n_frames == 8  # the noise, and 7 timesteps
    page = np.asarray(Image.open(context.folder / "progressive.png"))
    assert page.shape[1] == 6 + 5 * 70
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator(0, SAMPLES, image)) for image in range(3)])
    for image, x_T in enumerate(noise):
        tile = page[len(page) - (3 - image) * 70 :, 6:][:64:8, :64:8].astype(float)
        assert np.abs(tile - ((x_T[0] + 1) / 2).clamp(0, 1).numpy() * 255).max() <= 1
    assert (context.folder / "progressive_distance.png").exists()
    # The estimate at t needs T + 1 - t network evaluations.
    evaluations = [T + 1 - moment["t"] for moment in moments]
    assert drawn["progressive_distance.png"] == {
        "estimate": (evaluations, [moment["value"] for moment in moments]),
        "held-out images": moments[0]["floor"],
    }


def test_progressive_without_distances_needs_no_data(context):
    context.options.dataset = None
    progressive(context, ProgressiveOptions(shown=1, columns=2, frames=2, num_images=0, animation="webp"))
    assert written(context, "progressive")["moments"][0].keys() == {"t", "rmse"}
    with Image.open(context.folder / "progressive.webp") as animation:
        assert animation.n_frames == 3


def test_timesteps_are_round_and_shown_only_with_signal(context, labels):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    progressive(context, ProgressiveOptions(shown=1, columns=6, frames=11, num_images=0))
    assert [moment["t"] for moment in written(context, "progressive")["moments"]] == [100, 80, 60, 40, 20, 1]
    with Image.open(context.folder / "progressive.gif") as animation:
        assert animation.n_frames == 11  # the noise replaces t = 100, where sqrt(alpha-bar) is 5e-4
    assert Image.open(context.folder / "progressive.png").width == 6 + 6 * 70
    assert labels[0] == ["x_T", "t = 80", "t = 60", "t = 40", "t = 20", "t = 1"]
    assert labels[1] == ["x_T, noise", *(f"t = {t}" for t in range(90, 0, -10)), "t = 1"]


def test_distances_without_signal_are_not_plotted(context, drawn):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    progressive(context, ProgressiveOptions(shown=1, columns=3, frames=3, num_images=4))
    assert [moment["t"] for moment in written(context, "progressive")["moments"]] == [20, 10, 1]
    # sqrt(alpha-bar) is 2e-3 at t = 20; the estimate at t = 10 needs 11 network evaluations.
    assert drawn["progressive_distance.png"]["estimate"][0] == [11, 20]


def test_interpolation_uses_least_similar_images_and_visible_timesteps(context, labels):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=80, beta_schedule="squaredcos_cap_v2")
    interpolate(context, InterpolateOptions(weights=[0.5]))
    # sqrt(alpha-bar_t) = cos(pi / 2 (t / T + 0.008) / 1.008): 0.37 at 6/8 of T, 0.19 at 7/8, 0 at T.
    assert [row["diffused"] for row in written(context, "interpolate")["reconstruction_rmse"]] == list(
        range(10, 70, 10)
    )
    images = context.reference("nll").held_out[torch.arange(16)].float().flatten(1).numpy()
    distances = np.linalg.norm(images[:, None] - images[None], axis=-1)
    pair = least_similar(torch.tensor(images).view(16, 1, 8, 8))
    assert labels == [["first", "lambda = 0.5", "second"]]
    assert distances[tuple(pair)] == pytest.approx(distances.max()) and pair[0] < pair[1]
    first = np.asarray(Image.open(context.folder / "interpolate.png"))[-70:-6:8, -3 * 70 :]
    assert np.abs(first[:, -70:-6:8] - images[pair[1]].reshape(8, 8)).max() <= 1


def test_interpolations_end_at_reconstructions(context):
    interpolate(context, InterpolateOptions(diffused=[15, 5], weights=[0.5], rows=[3, 8]))
    rows = written(context, "interpolate")["reconstruction_rmse"]
    assert [row["diffused"] for row in rows] == [5, 15]
    pair = to_signed(context.reference("nll").held_out[torch.tensor([3, 8])], 17)
    from hf_ddpm.utils.seeds import FIGURES as PURPOSE
    from hf_ddpm.utils.seeds import generator

    source = generator(0, PURPOSE)
    latents = context.pipe.encode(pair, 14, source)
    for name, image, latent in zip(("first", "second"), pair, latents, strict=True):
        again = context.pipe.decode(latent[None], 14, source.clone_state(), "pt")
        expected = 255 * ((image + 1) / 2 - again[0]).square().mean().sqrt().item()
        assert rows[1][name] == pytest.approx(expected, rel=1e-3)
    first, second = (context.pipe.decode(latent[None], 14, source.clone_state(), "pt") for latent in latents)
    assert rows[1]["between"] == pytest.approx(255 * (first - second).square().mean().sqrt().item(), rel=1e-3)


def test_process_without_visible_timesteps_shows_first_eighth(context):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=20, beta_start=0.98, beta_end=0.99)
    assert context.visible([]) == [2]


def test_two_files_are_interpolated(context, tmp_path):
    Image.new("RGB", (16, 12), "white").save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    context.options.dataset = None
    files = {"first": str(tmp_path / "a.png"), "second": str(tmp_path / "b.png")}
    interpolate(context, InterpolateOptions(**files, diffused=[1], weights=[0, 1]))
    sheet = np.asarray(Image.open(context.folder / "interpolate.png"))
    row = sheet[-38, -4 * 70 :]
    assert row[32] == 255 and row[-38] == 0  # the images themselves, on the left and on the right
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "b.png")
    context.options.background = "#fefefe"
    interpolate(context, InterpolateOptions(**files, diffused=[1], weights=[0, 1]))
    assert np.asarray(Image.open(context.folder / "interpolate.png"))[-38, -38] == 254  # a transparent pixel
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="--second .*b.png: cannot be read as an image: .*format"):
        interpolate(context, InterpolateOptions(**files))
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="--second .*b.png: cannot be read as an image"):
        interpolate(context, InterpolateOptions(**files))


def test_images_of_shared_latent_are_more_similar_at_smaller_timesteps(gaussian_context):
    shared_latent(gaussian_context, SharedLatentOptions(latents=20, num_images=5, diffused=[2, 5, 10, 20]))
    moments = written(gaussian_context, "shared-latent")["moments"]
    assert [moment["t"] for moment in moments] == [20, 10, 5, 2]
    differences = [moment["rmse_between_images"] for moment in moments]
    assert differences == sorted(differences, reverse=True) and differences[-1] < 0.5 * differences[0]


def test_distortion_falls_as_rate_rises(gaussian_context, drawn):
    rate_distortion(gaussian_context, RateDistortionOptions(num_images=20, rows=5))
    figures = written(gaussian_context, "rate-distortion")
    (x, y), (steps, rates), (distortion_steps, distortions) = (
        drawn[f"rate-distortion{suffix}.png"][""] for suffix in ("", "_rate", "_distortion")
    )
    # All three curves show the written values, and the rows of the table are points of them.
    assert (x, y) == (rates, distortions) == (figures["rate_bpd"], figures["distortion"])
    assert steps == distortion_steps == list(range(T, 0, -1))
    for row in figures["table"]:
        index = steps.index(row["steps"])
        assert (rates[index], distortions[index]) == (row["rate_bpd"], row["distortion"])
    assert [row["steps"] for row in figures["table"]] == [20, 16, 12, 8, 4] and figures["falls_throughout"]
    assert not is_monotonic([{"rate_bpd": 2, "distortion": 1}, {"rate_bpd": 1, "distortion": 1}])
    assert not is_monotonic([{"rate_bpd": 1, "distortion": 1}, {"rate_bpd": 1, "distortion": 2}])
    assert is_monotonic([{"rate_bpd": 2, "distortion": 1}, {"rate_bpd": 1, "distortion": 2}])


def test_total_rate_is_evaluated_bound_without_decoder_term(context, model, tmp_path):
    rate_distortion(context, RateDistortionOptions(num_images=3))
    figures = written(context, "rate-distortion")
    arguments = ["--model", model, "--dataset", "digits", "--metrics", "nll", "--num_images", "3"]
    load_script("evaluate").main([*arguments, "--output", str(tmp_path / "results.json")])
    nll = json.loads((tmp_path / "results.json").read_text())["nll"]
    assert figures["table"][0]["steps"] == T
    assert figures["table"][0]["rate_bpd"] == pytest.approx(nll["total_bpd"] - nll["decoder_bpd"], rel=1e-9)
    assert figures["total_bpd"] == nll["total_bpd"]


def test_lossy_reconstructions_have_rate_and_distortion_of_bound(gaussian_context):
    lossy_reconstruct(gaussian_context, LossyReconstructOptions(num_images=8, diffused=[2, 20]))
    late, early = written(gaussian_context, "lossy-reconstruct")["moments"]
    assert (late["t"], early["t"]) == (20, 2)
    for distortion in ("rmse_of_estimates", "rmse_of_samples"):
        assert early[distortion] < 0.5 * late[distortion]
    # The error of a sample is that of the posterior mean plus the spread of the posterior.
    assert late["rmse_of_samples"] > 1.2 * late["rmse_of_estimates"]
    bound = gaussian_context.reference("nll", 8).bound(gaussian_context.pipe, 0)
    assert early["rate_bpd"] == bound["rate_bpd"][1] and late["rate_bpd"] == bound["rate_bpd"][19]
    assert early["rmse_of_estimates"] == pytest.approx(bound["distortion"][1], rel=0.2)


def test_inpainting_keeps_known_pixels_and_measures_pipeline(gaussian_context):
    short = {"jump_length": 2, "jump_n_sample": 3}
    inpainting(gaussian_context, InpaintingOptions(num_images=2, fills=3, **short))
    measured = {row["mask"]: row for row in written(gaussian_context, "inpainting")["masks"]}
    assert [row["filled"] for row in measured.values()] == [0.5, 0.25, 0.5, 0.75]
    # 8 rows of 6 tiles: image, masked image, 3 results, and one without jumps.
    page = np.asarray(Image.open(gaussian_context.folder / "inpainting.png"))
    tiles = page[-8 * 70 :, -6 * 70 :].reshape(8, 70, 6, 70).transpose(0, 2, 1, 3)[:, :, :64:8, :64:8].astype(int)
    for i, mask in enumerate(masks(8, 8).values()):
        for row in tiles[2 * i : 2 * i + 2]:
            image, masked, fills = row[0], row[1], row[2:]
            assert (masked[mask] == 128).all() and (masked[~mask] == image[~mask]).all()
            assert (fills[:, ~mask] == image[~mask]).all() and (fills[0] != fills[1])[mask].mean() > 0.5
    chosen = torch.tensor(choose(899, 2, METRIC_SEED))
    images = to_signed(gaussian_context.reference("nll").held_out[chosen], 17)
    mask = masks(8, 8)["square"]
    sources = [generator(0, FIGURE_NOISE, i) for i in range(6)]
    repeated = images.repeat_interleave(3, 0)
    fills = gaussian_context.pipe.inpaint(repeated, mask, sources, T, **short, output_type="pt").images
    parts = fills.view(2, 3, 1, 8, 8)[..., mask].double().numpy()
    real = (images[:, None, :, mask].double().numpy() + 1) / 2
    pairs = [np.square(parts[:, i] - parts[:, j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert measured["square"]["rmse"] == pytest.approx(255 * np.sqrt(np.square(parts - real).mean()), rel=1e-4)
    assert measured["square"]["rmse_between_fills"] == pytest.approx(255 * np.sqrt(np.mean(pairs)), rel=1e-4)
    assert measured["square"]["rmse_without_jumps"] != measured["square"]["rmse"]


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (32, 24)])
def test_masks_fit_any_size(size):
    for mask in masks(*size).values():
        assert mask.shape == size and mask.dtype == torch.bool and 0 < mask.sum() < mask.numel()


def test_nearest_neighbors_are_training_images(context):
    nearest_neighbors(context, NearestNeighborsOptions(num_images=6))
    figures = written(context, "nearest-neighbors")
    samples = context.samples(6, Sampling(num_inference_steps=T))[torch.arange(6)].float().flatten(1)
    training = context.reference("fd").images[torch.arange(898)].float().flatten(1)
    distances = torch.cdist(samples.double(), training.double()).min(dim=1).values
    assert figures["median_distances"]["pixels"]["samples"] == pytest.approx(distances.quantile(0.5).item(), rel=1e-5)
    assert figures["exact_copies"] == 0
    for name in ("pixels", "features"):
        assert figures["median_distances"][name]["held_out"] < figures["median_distances"][name]["samples"]
        Image.open(context.folder / f"nearest-neighbors_{name}.png").verify()


def test_figures_without_held_out_images(context):
    context.options.split, context.options.floor = "none", False
    nearest_neighbors(context, NearestNeighborsOptions(num_images=6))
    assert list(written(context, "nearest-neighbors")["median_distances"]["pixels"]) == ["samples"]
    progressive(context, ProgressiveOptions(shown=1, columns=2, frames=2, num_images=901))  # more than in any split
    moment = written(context, "progressive")["moments"][-1]
    assert moment["num_images"] == 901 and "floor" not in moment
    steps(context, StepsOptions(steps=[2], samplers=[], num_images=5))
    assert "floor" not in written(context, "steps")["in_all_steps"]
    assert "held-out" not in "".join((context.folder / f"{name}.md").read_text() for name in ("steps", "progressive"))


def test_large_images_are_downscaled_for_comparison():
    class Large:
        shape = (1, 64, 48)

        def __getitem__(self, indices):
            return torch.full((len(indices), 1, 64, 48), 100, dtype=torch.uint8)

    points = as_points(Large(), range(300))
    assert points.shape == (300, 32 * 32) and torch.allclose(points, torch.tensor(100.0), atol=1e-3)
    assert nearest(points[:1], points)[0].item() == 0


def test_network_gets_time_with_same_signal_to_noise_ratio(context):
    own = context.pipe.scheduler.diffusion.alphas_cumprod
    process = DDPMScheduler.from_config(context.pipe.scheduler.config, beta_schedule="squaredcos_cap_v2")
    other = with_schedule(context.pipe, "squaredcos_cap_v2")
    assert torch.equal(other.scheduler.diffusion.alphas_cumprod, process.diffusion.alphas_cumprod)
    times = []
    context.pipe.unet.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1]))
    other.unet(torch.zeros(20, 1, 8, 8), torch.arange(20))
    ratio = torch.log(own / (1 - own)).numpy()
    target = process.diffusion.alphas_cumprod
    expected = torch.log(target / (1 - target)).numpy().clip(ratio[-1], ratio[0])
    np.testing.assert_allclose(np.interp(times[0].numpy(), np.arange(T), ratio), expected, rtol=1e-4, atol=1e-4)
    same = with_schedule(context.pipe, "linear")
    same.unet(torch.zeros(20, 1, 8, 8), torch.arange(20))
    np.testing.assert_allclose(times[1].numpy(), np.arange(T), atol=1e-5)


def test_own_schedule_has_bound_of_model(context, drawn):
    schedules(context, SchedulesOptions(num_images=2))
    results = written(context, "schedules")["schedules"]
    assert list(results) == ["linear", "squaredcos_cap_v2"]
    bound = context.reference("nll", 2).bound(context.pipe, 0)
    assert results["linear"]["total_bpd"] == pytest.approx(bound["total_bpd"], rel=1e-5)
    assert results["linear"]["total_bpd"] != pytest.approx(results["squaredcos_cap_v2"]["total_bpd"], rel=1e-3)
    for file, key in [("terms", "terms_bpd"), ("losses", "losses"), ("signal", "signal")]:
        for name, curve in drawn[f"schedules_{file}.png"].items():
            assert curve == (list(range(1, T + 1)), results[name][key])  # the paper's t, from 1
    # For a network that predicts zero noise, the loss is the variance of the noise if x_0-hat is not clipped.
    assert len(results["linear"]["losses"]) == T and results["linear"]["losses"][0] == pytest.approx(1, rel=0.3)


def test_report_contains_all_figures(context):
    context.folder.mkdir()
    (context.folder / "ablation.md").write_text("## Ablation\n")
    everything(context, AllOptions(num_images=4))
    report = (context.folder / "report.md").read_text()
    titles = [line for line in report.splitlines() if line.startswith("#")]
    assert len(titles) == 2 + len(FIGURES) and titles[-1] == "## Ablation"
    pictures = re.findall(r"!\[[^]]+\]\((\S+)\)", report)
    assert len(pictures) >= len(FIGURES) and all((context.folder / picture).exists() for picture in pictures)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (interpolate, lambda: InterpolateOptions(first="a.png"), "--second: expected both --first and --sec"),
        (interpolate, lambda: InterpolateOptions(rows=[1]), r"--rows 1: expected two indices"),
        (interpolate, lambda: InterpolateOptions(rows=[0, 899]), r"--rows 0 899: expected indices below 899"),
        (interpolate, lambda: InterpolateOptions(weights=[2]), r"--weights 2: expected numbers in \[0, 1\]"),
        (interpolate, lambda: InterpolateOptions(diffused=[0]), r"--diffused 0: expected 1 to 20"),
        (shared_latent, lambda: SharedLatentOptions(diffused=[21]), r"--diffused 21: expected 1 to 20"),
        (shared_latent, lambda: SharedLatentOptions(num_images=1), "--num_images 1: expected at least 2"),
        (progressive, lambda: ProgressiveOptions(columns=1), "--columns 1: expected at least 2"),
        (progressive, lambda: ProgressiveOptions(frames=5), "--frames 5: expected at least --columns 11"),
        (progressive, lambda: ProgressiveOptions(num_images=1), "--num_images 1: expected 0 or at least 2"),
        (rate_distortion, lambda: RateDistortionOptions(rows=1), "--rows 1: expected at least 2"),
        (
            lossy_reconstruct,
            lambda: LossyReconstructOptions(num_images=900),
            "--num_images 900: expected at most the 899",
        ),
        (inpainting, lambda: InpaintingOptions(fills=1), "--fills 1: expected at least 2"),
        (inpainting, lambda: InpaintingOptions(jump_length=0), "--jump_length 0: expected at least 1"),
        (nearest_neighbors, lambda: NearestNeighborsOptions(num_images=1), "--num_images 1: expected at least 2"),
        (
            schedules,
            lambda: SchedulesOptions(schedules=["sine"]),
            r"--schedules sine: expected any of linear",
        ),
    ],
)
def test_invalid_options_are_rejected_in_one_line(context, make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(context, options())
    assert "\n" not in str(caught.value)


def test_unsupported_schedulers_are_rejected(context):
    import diffusers

    context.pipe.scheduler = diffusers.DDIMScheduler.from_config(context.pipe.scheduler.config)
    for make, options in [(interpolate, InterpolateOptions()), (shared_latent, SharedLatentOptions()),
                          (inpainting, InpaintingOptions()),
                          (rate_distortion, RateDistortionOptions()), (schedules, SchedulesOptions())]:  # fmt: skip
        with pytest.raises(ValueError, match="DDIMScheduler.*DDPMScheduler|DDPMScheduler.*DDIMScheduler"):
            make(context, options)


def test_figures_use_given_classes_and_guidance(tmp_path, monkeypatch):
    names = {"0": "zero", "1": "one", "2": "two"}
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=5e-3, beta_end=0.5)
    pipe = DDPMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=4), scheduler, names)  # class 3 is "no class"
    pipe.save_pretrained(tmp_path / "model")
    options = {"class_labels": ["two", "one"], "guidance_scale": 2.0, "dataset": "digits"}
    shared = FigureOptions(model=str(tmp_path / "model"), output=str(tmp_path / "figures"), **options)
    context = FigureContext(shared, Accelerator(cpu=True))
    seen, forward = set(), UNet2DModel.forward

    def record(self, sample, timestep, class_labels=None, return_dict=True):
        seen.update(class_labels.tolist())
        return forward(self, sample, timestep, class_labels, return_dict)

    monkeypatch.setattr(UNet2DModel, "forward", record)
    for figure, own in [
        (progressive, ProgressiveOptions(shown=3, columns=3, frames=3, num_images=0)),
        (shared_latent, SharedLatentOptions(latents=2, num_images=2, diffused=[5])),
        (inpainting, InpaintingOptions(num_images=2, fills=2, num_inference_steps=3, jump_n_sample=1)),
        (nearest_neighbors, NearestNeighborsOptions(num_images=4)),
    ]:
        figure(context, own)
        assert seen == {1, 2, 3}, figure
        seen.clear()
    interpolate(context, InterpolateOptions(rows=[0, 1], diffused=[5]))
    assert seen == {2, 3}  # one class for both images
    assert context.conditions(range(3)) == {"class_labels": ["two", "one", "two"], "guidance_scale": 2.0}
