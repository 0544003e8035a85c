"""Damage files and options of a tiny run, run a command that uses them, and count the outcomes.

    python -m tests.fuzz

Outcomes: `fine` (the same result as without the damage), `warned`, `rejected` (a one-line error that names the file or
the option), `unclear` (an error of several lines or without such a name), `traceback`, or `silent` (exit code 0 and
another result, without a warning).
"""

import contextlib
import hashlib
import io
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.conftest import TINY_RUN, load_script

OUTCOMES = ("fine", "warned", "rejected", "unclear", "traceback", "silent")
LIMIT = 20  # seconds per command
CHECKPOINT = "checkpoints/step-000000004"
VALUES = (None, [], {}, "x", "", -1, 0, 1, 2.5, True, [1, "x"], 10**30, float("nan"), float("inf"), "\0")
TEXTS = ("x", "", "nan", "inf", "-1", "1e400", str(10**30), "1\0", "0x10", "[1]", "None")
DAMAGED_JSON = (b"", b"null", b"[]", b"{}", b"7", b'"x"', b"\xff\xfe", b"{" * 5000, b'{"a": NaN}')


@dataclass(frozen=True)
class Mutation:
    """A damage, and the command to run on it.

    Attributes:
        group: Kind of file or options.
        name: Description of the change.
        damage: Changes the files of a copy of the run.
        command: A name in `COMMANDS`.
        expect: `same` (the same result, a warning or an error), `rejected` (an error), or `any` (exit code 0 is also
            fine).
        words: Further words of the command line.
        names: An error must contain one of these.
    """

    group: str
    name: str
    damage: Callable[[Path], object]
    command: str
    expect: str = "same"
    words: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


# The commands: functions of the folder and further words that return the result as text.


def sample(run: Path, words: tuple[str, ...]) -> str:
    """Sample two images with the model of the run."""
    out = run / "out"
    steps = ("--num_images", "2", "--num_inference_steps", "2", "--output", str(out))
    _main("sample", "--model", str(run), *steps, *words)
    return _digest(*sorted(out.glob("0*.png")))


def evaluate(run: Path, words: tuple[str, ...]) -> str:
    """Estimate the bound on two images."""
    out = run / "results.json"
    few = ("--metrics", "nll", "--num_images", "2", "--steps_per_image", "2")
    _main("evaluate", "--model", str(run), "--dataset", "digits", *few, "--output", str(out), *words)
    return str(json.loads(out.read_text())["nll"]["total_bpd"])


def compare(run: Path, words: tuple[str, ...]) -> str:
    """Compare a folder of samples with the digits."""
    out = run / "fd.json"
    few = ("--metrics", "fd", "--dataset", "digits", "--max_train_samples", "16")
    _main("evaluate", "--samples", str(run / "images"), *few[:4], "--output", str(out), *words)
    return str(json.loads(out.read_text())["fd"]["value"])


def resume(run: Path, words: tuple[str, ...]) -> str:
    """Resume the run for one step."""
    _main("train", *TINY_RUN, "--output_dir", str(run), "--max_train_steps", "5", *words)
    return json.loads((run / "export.json").read_text())["checksum"]


def train(run: Path, words: tuple[str, ...]) -> str:
    """Train a new run for one step."""
    out = run / "new"
    _main("train", *TINY_RUN, "--output_dir", str(out), "--max_train_steps", "1", *words)
    return json.loads((out / "export.json").read_text())["checksum"]


def train_images(run: Path, words: tuple[str, ...]) -> str:
    """Train a new run for one step on the folder `images`."""
    return train(run, ("--dataset", str(run / "images"), "--channels", "1", "--levels", "17", *words))


def train_config(run: Path, words: tuple[str, ...]) -> str:
    """Train a new run for one step with only the options of `config.yaml`."""
    out = run / "new"
    _main("train", "--config", str(run / "config.yaml"), "--output_dir", str(out), "--max_train_steps", "1", *words)
    return json.loads((out / "export.json").read_text())["checksum"]


