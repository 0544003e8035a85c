"""Whatever the layout."""

import os
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
    "missing": (lambda s: s.pop("mid.attn_1.q.bias"), r"the file lacks 1 of \d+ tensors: mid.attn_1.q.bias"),
    "unknown": (
        lambda s: s.update({"mid.attn_2.q.bias": torch.zeros(1)}),
        "the file holds 1 tensors of no known use: mid.attn_2.q.bias",
    ),
    "shape": (
        lambda s: s.update({"norm_out.weight": torch.zeros(31)}),
        r"norm_out.weight of shape \(31,\) does not fit conv_norm_out.weight of \(32,\)",
    ),
    "dimensions": (
        lambda s: s.update({"conv_in.weight": torch.zeros(32)}),
        r"conv_in.weight of shape \(32,\) is not allowed: 4 dimensions",
    ),
    "values": (lambda s: s["norm_out.bias"].fill_(float("nan")), "norm_out.bias holds values that are not finite"),
    "kind": (lambda s: s.pop("conv_in.weight"), "the file holds no conv_in.weight: it is no checkpoint of that kind"),
    "text": (lambda s: s.update(epoch="3"), "is no checkpoint: 'epoch' is of type str, only tensors are allowed"),
    "nothing": (lambda s: s.clear(), "is no checkpoint: it holds no tensors by name"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_wrong_checkpoint_is_one_line(convert, ported_file, tmp_path, change, message):
    damage(ported_file, tmp_path / "damaged.ckpt", change)
    with pytest.raises(ValueError, match=message) as caught:
        convert("ho2020", tmp_path / "damaged.ckpt", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("shape", "text"), [((190, 64, 1), r"\(190, 64, 1\)"), ((), r"\(\)")])
def test_tensors_that_cannot_be_taken_apart_are_named(shape, text):
    state = ImprovedNetwork().state_dict() | {"middle_block.1.qkv.weight": torch.zeros(shape)}
    conversion = improved_diffusion.plan(state, Hints(resolution=16, num_heads=1))
    with pytest.raises(ValueError, match=rf"middle_block.1.qkv.weight of shape {text} does not fit"):
        conversion.fill()


@pytest.mark.parametrize("name", ["none.pt", "none.npz", "folder"])
def test_what_cannot_be_read_is_one_line(convert, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"input='.*{name}' cannot be read: (No such file|Is a dir)"):
        convert("ho2020", tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize("name", ["junk.pt", "junk.npz", "junk.safetensors"])
def test_junk_is_one_line(convert, tmp_path, name):
    (tmp_path / name).write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=f"input='.*{name}' is no checkpoint: ") as caught:
        convert("improved-diffusion", tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_checkpoint_is_not_run(convert, ported_file, stock_folder, tmp_path):
    marker = tmp_path / "marker"
    state = torch.load(ported_file, weights_only=True)
    torch.save(state | {"code": Malicious(marker)}, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", code=np.array([Malicious(marker)], dtype=object))
    make_old(stock_folder, lambda old: old | {"code": Malicious(marker)})
    for layout, source, message in [
        ("ho2020", "model.pt", r"it holds more than numbers \(GLOBAL posix.mkdir\); nothing of it was run"),
        ("improved-diffusion", "model.pt", "GLOBAL posix.mkdir"),
        ("ho2020", "model.npz", r"more than numbers \(Object arrays\)"),
        ("stock", "stock", "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            convert(layout, tmp_path / source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not marker.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()  # the trap works


def test_a_dry_run_lists_both_sides_and_writes_nothing(convert, tensorflow_file, tmp_path, capsys):
    arrays = dict(np.load(tensorflow_file))
    del arrays["model/mid/attn_1/k/b/ExponentialMovingAverage"]
    arrays["model/extra/W"] = np.zeros((3, 3))
    np.savez(tmp_path / "model.npz", **arrays)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="the file lacks 1 of"):
        convert("ho2020", tmp_path / "model.npz", tmp_path / "out", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert "  model/conv_in/W/ExponentialMovingAverage -> conv_in.weight" in lines
    assert "  block_out_channels: (32, 64)" in lines and "  variance_type: fixed_large" in lines
    gone = lines.index("1 of the network that the file lacks:")
    assert lines[gone + 1] == "  model/mid/attn_1/k/b/ExponentialMovingAverage -> mid_block.attentions.0.to_k.bias"
    unknown = lines.index("2 of the file of no known use:")
    assert lines[unknown + 1 : unknown + 3] == ["  model/extra/W", "  model/mid/attn_1/k/b"]  # one has lost its average
    aside = lines[[line.endswith("left aside:") for line in lines].index(True) :]
    assert {"  global_step", "  model/conv_in/W", "  model/conv_in/W/Adam_1"} <= set(aside)
    assert convert("ho2020", tensorflow_file, tmp_path / "out", "--dry_run", "true") == 0
    assert files(tmp_path) == before


def test_what_is_known_of_a_conversion_is_printed(convert, ported_file, tmp_path, capsys):
    convert("ho2020", ported_file, tmp_path / "out")
    state = torch.load(ported_file, weights_only=True)
    count = sum(value.numel() for value in state.values())
    line = f"{count:,} parameters in {len(state)} tensors: all names, shapes and values are valid"
    assert line in capsys.readouterr().out.splitlines()


def test_a_folder_that_holds_something_is_left_alone(convert, ported_file, tmp_path):
    (tmp_path / "out").mkdir()
    convert("ho2020", ported_file, tmp_path / "out")  # empty: it may be there
    before = files(tmp_path / "out")
    for output, reason in [(tmp_path / "out", "it holds something"), (ported_file, "it is a file")]:
        with pytest.raises(ValueError, match=f"output='.*' is not allowed: {reason}"):
            convert("ho2020", ported_file, output)
    assert files(tmp_path / "out") == before


def test_a_kill_or_an_error_leaves_nothing_half_written(convert, ported_file, tmp_path, monkeypatch):
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


def test_the_script_says_what_is_wrong_and_exits_with_2(convert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert.py", "--from", "stock", "--input", "x", "--output", str(tmp_path), "--num_heads", "2"]
    )
    with pytest.raises(SystemExit) as caught:
        run_script(load_script("convert").main)
    assert caught.value.code == 2
    message = "convert.py: error: num_heads=2 is not allowed: stock checkpoints leave it no choice\n"
    assert capsys.readouterr().err == message
