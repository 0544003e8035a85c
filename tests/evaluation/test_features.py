import re
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scipy.signal import correlate2d
from transformers import AutoConfig, AutoModel

from hf_ddpm.config import DataConfig
from hf_ddpm.data.sources import open_split
from hf_ddpm.data.store import load_images
from hf_ddpm.evaluation.features import load_extractor
from hf_ddpm.evaluation.frechet import Moments, frechet_distance
from hf_ddpm.provenance import weights_checksum
from tests.conftest import load_script
from tests.evaluation.processors import BitProcessor

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def held_out_half():
    images = load_images(DataConfig("digits", split="test", resolution=[8], channels=1))
    return images[torch.arange(len(images))]


@pytest.fixture(scope="module")
def train_half():
    images = load_images(DataConfig("digits", split="train", resolution=[8], channels=1))
    return images[torch.arange(len(images))]


def save_model(folder, kind="dinov2", size=28, processor=None, **options):
    """Save a tiny model with random weights, and the image processor of DINOv2 with another image size."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": size, "patch_size": 14}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **small, **options))
    model.save_pretrained(folder)
    square = {"height": size, "width": size}
    processor = processor or {"size": {"shortest_edge": size + 4}, "crop_size": square, "do_center_crop": True}
    BitProcessor(**processor, resample=3, **IMAGENET).save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return str(folder), save_model(folder, mlp_ratio=2)


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_shipped_classifier_is_accurate_on_held_out_digits(held_out_half):
    extracted = load_extractor("digits")(held_out_half)
    labels = torch.tensor(open_split(DataConfig("digits", split="test"))[0]["label"][:])
    assert (extracted.probabilities.argmax(dim=1) == labels).double().mean() >= 0.985
    assert extracted.features.shape == (899, 64) and extracted.features.dtype == torch.float32
    torch.testing.assert_close(extracted.probabilities.sum(dim=1), torch.ones(899))
    # The class logits are a linear function of these features.
    network = load_extractor("digits").network
    logits = extracted.features @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(logits.softmax(dim=1), extracted.probabilities)


def test_classifier_equals_independent_implementation():
    # In float64 numpy, from the weights: another input range, pooling or padding would change all distances.
    images = load_images(DataConfig("digits", split="test", resolution=[8], channels=1))[torch.arange(3)]
    extractor = load_extractor("digits")
    weights = {key: value.double().numpy() for key, value in extractor.network.state_dict().items()}

    def convolve(x, name):
        kernels, biases = weights[f"{name}.weight"], weights[f"{name}.bias"]
        planes = [sum(correlate2d(p, k, "same") for p, k in zip(x, kernel, strict=True)) for kernel in kernels]
        return np.maximum(np.stack(planes) + biases[:, None, None], 0)

    def pool(x):
        return x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))

    for image, features, probabilities in zip(images.double().numpy(), *extractor(images), strict=True):
        x = pool(convolve(pool(convolve(convolve(image / 255, "conv1"), "conv2")), "conv3"))
        expected = np.maximum(weights["hidden.weight"] @ x.ravel() + weights["hidden.bias"], 0)
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
        logits = weights["head.weight"] @ expected + weights["head.bias"]
        np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-4, atol=1e-6)


def test_distances_with_shipped_classifier_are_sensitive(held_out_half, train_half):
    # For equal n, a Gaussian fit of the pixels and a set with missing classes have a much larger distance than digits.
    extractor = load_extractor("digits")
    reference = Moments.of(extractor(train_half).features)

    def distance(pixels):
        return frechet_distance(Moments.of(extractor(pixels).features), reference)

    floor = distance(held_out_half)
    flat = train_half.flatten(1).double().numpy()
    rng = np.random.default_rng(0)
    gaussian = rng.multivariate_normal(flat.mean(0), np.cov(flat.T), 899).clip(0, 255).round().reshape(-1, 1, 8, 8)
    assert distance(torch.tensor(gaussian.astype(np.uint8))) > 15 * floor
    labels = np.array(open_split(DataConfig("digits", split="test"))[0]["label"][:])
    without = torch.tensor(rng.choice(np.flatnonzero(labels < 8), 899))
    assert distance(held_out_half[without]) > 8 * floor


def test_features_do_not_depend_on_batch(held_out_half):
    extractor = load_extractor("digits")
    together = extractor(held_out_half[:20]).features
    alone = torch.cat([extractor(held_out_half[i : i + 1]).features for i in range(20)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_of_classifier_is_reproducible(tmp_path, capsys):
    # Bit-identical on one machine; other machines may round differently, so the shipped weights are not compared.
    main = load_script("train_digits_classifier").main
    for name in ("first", "second"):
        assert main(["--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    accuracies = re.findall(r"test accuracy (0\.\d+)", capsys.readouterr().out)
    assert len(accuracies) == 2 and float(accuracies[0]) >= 0.98
    with safe_open(tmp_path / "first", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    assert shapes == {key: list(value.shape) for key, value in load_extractor("digits").network.state_dict().items()}


def test_images_for_transformers_are_resized_by_pil(dinov2):
    # Whole images are resized to the crop size, bicubic, without cropping, and normalized with ImageNet's statistics.
    images = random_images(3, 3, 40, 33)
    extractor = load_extractor(dinov2[0])
    mean, std = (np.array(IMAGENET[key], dtype=np.float32) for key in ("image_mean", "image_std"))
    expected = []
    for image in images:
        resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
        unit = (np.asarray(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
        expected.append(((unit - mean) / std).transpose(2, 0, 1))
    assert torch.equal(extractor.transform(images), torch.tensor(np.stack(expected)))


def test_image_size_is_output_size_of_processor(tmp_path, dinov2):
    # An unused crop size, as in the recipe of FD-DINOv2, is ignored.
    images, square = random_images(2, 3, 40, 33), {"height": 28, "width": 28}
    unused = {"do_center_crop": False, "crop_size": {"height": 14, "width": 14}}
    save_model(tmp_path, processor={"size": square, **unused}, mlp_ratio=2)
    extractor = load_extractor(str(tmp_path))
    assert torch.equal(extractor.transform(images), load_extractor(dinov2[0]).transform(images))
    save_model(tmp_path, processor={"size": {"shortest_edge": 28}, **unused}, mlp_ratio=2)
    with pytest.raises(
        ValueError, match="extractor .*: the processor has no fixed image size; expected height and width"
    ):
        load_extractor(str(tmp_path))


def test_features_are_class_token(dinov2):
    folder, model = dinov2
    extractor, images = load_extractor(folder), random_images(3, 3, 40, 33)
    with torch.no_grad():
        expected = model(pixel_values=extractor.transform(images)).last_hidden_state[:, 0]
    extracted = extractor(images)
    assert torch.equal(extracted.features, expected) and extracted.features.shape == (3, 32)
    assert extracted.probabilities is None and not extractor.classifies


def test_grayscale_images_are_repeated_to_three_channels(dinov2):
    extractor, gray = load_extractor(dinov2[0]), random_images(2, 1, 8, 8)
    assert torch.equal(extractor(gray).features, extractor(gray.repeat(1, 3, 1, 1)).features)


def test_untrained_pooler_is_not_used(tmp_path):
    model = save_model(tmp_path, kind="vit", intermediate_size=64)
    saved = load_extractor(str(tmp_path))
    images = random_images(2, 3, 28, 28)
    with torch.no_grad():
        output = model(pixel_values=saved.transform(images))
    assert torch.equal(saved(images).features, output.pooler_output)
    type(model)(model.config, add_pooling_layer=False).save_pretrained(tmp_path)  # as the file of a classifier
    first, second = (load_extractor(str(tmp_path)) for _ in range(2))
    assert torch.equal(first(images).features, second(images).features)
    with torch.no_grad():
        tokens = first.network(pixel_values=first.transform(images)).last_hidden_state
    assert torch.equal(first(images).features, tokens[:, 0])


def test_checksum_depends_on_weights(dinov2):
    network = load_extractor("digits").network
    checksum = weights_checksum(network)
    assert checksum == load_extractor("digits").checksum != load_extractor(dinov2[0]).checksum
    assert re.fullmatch("[0-9a-f]{64}", checksum)
    # The checksum of the shipped weights: with other weights, published distances would not be comparable.
    assert checksum == "059cf152f9c7e158afc7a2334019432e04ebc7450a649150ea2e2882b440a58c"
    with torch.no_grad():
        network.head.bias[0] = torch.nextafter(network.head.bias[0], torch.tensor(9.0))
    assert weights_checksum(network) != checksum
    assert weights_checksum(network.bfloat16()) != checksum


def test_invalid_images_raise_errors(dinov2):
    digits, model = load_extractor("digits"), load_extractor(dinov2[0])
    for act, message in [
        (lambda: digits(random_images(1, 3, 8, 8)), "extractor 'digits': images with 3 channels; expected 1$"),
        (lambda: digits(random_images(1, 1, 8, 9)), "extractor 'digits': images of 8x9 pixels; expected 8x8$"),
        (lambda: digits(random_images(1, 1, 8, 8).float()), r"images: float32 of shape \(1, 1, 8, 8\); expected uint8"),
        (lambda: digits(random_images(1, 8, 8)), r"images: uint8 of shape \(1, 8, 8\); expected uint8 of shape"),
        (lambda: digits.check((3, 8, 8)), "extractor 'digits': images with 3 channels; expected 1$"),
        (
            lambda: model(random_images(1, 4, 8, 8)),
            "images with 4 channels; expected 1 or 3, or metric nll, which takes any number$",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            act()


def test_invalid_extractor_raises_one_line_error(tmp_path, dinov2):
    text, empty, cut = tmp_path / "text", tmp_path / "empty", tmp_path / "cut"
    for folder in (text, empty, cut):
        folder.mkdir()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=9, **small)).save_pretrained(text)
    BitProcessor(**IMAGENET).save_pretrained(text)
    model = save_model(cut)
    weights = {key: value for key, value in model.state_dict().items() if key != "layernorm.weight"}
    model.save_pretrained(cut, state_dict=weights)
    for name, message in [
        ("inceptoin", r"extractor 'inceptoin': cannot be loaded \(.*\); expected digits, inception, or an image model"),
        ("no/such-model", r"extractor 'no/such-model': cannot be loaded \(.*\); expected digits, inception, or an im"),
        (str(empty), r": cannot be loaded \(.*\); expected digits, inception, or an image model"),
        (str(text), ": input is input_ids; expected an image model"),
        (str(cut), ": weights layernorm.weight are missing; expected a complete model"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_extractor(name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 200 + len(name)


def test_inception_without_torch_fidelity_raises_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(
        ValueError, match=r"^extractor 'inception' needs torch-fidelity: pip install .*\[inception\].*, or use"
    ):
        load_extractor("inception")
    with pytest.raises(ValueError, match="weights='w.pth': does not apply to extractor 'digits'; expected extractor"):
        load_extractor("digits", weights="w.pth")


def test_inception_returns_pooled_features_and_probabilities_of_logits_without_bias(monkeypatch, tmp_path):
    # A stub with torch-fidelity's interface: the real network needs torchvision and 90 MB of weights.
    class Stub(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__()
            assert (name, feature_extractor_weights_path) == ("inception-v3-compat", str(weights))
            self.outputs = features_list
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
            values = {"2048": pixels.float().mean((2, 3)), "logits_unbiased": pixels.float().amax((2, 3)) / 255}
            return tuple(values[name] for name in self.outputs)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Stub
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    weights = tmp_path / "inception.pth"
    with pytest.raises(ValueError, match="weights='.*inception.pth': file does not exist; expected a weights file"):
        load_extractor("inception", weights=str(weights))
    weights.touch()
    extractor, images = load_extractor("inception", weights=str(weights)), random_images(2, 3, 5, 5)
    extracted = extractor(images)
    assert extractor.classifies and torch.equal(extracted.features, images.float().mean((2, 3)))
    torch.testing.assert_close(extracted.probabilities, (images.float().amax((2, 3)) / 255).softmax(dim=1))
    assert extractor(images[:, :1]).features.shape == (2, 3)
