import inspect
import re
import subprocess
import sys

import pytest

import hf_ddpm

# Changing these changes the public interface.
SIGNATURES = {
    "train": "(config: Config | None = None, **options: Any) -> Path",
    "distill": "(model: Path | str, steps: int, output: Path | str, **options: Any) -> Path",
    "sample_images": "(model: Path | str, output: Path | str, num_images: int = 64, sampling: Sampling | None = None, "
    "*, format: str = png, batch_size: int = 64, compile: bool = False) -> Path",
    "evaluate": "(config: EvaluateConfig, sampling: Sampling | None = None, *, pipe: DDPMPipeline | None = None, "
    "images: SampleFolder | ImageFolder | SampleFile | None = None, reference: Reference | None = None, "
    "output: Path | None = None, on_figures: Callable[[dict[str, dict[str, Any]]], object] | None = None, "
    "log: Callable[[str], object] | None = None) -> dict[str, dict[str, Any]]",
    "find_scheduler": "(pipe: DiffusionPipeline, name: str, num_inference_steps: int, "
    "variance: str | None = None) -> Any",
    "push_to_hub": "(model: Path | str, hub_model_id: str, *, private: bool | None = None, revision_message: str "
    "= Upload the model, license: str | None = None, space: str | None = None) -> list[str]",
}
CLASSES = {
    "Config", "DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "EvaluateConfig", "GaussianDiffusion", "ModelMixin",
    "Sampling", "SchedulerMixin", "UNet2DModel",
}  # fmt: skip


def test_public_names_are_frozen():
    assert set(hf_ddpm.__all__) == CLASSES | set(SIGNATURES)
    for name in hf_ddpm.__all__:
        public = getattr(hf_ddpm, name)
        assert public.__name__ == name and public.__doc__ and name in dir(hf_ddpm)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_functions_have_frozen_signature_and_document_all_arguments(name):
    function = getattr(hf_ddpm, name)
    signature = inspect.signature(function)
    assert re.sub(r"(\w+\.)+|\'", "", str(signature)) == SIGNATURES[name]
    assert all(f"    {name}: " in function.__doc__ for name in signature.parameters)
    assert "Raises:" in function.__doc__ and "Returns:" in function.__doc__


def test_importing_package_is_fast():
    code = "import hf_ddpm, sys; print([m for m in ('torch', 'diffusers', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_gaussian_diffusion_does_not_import_diffusers():
    code = "from hf_ddpm import GaussianDiffusion; import sys; print('diffusers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
