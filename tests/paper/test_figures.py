"""The figures of a network that has learned nothing, or of one that knows its data: files, numbers, theory."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMScheduler
from hf_ddpm.data.sources import choose
from hf_ddpm.evaluation.precision_recall import nearest
from hf_ddpm.evaluation.results import METRIC_SEED
from hf_ddpm.images import to_signed
from hf_ddpm.paper import everything
from hf_ddpm.paper.context import sheet
from hf_ddpm.paper.inpainting import hidden_parts, inpainting
from hf_ddpm.paper.interpolate import interpolate, unlike
from hf_ddpm.paper.lossy_reconstruct import lossy_reconstruct
from hf_ddpm.paper.nearest_neighbors import as_points, nearest_neighbors
from hf_ddpm.paper.options import (
    FIGURES,
    AllOptions,
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
from hf_ddpm.paper.rate_distortion import falls, rate_distortion
from hf_ddpm.paper.schedules import schedules, with_schedule
from hf_ddpm.paper.shared_latent import shared_latent
from hf_ddpm.paper.steps import steps
from hf_ddpm.sampling.options import Sampling
from hf_ddpm.utils.plots import save_curves
from hf_ddpm.utils.seeds import FIGURES as FIGURE_NOISE
from hf_ddpm.utils.seeds import SAMPLES, generator
from tests.conftest import load_script
from tests.paper.conftest import T


def written(context, name):
    parts = (context.folder / f"{name}.md").read_text().split("\n\n")
    places = [place for place, part in enumerate(parts) if part.startswith("![")]
    assert places and all(
        re.fullmatch(r"\*.+\.\*", parts[place + 1].strip(), re.DOTALL) for place in places
    )  # captions
    return json.loads((context.folder / f"{name}.json").read_text())


@pytest.fixture
def drawn(context, monkeypatch):
    """Curves by file, as they are given to the plots, which are drawn all the same."""
    curves = {}

    def note(path, given, save=save_curves, **options):
        assert path.parent == context.folder
        curves[path.name] = {**given, **(options.get("levels") or {})}
        return save(path, given, **options)

    monkeypatch.setattr("hf_ddpm.paper.context.save_curves", note)
    return curves


@pytest.fixture
def labels(context, monkeypatch):
    """Labels of the columns of pictures, and titles of the frames of animations, in turn."""
    noted, animate = [], context.animate

    def note(rows, columns):
        noted.append(columns)
        return sheet(rows, columns)

    for module in ("progressive", "interpolate"):
        monkeypatch.setattr(f"hf_ddpm.paper.{module}.sheet", note)
    monkeypatch.setattr(context, "animate", lambda *args: [noted.append(args[-1]), animate(*args)])
    return noted


def test_the_progress_ends_with_the_samples_of_the_seed(context, distance, drawn):
    options = ProgressiveOptions(shown=3, columns=4, frames=7, num_images=5)
    progressive(context, options)
    moments = written(context, "progressive")["moments"]
    assert [moment["t"] for moment in moments] == [20, 13, 7, 1]
    errors = [moment["rmse"] for moment in moments]
    assert errors[-1] == 0 and all(error > 0 for error in errors[:-1])
    found = distance(5, Sampling(num_inference_steps=T))
    assert moments[-1]["value"] == pytest.approx(found["value"], rel=1e-5)
    assert moments[-1]["floor"] == pytest.approx(found["floor"], rel=1e-5)
    with Image.open(context.folder / "progressive.gif") as animation:
        assert animation.n_frames == 8  # the noise, and 7 moments
    page = np.asarray(Image.open(context.folder / "progressive.png"))
    assert page.shape[1] == 6 + 5 * 70
    noise = torch.cat([torch.randn(1, 1, 8, 8, generator=generator(0, SAMPLES, image)) for image in range(3)])
    for image, x_T in enumerate(noise):
        tile = page[len(page) - (3 - image) * 70 :, 6:][:64:8, :64:8].astype(float)
        assert np.abs(tile - ((x_T[0] + 1) / 2).clamp(0, 1).numpy() * 255).max() <= 1
    assert (context.folder / "progressive_distance.png").exists()
    # Standing at t, the network has been evaluated T + 1 - t times.
    evaluations = [T + 1 - moment["t"] for moment in moments]
    assert drawn["progressive_distance.png"] == {
        "estimate": (evaluations, [moment["value"] for moment in moments]),
        "held-out images": moments[0]["floor"],
    }


def test_progress_needs_no_data(context):
    context.options.dataset = None
    progressive(context, ProgressiveOptions(shown=1, columns=2, frames=2, num_images=0, animation="webp"))
    assert written(context, "progressive")["moments"][0].keys() == {"t", "rmse"}
    with Image.open(context.folder / "progressive.webp") as animation:
        assert animation.n_frames == 3


def test_moments_are_round_and_those_without_signal_are_not_shown(context, labels):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    progressive(context, ProgressiveOptions(shown=1, columns=6, frames=11, num_images=0))
    assert [moment["t"] for moment in written(context, "progressive")["moments"]] == [100, 80, 60, 40, 20, 1]
    with Image.open(context.folder / "progressive.gif") as animation:
        assert animation.n_frames == 11  # the noise in place of t = 100, where sqrt(alpha-bar) is 5e-4
    assert Image.open(context.folder / "progressive.png").width == 6 + 6 * 70
    assert labels[0] == ["x_T", "t = 80", "t = 60", "t = 40", "t = 20", "t = 1"]
    assert labels[1] == ["x_T, noise", *(f"t = {t}" for t in range(90, 0, -10)), "t = 1"]


def test_distances_without_signal_are_not_plotted(context, drawn):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    progressive(context, ProgressiveOptions(shown=1, columns=3, frames=3, num_images=4))
    assert [moment["t"] for moment in written(context, "progressive")["moments"]] == [20, 10, 1]
    # sqrt(alpha-bar) of t = 20 is 2e-3; at t = 10 the network has been evaluated 11 times.
    assert drawn["progressive_distance.png"]["estimate"][0] == [11, 20]


def test_two_unlike_images_are_interpolated_where_they_can_still_be_seen(context, labels):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=80, beta_schedule="squaredcos_cap_v2")
    interpolate(context, InterpolateOptions(weights=[0.5]))
    # sqrt(alpha-bar_t) = cos(pi / 2 (t / T + 0.008) / 1.008): 0.37 at 6/8 of T, 0.19 at 7/8, 0 at T.
    assert [row["diffused"] for row in written(context, "interpolate")["reconstruction_rmse"]] == list(
        range(10, 70, 10)
    )
    images = context.reference("nll").held_out[torch.arange(16)].float().flatten(1).numpy()
    distances = np.linalg.norm(images[:, None] - images[None], axis=-1)
    pair = unlike(torch.tensor(images).view(16, 1, 8, 8))
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


def test_a_process_that_loses_images_at_once_has_a_moment(context):
    context.pipe.scheduler = DDPMScheduler(num_train_timesteps=20, beta_start=0.98, beta_end=0.99)
    assert context.informed([]) == [2]


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
    assert np.asarray(Image.open(context.folder / "interpolate.png"))[-38, -38] == 254  # black that cannot be seen
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="b.png' is no image that can be used: it is no image of a known format"):
        interpolate(context, InterpolateOptions(**files))
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match="b.png' is no image that can be used"):
        interpolate(context, InterpolateOptions(**files))


def test_images_of_a_latent_differ_the_less_the_later_it_is(knowing):
    shared_latent(knowing, SharedLatentOptions(latents=20, num_images=5, diffused=[2, 5, 10, 20]))
    moments = written(knowing, "shared-latent")["moments"]
    assert [moment["t"] for moment in moments] == [20, 10, 5, 2]
    variety = [moment["rmse_between_images"] for moment in moments]
    assert variety == sorted(variety, reverse=True) and variety[-1] < 0.5 * variety[0]


def test_distortion_falls_as_the_rate_rises(knowing, drawn):
    rate_distortion(knowing, RateDistortionOptions(num_images=20, rows=5))
    figures = written(knowing, "rate-distortion")
    (x, y), (steps, rates), (also, distortions) = (
        drawn[f"rate-distortion{what}.png"][""] for what in ("", "_rate", "_distortion")
    )
    # The curves are those of the numbers, and the rows of the table are points of all three.
    assert (x, y) == (rates, distortions) == (figures["rate_bpd"], figures["distortion"])
    assert steps == also == list(range(T, 0, -1))
    for row in figures["table"]:
        place = steps.index(row["steps"])
        assert (rates[place], distortions[place]) == (row["rate_bpd"], row["distortion"])
    assert [row["steps"] for row in figures["table"]] == [20, 16, 12, 8, 4] and figures["falls_throughout"]
    assert not falls([{"rate_bpd": 2, "distortion": 1}, {"rate_bpd": 1, "distortion": 1}])
    assert not falls([{"rate_bpd": 1, "distortion": 1}, {"rate_bpd": 1, "distortion": 2}])
    assert falls([{"rate_bpd": 2, "distortion": 1}, {"rate_bpd": 1, "distortion": 2}])


def test_the_rate_is_the_bound_of_an_evaluation_without_its_last_term(context, model, tmp_path):
    rate_distortion(context, RateDistortionOptions(num_images=3))
    figures = written(context, "rate-distortion")
    words = ["--model", model, "--dataset", "digits", "--metrics", "nll", "--num_images", "3"]
    load_script("evaluate").main([*words, "--output", str(tmp_path / "results.json")])
    nll = json.loads((tmp_path / "results.json").read_text())["nll"]
    assert figures["table"][0]["steps"] == T
    assert figures["table"][0]["rate_bpd"] == pytest.approx(nll["total_bpd"] - nll["decoder_bpd"], rel=1e-9)
    assert figures["total_bpd"] == nll["total_bpd"]


def test_lossy_reconstructions_have_the_distortions_of_their_moment(knowing):
    lossy_reconstruct(knowing, LossyReconstructOptions(num_images=8, diffused=[2, 20]))
    late, early = written(knowing, "lossy-reconstruct")["moments"]
    assert (late["t"], early["t"]) == (20, 2)
    for distortion in ("rmse_of_estimates", "rmse_of_samples"):
        assert early[distortion] < 0.5 * late[distortion]
    # A sample has the spread of the posterior beside the error of its mean.
    assert late["rmse_of_samples"] > 1.2 * late["rmse_of_estimates"]
    bound = knowing.reference("nll", 8).bound(knowing.pipe, 0)
    assert early["rate_bpd"] == bound["rate_bpd"][1] and late["rate_bpd"] == bound["rate_bpd"][19]
    assert early["rmse_of_estimates"] == pytest.approx(bound["distortion"][1], rel=0.2)


def test_fills_keep_the_known_pixels_and_their_distances_are_those_of_the_pipeline(knowing):
    short = {"jump_length": 2, "jump_n_sample": 3}
    inpainting(knowing, InpaintingOptions(num_images=2, fills=3, **short))
    found = {row["mask"]: row for row in written(knowing, "inpainting")["masks"]}
    assert [row["filled"] for row in found.values()] == [0.5, 0.25, 0.5, 0.75]
    # 8 rows of 6 tiles: the image, what is known, 3 fills, and one without jumps.
    page = np.asarray(Image.open(knowing.folder / "inpainting.png"))
    tiles = page[-8 * 70 :, -6 * 70 :].reshape(8, 70, 6, 70).transpose(0, 2, 1, 3)[:, :, :64:8, :64:8].astype(int)
    for place, mask in enumerate(hidden_parts(8, 8).values()):
        for row in tiles[2 * place : 2 * place + 2]:
            image, masked, fills = row[0], row[1], row[2:]
            assert (masked[mask] == 128).all() and (masked[~mask] == image[~mask]).all()
            assert (fills[:, ~mask] == image[~mask]).all() and (fills[0] != fills[1])[mask].mean() > 0.5
    chosen = torch.tensor(choose(899, 2, METRIC_SEED))
    images = to_signed(knowing.reference("nll").held_out[chosen], 17)
    mask = hidden_parts(8, 8)["square"]
    sources = [generator(0, FIGURE_NOISE, i) for i in range(6)]
    fills = knowing.pipe.inpaint(
        images.repeat_interleave(3, 0), mask, sources, T, **short, output_type="pt"
    ).images  # fmt: skip
    parts = fills.view(2, 3, 1, 8, 8)[..., mask].double().numpy()
    real = (images[:, None, :, mask].double().numpy() + 1) / 2
    pairs = [np.square(parts[:, i] - parts[:, j]).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["square"]["rmse"] == pytest.approx(255 * np.sqrt(np.square(parts - real).mean()), rel=1e-4)
    assert found["square"]["rmse_between_fills"] == pytest.approx(255 * np.sqrt(np.mean(pairs)), rel=1e-4)
    assert found["square"]["rmse_without_jumps"] != found["square"]["rmse"]


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (32, 24)])
def test_masks_fit_any_size(size):
    for mask in hidden_parts(*size).values():
        assert mask.shape == size and mask.dtype == torch.bool and 0 < mask.sum() < mask.numel()


def test_neighbors_are_those_of_the_training_images(context):
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


def test_data_without_held_out_images_will_do(context):
    context.options.split, context.options.floor = "none", False
    nearest_neighbors(context, NearestNeighborsOptions(num_images=6))
    assert list(written(context, "nearest-neighbors")["median_distances"]["pixels"]) == ["samples"]
    progressive(context, ProgressiveOptions(shown=1, columns=2, frames=2, num_images=901))  # more than any split holds
    moment = written(context, "progressive")["moments"][-1]
    assert moment["num_images"] == 901 and "floor" not in moment
    steps(context, StepsOptions(steps=[2], samplers=[], num_images=5))
    assert "floor" not in written(context, "steps")["in_all_steps"]
    assert "held-out" not in "".join((context.folder / f"{name}.md").read_text() for name in ("steps", "progressive"))


def test_large_images_are_compared_small():
    class Large:
        shape = (1, 64, 48)

        def __getitem__(self, numbers):
            return torch.full((len(numbers), 1, 64, 48), 100, dtype=torch.uint8)

    points = as_points(Large(), range(300))
    assert points.shape == (300, 32 * 32) and torch.allclose(points, torch.tensor(100.0), atol=1e-3)
    assert nearest(points[:1], points)[0].item() == 0


def test_a_network_is_shown_the_time_of_the_same_noise(context):
    own = context.pipe.scheduler.diffusion.alphas_cumprod
    process = DDPMScheduler.from_config(context.pipe.scheduler.config, beta_schedule="squaredcos_cap_v2")
    other = with_schedule(context.pipe, "squaredcos_cap_v2")
    assert torch.equal(other.scheduler.diffusion.alphas_cumprod, process.diffusion.alphas_cumprod)
    seen = []
    context.pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    other.unet(torch.zeros(20, 1, 8, 8), torch.arange(20))
    ratio = torch.log(own / (1 - own)).numpy()
    asked = process.diffusion.alphas_cumprod
    expected = torch.log(asked / (1 - asked)).numpy().clip(ratio[-1], ratio[0])
    shown = np.interp(seen[0].numpy(), np.arange(T), ratio)
    np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-4)
    same = with_schedule(context.pipe, "linear")
    same.unet(torch.zeros(20, 1, 8, 8), torch.arange(20))
    np.testing.assert_allclose(seen[1].numpy(), np.arange(T), atol=1e-5)


def test_the_own_schedule_has_the_bound_of_the_model(context, drawn):
    schedules(context, SchedulesOptions(num_images=2))
    found = written(context, "schedules")["schedules"]
    assert list(found) == ["linear", "squaredcos_cap_v2"]
    bound = context.reference("nll", 2).bound(context.pipe, 0)
    assert found["linear"]["total_bpd"] == pytest.approx(bound["total_bpd"], rel=1e-5)
    assert found["linear"]["total_bpd"] != pytest.approx(found["squaredcos_cap_v2"]["total_bpd"], rel=1e-3)
    for file, key in [("terms", "terms_bpd"), ("losses", "losses"), ("signal", "signal")]:
        for name, curve in drawn[f"schedules_{file}.png"].items():
            assert curve == (list(range(1, T + 1)), found[name][key])  # the paper's t, from 1
    # Of a network that says zero noise the loss is the variance of the noise, wherever x_0-hat is not clipped.
    assert len(found["linear"]["losses"]) == T and found["linear"]["losses"][0] == pytest.approx(1, rel=0.3)


def test_one_report_holds_all_figures(context):
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
        (interpolate, lambda: InterpolateOptions(first="a.png"), "second=None is not allowed: both files, or none"),
        (interpolate, lambda: InterpolateOptions(rows=[1]), r"rows=\[1\] is not allowed: two numbers"),
        (interpolate, lambda: InterpolateOptions(rows=[0, 899]), r"rows=\[0, 899\] is not allowed: less than the 899"),
        (interpolate, lambda: InterpolateOptions(weights=[2]), r"weights=\[2\] is not allowed: in \[0, 1\]"),
        (interpolate, lambda: InterpolateOptions(diffused=[0]), r"diffused=\[0\] is not allowed: 1 to 20"),
        (shared_latent, lambda: SharedLatentOptions(diffused=[21]), r"diffused=\[21\] is not allowed: 1 to 20"),
        (shared_latent, lambda: SharedLatentOptions(num_images=1), "num_images=1 is not allowed: at least 2"),
        (progressive, lambda: ProgressiveOptions(columns=1), "columns=1 is not allowed: at least 2"),
        (progressive, lambda: ProgressiveOptions(frames=5), "frames=5 is not allowed: at least columns=11"),
        (progressive, lambda: ProgressiveOptions(num_images=1), "num_images=1 is not allowed: 0, or at least 2"),
        (rate_distortion, lambda: RateDistortionOptions(rows=1), "rows=1 is not allowed: at least 2"),
        (
            lossy_reconstruct,
            lambda: LossyReconstructOptions(num_images=900),
            "num_images=900 is not allowed: at most the 899",
        ),
        (inpainting, lambda: InpaintingOptions(fills=1), "fills=1 is not allowed: at least 2"),
        (inpainting, lambda: InpaintingOptions(jump_length=0), "jump_length=0 is not allowed: at least 1"),
        (nearest_neighbors, lambda: NearestNeighborsOptions(num_images=1), "num_images=1 is not allowed: at least 2"),
        (
            schedules,
            lambda: SchedulesOptions(schedules=["sine"]),
            r"schedules=\['sine'\] is not allowed: any of linear",
        ),
    ],
)
def test_wrong_options_are_one_line(context, make, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(context, options())
    assert "\n" not in str(caught.value)


def test_other_schedulers_are_refused_by_name(context):
    import diffusers

    context.pipe.scheduler = diffusers.DDIMScheduler.from_config(context.pipe.scheduler.config)
    for make, options in [(interpolate, InterpolateOptions()), (shared_latent, SharedLatentOptions()),
                          (inpainting, InpaintingOptions()),
                          (rate_distortion, RateDistortionOptions()), (schedules, SchedulesOptions())]:  # fmt: skip
        with pytest.raises(
            ValueError, match="DDPMScheduler, not (a|the) DDIMS|scheduler=diffusers.DDIMS|has a DDIMScheduler; expected"
        ):
            make(context, options)