def train_preset(run: Path, words: tuple[str, ...]) -> str:
    """Train a new run for one step with `config.yaml` as a preset."""
    from hf_ddpm import presets

    original, presets.PRESETS = presets.PRESETS, run / "presets"
    presets.PRESETS.mkdir()
    shutil.copy(run / "config.yaml", presets.PRESETS / "damaged.yaml")
    try:
        words = ("--output_dir", str(run / "new"), "--max_train_steps", "1", *words)
        _main("train", "--preset", "damaged", *words)
    finally:
        presets.PRESETS = original
    return json.loads((run / "new/export.json").read_text())["checksum"]


def card(run: Path, words: tuple[str, ...]) -> str:
    """Write the model card; the result lists words such as "nan" that it must not contain."""
    from hf_ddpm.hub.card import write_card

    (run / "README.md").unlink(missing_ok=True)
    shown = write_card(run).read_text().lower().split()
    return " ".join(word for word in shown if word.strip("|*,.;()±") in ("nan", "none", "inf", "null"))


def convert(run: Path, words: tuple[str, ...]) -> str:
    """Convert the run as a stock pipeline."""
    out = run / "converted"
    _main("convert", "--from", "stock", "--input", str(run), "--output", str(out), *words)
    return _digest(*sorted(out.glob("unet/*")), out / "scheduler/scheduler_config.json")


COMMANDS = {f.__name__: f for f in (sample, evaluate, compare, resume, train, train_images, train_config)}
COMMANDS |= {f.__name__: f for f in (train_preset, card, convert)}


def _main(script: str, *words: str) -> None:
    code = _script(script).main(list(words))
    assert code == 0, f"exit code {code}"


_scripts: dict[str, Any] = {}


def _script(name: str) -> Any:
    return _scripts.setdefault(name, None) or _scripts.update({name: load_script(name)}) or _scripts[name]


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# The mutations.


def mutations() -> Iterator[Mutation]:
    """Yield all mutations, always the same ones."""
    rng = random.Random(0)
    yield from _json(rng)
    yield from _jsonl(rng)
    yield from _checkpoints(rng)
    yield from _yaml(rng)
    yield from _weights(rng)
    yield from _images(rng)
    yield from _parquet(rng)
    yield from _options(rng)


def _json(rng: random.Random) -> Iterator[Mutation]:
    for file, group, commands, count in (
        ("model_index.json", "json: index", ("sample", "convert"), 3),
        ("unet/config.json", "json: network", ("sample",), 2),
        ("scheduler/scheduler_config.json", "json: scheduler", ("sample",), 3),
        ("results.json", "json: results", ("card", "evaluate"), 2),
        ("export.json", "json: export", ("card", "sample"), 3),
        ("status.json", "json: status", ("card",), 3),
    ):
        for content in rng.sample(DAMAGED_JSON, 4):
            command = rng.choice(commands)
            yield Mutation(group, f"{file} = {content[:12]!r}", _write(file, content), command, names=_parts(file))
        yield Mutation(group, f"{file} truncated", _truncate(file), commands[0], names=_parts(file))
        yield Mutation(group, f"{file} with an unknown key", _edit(file, ("unknown_key",), 7), "card", "any")
        for key in _keys(file):
            for value in rng.sample((*VALUES, _GONE), count):
                where = (*_parts(file), "_blocks.", *(k for k in key if k.isidentifier()))
                name = f"{file} {'.'.join(key)} = {value!r}"
                yield Mutation(group, name, _edit(file, key, value), rng.choice(commands), names=where)


def _jsonl(rng: random.Random) -> Iterator[Mutation]:
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        lines = (
            b"",
            b"\xff\xfe\n",
            b"null\n",
            b"[1]\n",
            b'{"step": "x"}\n',
            b'{"step": 2}\n',
            b'{"loss": NaN, "step": 3}',
        )
        lines += (b'{"step": 3, "loss": "x"}\n{"step": 4, "loss": null}\n', b'{"step": 1, "loss"', b"{" * 5000, b"\0\0")
        for line in lines:
            for command in ("card", "resume"):
                yield Mutation("jsonl", f"{file} + {line[:24]!r}", _append(file, line), command, names=(file,))
        yield Mutation("jsonl", f"{file} truncated", _truncate(file), "resume", names=(file,))


