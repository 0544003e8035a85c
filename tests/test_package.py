import subprocess
import sys

import hf_ddpm


def test_public_names_are_there():
    assert set(hf_ddpm.__all__) == {
        "DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "GaussianDiffusion", "ModelMixin", "SchedulerMixin",
        "UNet2DModel",
    }  # fmt: skip
    for name in hf_ddpm.__all__:
        assert getattr(hf_ddpm, name).__name__ == name
        assert name in dir(hf_ddpm)


def test_importing_the_package_imports_nothing_heavy():
    code = "import hf_ddpm, sys; print([m for m in ('torch', 'diffusers', 'datasets') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_mathematics_does_without_diffusers():
    code = "from hf_ddpm import GaussianDiffusion; import sys; print('diffusers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
