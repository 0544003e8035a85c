"""Conversion of checkpoints, independent of the layout."""

import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline
from hf_ddpm.hub.convert import improved_diffusion
from hf_ddpm.hub.convert.hints import Hints
from hf_ddpm.utils.launch import run_script
from tests.conftest import load_script
from tests.hub.convert.comparing import files, make_old
from tests.hub.convert.improved_diffusion_network import ImprovedNetwork


def damage(ported_file, path, change):
    state = torch.load(ported_file, weights_only=True)
    change(state)
    torch.save(state, path)


DAMAGES = {
    "missing": (lambda s: s.pop("mid.attn_1.q.bias"), r"1 of \d+ tensors are missing in the file: mid.attn_1.q.bias"),
    "unknown": (
        lambda s: s.update({"mid.attn_2.q.bias": torch.zeros(1)}),
        "unknown tensors in the file: 1, mid.attn_2.q.bias",
    ),
    "shape": (
        lambda s: s.update({"norm_out.weight": torch.zeros(31)}),
        r"norm_out.weight: shape \(31,\); expected that of conv_norm_out.weight, \(32,\)",
    ),
    "dimensions": (
        lambda s: s.update({"conv_in.weight": torch.zeros(32)}),
        r"conv_in.weight: shape \(32,\); expected 4 non-empty dimensions",
    ),
    "values": (lambda s: s["norm_out.bias"].fill_(float("nan")), "norm_out.bias: not all values are finite"),
    "kind": (
        lambda s: s.pop("conv_in.weight"),
        r"conv_in.weight is missing in the file; expected a checkpoint of the chosen layout \(--from\)",
    ),
    "text": (lambda s: s.update(epoch="3"), "not a checkpoint: 'epoch' has type str; expected a tensor"),
    "nothing": (lambda s: s.clear(), "not a checkpoint: expected a dictionary of tensors"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_raises_one_line_error(convert, ported_file, tmp_path, change, message):
    damage(ported_file, tmp_path / "damaged.ckpt", change)
    with pytest.raises(ValueError, match=message) as caught:
        convert("ho2020", tmp_path / "damaged.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shape", "text"), [((190, 64, 1), r"\(190, 64, 1\)"), ((), r"\(\)")])
def test_error_names_tensors_that_cannot_be_split(shape, text):
    state = ImprovedNetwork().state_dict() | {"middle_block.1.qkv.weight": torch.zeros(shape)}
    conversion = improved_diffusion.plan(state, Hints(resolution=16, num_heads=1))
    with pytest.raises(ValueError, match=rf"middle_block.1.qkv.weight: shape {text}; expected"):
        conversion.fill()


@pytest.mark.parametrize("name", ["none.pt", "none.npz", "folder"])
def test_unreadable_file_raises_one_line_error(convert, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}: cannot be read: (No such file|Is a dir)"):
        convert("ho2020", tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["junk.pt", "junk.npz", "junk.safetensors"])
def test_file_of_unknown_format_raises_one_line_error(convert, tmp_path, name):
    (tmp_path / name).write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=f"{tmp_path}/{name}: not a checkpoint: damaged, or not of the") as caught:
        convert("improved-diffusion", tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_checkpoint_is_not_executed(convert, ported_file, stock_folder, tmp_path):
    marker = tmp_path / "marker"
    state = torch.load(ported_file, weights_only=True)
    torch.save(state | {"code": Malicious(marker)}, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", code=np.array([Malicious(marker)], dtype=object))
    make_old(stock_folder, lambda old: old | {"code": Malicious(marker)})
    for layout, source, message in [
        ("ho2020", "model.pt", r"contains code or objects \(GLOBAL posix.mkdir\), which were not loaded"),
        ("improved-diffusion", "model.pt", "GLOBAL posix.mkdir"),
        ("ho2020", "model.npz", r"contains code or objects \(Object arrays\)"),
        ("stock", "stock", "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            convert(layout, tmp_path / source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not marker.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()  # unsafe loading does run the code


def test_dry_run_lists_all_names_and_writes_nothing(convert, tensorflow_file, tmp_path, capsys):
    arrays = dict(np.load(tensorflow_file))
    del arrays["model/mid/attn_1/k/b/ExponentialMovingAverage"]
    arrays["model/extra/W"] = np.zeros((3, 3))
    np.savez(tmp_path / "model.npz", **arrays)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors are missing"):
        convert("ho2020", tmp_path / "model.npz", tmp_path / "out", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert "  model/conv_in/W/ExponentialMovingAverage -> conv_in.weight" in lines
    assert "  block_out_channels: (32, 64)" in lines and "  variance_type: fixed_large" in lines
    missing = lines.index("missing in the file: 1")
    assert lines[missing + 1] == "  model/mid/attn_1/k/b/ExponentialMovingAverage -> mid_block.attentions.0.to_k.bias"
    unknown = lines.index("unknown: 2")
    assert lines[unknown + 1 : unknown + 3] == ["  model/extra/W", "  model/mid/attn_1/k/b"]  # k/b lacks its average
    ignored = lines[[line.startswith("ignored: ") for line in lines].index(True) :]
    assert {"  global_step", "  model/conv_in/W", "  model/conv_in/W/Adam_1"} <= set(ignored)
    assert convert("ho2020", tensorflow_file, tmp_path / "out", "--dry_run", "true") == 0
    assert files(tmp_path) == before


def test_conversion_prints_summary(convert, ported_file, tmp_path, capsys):
    convert("ho2020", ported_file, tmp_path / "out")
    state = torch.load(ported_file, weights_only=True)
    count = sum(value.numel() for value in state.values())
    line = f"{count:,} parameters in {len(state)} tensors: all names, shapes and values are valid"
    assert line in capsys.readouterr().out.splitlines()


def test_existing_output_is_not_changed(convert, ported_file, tmp_path):
    (tmp_path / "out").mkdir()
    convert("ho2020", ported_file, tmp_path / "out")  # an empty folder is allowed
    before = files(tmp_path / "out")
    for output, reason in [(tmp_path / "out", "folder is not empty"), (ported_file, "is a file")]:
        with pytest.raises(ValueError, match=f"--output {output}: {reason}; expected a new or empty folder"):
            convert("ho2020", ported_file, output)
    assert files(tmp_path / "out") == before


def test_kill_or_error_leaves_no_partial_output(convert, ported_file, tmp_path, monkeypatch):
    def interrupted(end):
        def save_pretrained(pipe, folder):
            (folder / "unet").mkdir(parents=True)
            for name in ("config.json", "stray.safetensors"):
                (folder / "unet" / name).write_text("{")
            end()

        return save_pretrained

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", interrupted(fail))
    with pytest.raises(OSError, match="disk full"):
        convert("ho2020", ported_file, tmp_path / "out")
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", interrupted(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if os.fork() == 0:
        try:
            convert("ho2020", ported_file, tmp_path / "out")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())

    monkeypatch.undo()
    convert("ho2020", ported_file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").rglob("stray*"))


def test_script_prints_error_and_exits_with_code_2(convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert.py", "--from", "stock", "--input", "x", "--output", str(tmp_path), "--num_heads", "2"]
    )
    with pytest.raises(SystemExit) as caught:
        run_script(load_script("convert").main)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    expected = r"convert.py: error: (--)?num_heads.2.*: does not apply to stock checkpoints; expected no value\n"
    assert re.fullmatch(expected, errors)