def _checkpoints(rng: random.Random) -> Iterator[Mutation]:
    for name in ("state.json", "manifest.json"):
        file = f"{CHECKPOINT}/{name}"
        for content in rng.sample(DAMAGED_JSON, 3):
            yield Mutation(
                "checkpoint",
                f"{name} = {content[:12]!r}",
                _write(file, content),
                "resume",
                names=(name, "step-000000004"),
            )
    for name in ("unet.safetensors", "optimizer.safetensors", "state.json"):
        yield Mutation(
            "checkpoint", f"{name} bit", _flip(f"{CHECKPOINT}/{name}", 900), "resume", "rejected", names=(name,)
        )
        yield Mutation(
            "checkpoint", f"{name} gone", _remove(f"{CHECKPOINT}/{name}"), "resume", "rejected", names=(name,)
        )
    # Damage with a matching manifest, as an older version or a manual edit may leave it.
    file = f"{CHECKPOINT}/state.json"
    for content in DAMAGED_JSON:
        name = f"sealed state.json = {content[:12]!r}"
        yield Mutation("checkpoint", name, _sealed(_write(file, content)), "resume", "rejected", names=("state.json",))
    for key in ("step", "global_batch_size", "scaler", "config", "data", "hub_ids", "unet", "scheduler"):
        for value in rng.sample((*VALUES, _GONE), 3):
            damage = _sealed(_edit(file, (key,), value))
            yield Mutation(
                "checkpoint", f"sealed {key} = {value!r}", damage, "resume", names=("step-000000004", "state.json")
            )
    for name in ("unet", "optimizer", "ema-0.995"):
        tensors = f"{CHECKPOINT}/{name}.safetensors"
        for kind, change in TENSOR_CHANGES.items():
            damage = _sealed(_tensors(tensors, change))
            yield Mutation("checkpoint", f"sealed {name} {kind}", damage, "resume", names=(name, "step-000000004"))


def _yaml(rng: random.Random) -> Iterator[Mutation]:
    file = "config.yaml"
    for content in (
        b"",
        b"- 1\n",
        b"x",
        b"a: [",
        b"\xff\xfe",
        b"a: !!python/object:os.system x",
        b"{" * 3000,
        b"? [a]\n: 1",
        b"\t",
    ):
        for command in ("train_config", "card"):
            yield Mutation(
                "yaml", f"{command} {content[:12]!r}", _write(file, content), command, "any", names=(file, "dataset")
            )
    for key, wrong in (
        ("learning_rate", "nan"), ("learning_rate", ".inf"), ("train_batch_size", "8.5"), ("train_batch_size", "0"),
        ("dropout", "x"), ("resolution", "{a: 1}"), ("resolution", "[]"), ("block_out_channels", "[8, x]"),
        ("ema_decay", "[.nan]"), ("beta_end", "1e400"), ("horizontal_flip", "perhaps"), ("num_train_timesteps", "-5"),
        ("prediction_type", "epsilom"), ("learning_rat", "0.1"), ("seed", "1e30"), ("layers_per_block", "true"),
        ("norm_num_groups", "3"), ("lr_schedule", "[constant]"), ("channels", "7"), ("levels", "1"), ("1", "2"),
    ):  # fmt: skip
        for command in rng.sample(("train_config", "train_preset"), 1):
            name = f"{command} {key}: {wrong}"
            yield Mutation("yaml", name, _replace_line(file, key, wrong), command, "rejected", names=(key, file))
    for key in ("dataset", "seed", "license", "class_dropout", "max_train_steps", "learning_rate", "resolution"):
        for value in rng.sample(VALUES, 2):
            yield Mutation("yaml", f"card {key} = {value!r}", _edit_yaml(file, key, value), "card", names=(file, key))


def _weights(rng: random.Random) -> Iterator[Mutation]:
    file = "unet/diffusion_pytorch_model.safetensors"
    names = (*_parts(file), "weights", "model", "conv_in.weight", "other.weight")
    for command in ("sample", "convert", "evaluate", "card"):
        for kind, change in TENSOR_CHANGES.items():
            expect = "same" if command != "card" else "any"
            yield Mutation("safetensors", f"{command}: {kind}", _tensors(file, change), command, expect, names=names)
        for offset in (0, 3, 7, 9, 40, 200, 100_000):
            yield Mutation("safetensors", f"{command}: bit at {offset}", _flip(file, offset), command, names=names)
        yield Mutation("safetensors", f"{command}: truncated", _truncate(file), command, "rejected", names=names)
        yield Mutation("safetensors", f"{command}: empty", _write(file, b""), command, "rejected", names=names)
        yield Mutation("safetensors", f"{command}: gone", _remove(file), command, "rejected", names=names)
    del rng


def _images(rng: random.Random) -> Iterator[Mutation]:
    kinds = ("png", "jpg", "tiff", "webp", "bmp", "gif", "npy", "npz")
    for kind in kinds:
        file = f"images/3.{kind}"
        for name, damage in (
            ("truncated", _truncate(file)), ("empty", _write(file, b"")), ("text", _write(file, b"no image\n" * 9)),
            ("zeros", _write(file, bytes(300))),
        ):  # fmt: skip
            command = rng.choice(("train_images", "compare")) if kind in ("png", "npz") else "train_images"
            expect = "any" if name == "truncated" and kind in ("npz", "gif") else "rejected"
            yield Mutation(
                "images",
                f"{command} {kind} {name}",
                _then(_folder(kind), damage),
                command,
                expect,
                names=(f"3.{kind}", "--samples"),
            )
        for offset in (1, 20, 60):
            # Only PNG and ZIP have checksums; in other formats a changed byte may give a valid image.
            expect = "same" if kind in ("png", "npz") else "any"
            damage = _then(_folder(kind), _flip(file, offset))
            yield Mutation("images", f"{kind} byte {offset}", damage, "train_images", expect, names=(f"3.{kind}",))
        other = rng.choice([k for k in kinds[:5] if k != kind])
        damage = _then(_folder(kind), _copy(f"images/3.{kind}", f"images/9.{other}"))
        yield Mutation("images", f"{kind} named .{other}", damage, "train_images", "any", names=(f"9.{other}",))
    yield Mutation("images", "no folder", lambda run: None, "train_images", "rejected", names=("images",))
    yield Mutation(
        "images", "empty folder", lambda run: (run / "images").mkdir(), "train_images", "rejected", names=("images",)
    )


def _parquet(rng: random.Random) -> Iterator[Mutation]:
    file = "images/train.parquet"
    for name, damage in (
        ("truncated", _truncate(file)), ("empty", _write(file, b"")), ("text", _write(file, b"PAR1" * 9)),
        ("numbers", _table(image=[1, 2, 3])), ("text column", _table(image=["a", "b", "c"])),
        ("lists", _table(image=[[1], [2], []])), ("nulls", _table(image=[None, b"x", b"y"])),
        ("no images", _table(label=[1, 2])), ("no rows", _table(image=[])), ("bytes", _table(image=[b"x", b"y"])),
    ):  # fmt: skip
        yield Mutation(
            "parquet", name, _then(_rows, damage), "train_images", "rejected", names=("images", "image_column")
        )
    for offset in (5, 200, 1200, -60, -200, -8, -2, -6):
        yield Mutation(
            "parquet", f"byte {offset}", _then(_rows, _flip(file, offset)), "train_images", names=("images",)
        )
    del rng


NUMBERS = {
    "train": (
        "train_batch_size", "learning_rate", "max_train_steps", "warmup_steps", "ema_decay", "seed", "resolution",
        "channels", "levels", "dropout", "class_dropout", "num_train_timesteps", "beta_start", "beta_end",
        "block_out_channels", "norm_num_groups", "layers_per_block", "log_steps", "checkpointing_steps",
        "num_samples", "gradient_accumulation_steps", "max_train_samples", "attention_resolutions",
    ),
    "sample": ("num_images", "num_inference_steps", "batch_size", "seed", "eta", "guidance_scale"),
    "evaluate": ("num_images", "steps_per_image", "batch_size", "seed", "max_train_samples"),
}  # fmt: skip


def _options(rng: random.Random) -> Iterator[Mutation]:
    for command, options in NUMBERS.items():
        for name in options:
            for text in rng.sample(TEXTS, 3):
                # These are numbers, which may be valid; all others are not numbers.
                is_number = text in ("-1", "1e400", str(10**30)) or (not text and name == "max_train_samples")
                is_list = text in ("", "None") and name in ("attention_resolutions", "max_train_samples")
                expect = "any" if is_number or is_list else "rejected"
                words = (f"--{name}={text}",)
                yield Mutation(
                    "options",
                    f"{command} {words[0]!r}",
                    _nothing,
                    command,
                    expect,
                    words,
                    (name, name.replace("_", " ")),
                )
    for command, words, *names in (
        ("train", ("--learnin_rate=1",), "learning_rate"), ("sample", ("--num_image=1",), "num_images"),
        ("evaluate", ("--metric=fd",), "metrics"), ("convert", ("--imput=x",), "input"),
        ("sample", ("--model=",), "model"), ("sample", ("--model=x\0y",), "model"),
        ("sample", ("--output=",), "output"),
        ("sample", ("--output=a\0b",), "output"), ("sample", ("--format=jpg",), "format"),
        ("sample", ("stray",), "stray"),
        ("sample", ("--sampler=dimm",), "sampler"), ("train", ("--dataset=",), "dataset"),
        ("train", ("--dataset=a\0b",), "dataset"), ("train", ("--output_dir=",), "output_dir"),
        ("train", ("--output_dir=a\0b",), "output_dir"), ("train", ("--preset=\0",), "preset"),
        ("train", ("--config=",), "config"), ("train", ("--config=/",), "/"), ("train", ("--config=a\0b",), "config"),
        ("train", ("--resume=a\0b",), "resume"), ("train", ("--init_from=a\0b",), "init_from"),
        ("train", ("--split=a\0b", "--dataset=digits"), "split"), ("evaluate", ("--metrics=nan",), "metrics"),
        ("evaluate", ("--metrics=",), "metrics"), ("evaluate", ("--output=a\0b",), "output"),
        ("evaluate", ("--output=",), "output"), ("evaluate", ("--dataset=a\0b",), "dataset"),
        ("evaluate", ("--output=/dev/null/x.json",), "/dev/null"), ("convert", ("--input=a\0b",), "input"),
        ("convert", ("--output=",), "output"), ("convert", ("--output=a\0b",), "output"),
        ("convert", ("--from=other",), "from"), ("train", ("--lr_schedule",), "lr_schedule"),
        ("train", ("--value_range=1", "0"), "value_range"), ("train", ("--value_range=nan", "1"), "value_range"),
        ("train", ("--background=nocolor",), "background"), ("evaluate", ("--background=a\0b",), "background"),
    ):  # fmt: skip
        yield Mutation("options", f"{command} {' '.join(words)!r}", _nothing, command, "rejected", words, tuple(names))


# The damages: functions that return a function of the folder.


class _Gone:
    def __repr__(self) -> str:
        return "(gone)"


_GONE = _Gone()
_document: dict[str, Any] = {}  # the undamaged JSON files, set by `prepare`


def _parts(file: str) -> tuple[str, ...]:
    return file, Path(file).name


def _keys(file: str) -> list[tuple[str, ...]]:
    """Return the paths of the keys of a JSON file, up to a depth of three, without details of the provenance."""

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, item in value.items() if isinstance(value, dict) else ():
            if not key.startswith("_diffusers"):
                yield (*path, key)
            if key not in ("made_by", "terms") and len(path) < 2:
                yield from walk(item, (*path, key))

    return list(walk(_document[file], ()))


def _nothing(run: Path) -> None:
    pass


def _then(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: [damage(run) for damage in damages]


def _write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes(content)


def _append(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes((run / file).read_bytes() + content)


def _remove(file: str) -> Callable[[Path], object]:
    return lambda run: (run / file).unlink()


def _copy(file: str, to: str) -> Callable[[Path], object]:
    return lambda run: shutil.copy(run / file, run / to)


def _truncate(file: str) -> Callable[[Path], object]:
    return lambda run: (run / file).write_bytes((run / file).read_bytes()[: (run / file).stat().st_size * 2 // 3])


def _flip(file: str, offset: int) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        content = bytearray((run / file).read_bytes())
        content[offset if offset < 0 else min(offset, len(content) - 1)] ^= 0x41
        (run / file).write_bytes(content)

    return damage


def _edit(file: str, key: tuple[str, ...], value: Any) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        document = json.loads((run / file).read_text())
        place = document
        for part in key[:-1]:
            place = place[part]
        if value is _GONE:
            del place[key[-1]]
        else:
            place[key[-1]] = value
        (run / file).write_text(json.dumps(document, indent=2))

    return damage


def _edit_yaml(file: str, key: str, value: Any) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        options = yaml.safe_load((run / file).read_text()) | {key: value}
        (run / file).write_text(yaml.safe_dump(options))

    return damage


def _replace_line(file: str, key: str, text: str) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        options = yaml.safe_load((run / file).read_text())
        options.pop(key, None)
        (run / file).write_text(yaml.safe_dump(options) + f"{key}: {text}\n")

    return damage


def _sealed(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(run: Path) -> None:
        damage(run)
        folder = run / CHECKPOINT
        files = [file for file in folder.iterdir() if file.name != "manifest.json"]
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return both


def _tensors(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(run: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: value.clone() for name, value in load_file(run / file).items()}
        change(tensors)
        save_file(tensors, run / file, {"format": "pt"})

    return damage


def _first(tensors: dict[str, Any]) -> str:
    return min(name for name, value in tensors.items() if value.ndim > 1)


TENSOR_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "NaN": lambda t: t[_first(t)].view(-1)[0].fill_(float("nan")),
    "missing tensor": lambda t: t.pop(_first(t)),
    "superfluous tensor": lambda t: t.update({"other.weight": t[_first(t)].clone()}),
    "wrong shape": lambda t: t.update({_first(t): t[_first(t)][:1].clone()}),
    "transposed": lambda t: t.update({_first(t): t[_first(t)].transpose(0, 1).contiguous()}),
    "whole numbers": lambda t: t.update({_first(t): t[_first(t)].long()}),
    "no tensors": lambda t: t.clear(),
}


def _image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8)


def _folder(kind: str) -> Callable[[Path], object]:
    """Return a function that writes a folder of eight images."""

    def make(run: Path) -> None:
        folder = run / "images"
        folder.mkdir()
        for index in range(8):
            path, array = folder / f"{index}.{kind}", _image(index)
            if kind == "npy":
                np.save(path, array)
            elif kind == "npz":
                np.savez(path, array)
            else:
                Image.fromarray(array).save(path)

    return make


def _rows(run: Path) -> None:
    """Write a table of eight images."""
    contents = []
    for index in range(8):
        Image.fromarray(_image(index)).save(buffer := io.BytesIO(), "png")
        contents.append(buffer.getvalue())
    (run / "images").mkdir()
    _table(image=contents)(run)


def _table(**columns: list[Any]) -> Callable[[Path], object]:
    def write(run: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), run / "images/train.parquet")

    return write


# The runner.


class _OutOfTime(BaseException):
    pass


def prepare(folder: Path) -> Path:
    """Train and evaluate the run to damage, with a checkpoint at step 4; return its folder."""
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _main("train", *TINY_RUN, "--output_dir", str(run), "--max_train_steps", "4")
        evaluate(run, ())
        line = {"step": 4, **json.loads((run / "results.json").read_text())}
    (run / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    _document.update({str(f.relative_to(run)): json.loads(f.read_text()) for f in run.rglob("*.json")})
    return run


def attempt(mutation: Mutation, run: Path, folder: Path) -> tuple[str, str]:
    """Return the state of a command (`ok`, `warned`, `rejected` or `traceback`), and its result or its error."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(run, work)
    mutation.damage(work)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    out = io.StringIO()
    here = Path.cwd()
    previous = signal.signal(signal.SIGALRM, _end)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        with contextlib.chdir(work), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = COMMANDS[mutation.command](work, mutation.words)
    except (ValueError, OSError, FloatingPointError) as error:
        return "rejected", str(error)
    except (Exception, SystemExit, _OutOfTime):
        return "traceback", traceback.format_exc(limit=-2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        logging.getLogger().removeHandler(handler)
        assert Path.cwd() == here
    is_warned = logged.getvalue() or "passed over" in out.getvalue() or "skipped" in out.getvalue()
    return ("warned" if is_warned else "ok"), result


def _end(number: int, frame: Any) -> None:
    raise _OutOfTime(f"runs for more than {LIMIT} s")


def judge(mutation: Mutation, state: str, result: str, undamaged: str) -> str:
    """Return the outcome of an attempt, one of `OUTCOMES`."""
    if state == "traceback":
        return state
    if state == "rejected":
        is_clear = "\n" not in result and result and any(name in result for name in mutation.names or ("",))
        return "rejected" if is_clear else "unclear"
    if state == "warned":
        return "warned"
    is_same = mutation.expect == "any" or (mutation.expect == "same" and result == undamaged)
    return "fine" if is_same else "silent"


def _undamaged(mutation: Mutation) -> Mutation:
    damage: Callable[[Path], object] = _nothing
    if mutation.group == "images":
        damage = _folder(mutation.name.split()[0])
    elif mutation.group == "parquet":
        damage = _rows
    return replace(mutation, damage=damage, words=(), expect="any")


def fuzz(folder: Path, report: Callable[[str], object] | None = None) -> Counter[tuple[str, str]]:
    """Try all mutations.

    Args:
        folder: Working folder.
        report: Called with a line per bad outcome, and with the counts at the end.

    Returns:
        Counts by group and outcome.
    """
    report = report or (lambda line: None)
    run = prepare(folder)
    counts: Counter[tuple[str, str]] = Counter()
    results: dict[tuple[str, str], str] = {}
    for mutation in mutations():
        undamaged = ""
        if mutation.expect == "same":
            key = mutation.command, mutation.name.split()[0] if mutation.group in ("images", "parquet") else ""
            if key not in results:
                state, results[key] = attempt(_undamaged(mutation), run, folder)
                if state != "ok":
                    raise RuntimeError(f"{mutation.command} without damage: {state}: {results[key]}")
            undamaged = results[key]
        state, result = attempt(mutation, run, folder)
        outcome = judge(mutation, state, result, undamaged)
        counts[mutation.group, outcome] += 1
        if outcome in OUTCOMES[3:]:
            report(f"{outcome}: {mutation.group}: {mutation.command}: {mutation.name[:90]}: {result.strip()[-600:]!r}")
    report(table(counts))
    return counts


def table(counts: Counter[tuple[str, str]]) -> str:
    """Return the counts as text: the number of mutations and the outcomes, per group and in total."""
    groups = list(dict.fromkeys(group for group, _ in counts))
    lines = [f"{'':16}{'tried':>10}" + "".join(f"{name:>10}" for name in OUTCOMES)]
    for group in [*groups, "all"]:
        row = [sum(n for (g, o), n in counts.items() if g == group or group == "all" if o == name) for name in OUTCOMES]
        lines.append(f"{group:16}{sum(row):>10}" + "".join(f"{count:>10}" for count in row))
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        total = fuzz(Path(temporary), lambda line: print(line, flush=True))
    sys.exit(any(outcome in OUTCOMES[3:] for _, outcome in total))
