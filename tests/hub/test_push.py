"""Contents and failures of pushes, with the unmodified Hub client."""

import hashlib
import json
import shutil
from io import BytesIO
from zipfile import ZipFile

import pytest

from hf_ddpm.hub.push import model_files, push_model
from tests.conftest import LIMIT, load_script
from tests.hub.conftest import CALL, PRIVATE, PUSHED, ROOT, contents

pytestmark = pytest.mark.hub

UNET = "unet/diffusion_pytorch_model.safetensors"
README = "---\ntitle: Demo\nsdk: gradio\npython_version: '3.11'\nmodels: [else/where]\n---\n"


def test_push_is_one_commit_of_only_model(hub, folder):
    before = contents(folder)
    pushed = hub.push(folder, private=True, message="First")
    commits = hub.repo()["commits"]
    assert [commit["title"] for commit in commits] == ["initial commit", "First"] and hub.repo()["private"]
    remote = hub.files()
    assert set(remote) - {".gitattributes"} == set(PUSHED)
    assert not set(remote) & set(PRIVATE)
    assert all(remote[name] == before[name] for name in PUSHED)
    assert pushed == f"{hub.url}/org/x"
    assert contents(folder) == before


@pytest.mark.slow
def test_only_changed_files_are_uploaded_again(hub, folder):
    hub.push(folder)
    sent = hub.requests("PUT")
    hub.push(folder)
    assert len(hub.repo()["commits"]) == 2 and hub.requests("PUT") == sent
    shutil.copy(folder / "ema-0.5" / UNET, folder / UNET)  # the Hub has it, under another name
    (folder / "samples.png").write_text("another picture")
    hub.push(folder)
    assert hub.requests("PUT")[len(sent) :] == [f"PUT /lfs/{hashlib.sha256(b'another picture').hexdigest()}"]
    assert hub.files()[UNET] == (folder / UNET).read_bytes()


@pytest.mark.slow
def test_stale_weights_are_deleted_and_other_files_are_kept(hub, folder, tiny_pipeline):
    shutil.rmtree(folder / "unet")
    tiny_pipeline.save_pretrained(folder, max_shard_size="20KB")
    hub.push(folder)
    shards = {name for name in hub.files() if "-of-" in name}
    assert len(shards) > 1 and "unet/diffusion_pytorch_model.safetensors.index.json" in hub.files()
    shutil.rmtree(folder / "unet")
    tiny_pipeline.save_pretrained(folder)
    for name in ("loss.png", "README.md"):
        (folder / name).unlink()
    hub.push(folder)
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED)  # keeps loss.png and README.md


def test_best_models_and_further_results_are_pushed(folder):
    shutil.copytree(folder / "ema-0.5", folder / "best")
    for name in ("best/results.json", "results_dinov2.json", "evaluations.jsonl"):
        (folder / name).write_text("{}")
    best = {f"best/{name}" for name in PUSHED if "/" in name and "ema" not in name}
    more = {"best/model_index.json", "best/results.json", "results_dinov2.json", "evaluations.jsonl"}
    files = model_files(folder)
    assert set(files) == {*PUSHED, *best, *more} and len(set(files)) == len(files)


BROKEN = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
    "no JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json: invalid JSON"),
    "no object": (lambda folder: (folder / "model_index.json").write_text("[]"), "index.json: expected a JSON object"),
    "no components": (lambda folder: (folder / "model_index.json").write_text("{}"), "json lists no components"),
    "no weights": (lambda folder: (folder / UNET).unlink(), r"weights unet/\*.safetensors are missing"),
    "no network": (lambda folder: shutil.rmtree(folder / "unet"), "unet/config.json is missing"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler/config.json is missing"),
    "truncated file": (lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1]), "is damaged"),
    "truncated average": (lambda folder: (folder / "ema-0.5" / UNET).write_bytes(b""), "ema-0.5.*is damaged"),
    "missing shard": (
        lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "unet/b.safetensors is missing",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_incomplete_models_are_not_pushed(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        push_model(folder, "org/x")  # fails before any request
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_push_with_another_visibility_is_refused(hub, folder):
    for private, actual, requested in [(True, "public", "private"), (False, "private", "public")]:
        hub.push(folder, f"org/{actual}", private=not private)
        commits = hub.repo(f"org/{actual}")["commits"]
        (folder / "config.yaml").write_text(f"{private}")
        kind, line = hub.push(folder, f"org/{actual}", private=private)
        assert (kind, line) == (
            "ValueError",
            f"cannot push to org/{actual}: the repository is {actual}, but {requested} was requested; change its "
            "settings on the Hub, or omit the option",
        )
        assert hub.repo(f"org/{actual}")["commits"] == commits
        hub.push(folder, f"org/{actual}")
        assert hub.repo(f"org/{actual}")["private"] is not private
        assert len(hub.repo(f"org/{actual}")["commits"]) == 3


REFUSED = [
    (None, "org/x", "no token found; log in with `hf auth login`, or set HF_TOKEN"),
    ("hf_nobody", "org/x", "the Hub rejected the token; log in with `hf auth login`, or set HF_TOKEN"),
    ("hf_read", "org/x", "the token has no write permission: Authorization error."),
    ("hf_read", "org/new", "the token has no write permission: You don't have the rights"),
    ("hf_stranger", "org/x", "the token has no write permission: You don't have the rights"),
    ("hf_write", "nowhere/x", "the token has no write permission: You don't have the rights"),
    ("hf_write", "x", "expected a repository name of the form namespace/name"),
    ("hf_write", "org/a b", "Repo id must use alphanumeric chars"),
]


@pytest.mark.slow
def test_refused_push_raises_one_line_error(hub, folder):
    hub.push(folder, private=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    before = contents(folder), (hub.folder / "repos.json").read_text()
    for token, repo_id, message in REFUSED:
        kind, line = hub.push(folder, repo_id, token=token)
        assert kind == "ValueError" and line.startswith(f"cannot push to {repo_id}: {message}")
        assert "\n" not in line and (contents(folder), (hub.folder / "repos.json").read_text()) == before


def test_invalid_card_is_reported_before_any_upload(hub, folder):
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    kind, line = hub.push(folder)
    assert kind == "ValueError" and "Invalid metadata in README.md" in line and "\n" not in line
    assert not hub.requests("PUT")


def test_check_push_reports_errors_without_push(hub):
    assert hub.call("check_push", repo_id="org/x", private=True) is None and hub.repo()["private"]
    assert hub.call("check_push", repo_id="org/x", token="hf_read") == [
        "ValueError", "cannot push to org/x: the token is read-only; expected one with write permission",
    ]  # fmt: skip
    assert "the repository is private" in hub.call("check_push", repo_id="org/x", private=False)[1]


@pytest.mark.parametrize("status", [500, 503])
def test_failed_push_raises_one_line_error_and_can_be_repeated(hub, folder, status):
    hub.fault({"match": "POST /api/models/org/x/commit", "status": status, "message": "out of order"})
    before = contents(folder)
    kind, line = hub.push(folder)
    assert kind == "OSError" and "out of order" in line and "\n" not in line
    assert contents(folder) == before and len(hub.repo()["commits"]) == 1
    sent = hub.requests("PUT")
    hub.fault()
    hub.push(folder)
    assert set(hub.files()) > set(PUSHED) and hub.requests("PUT") == sent


@pytest.mark.slow
def test_push_after_hub_was_killed_during_upload(hub, folder):
    oid = hashlib.sha256((folder / UNET).read_bytes()).hexdigest()
    hub.fault({"match": f"PUT /lfs/{oid}", "stall": True})
    before = contents(folder)
    options = {"folder": str(folder), "repo_id": "org/x"}
    client = hub.popen("-c", CALL, "push_model", json.dumps(options))
    hub.wait_for(f"PUT /lfs/{oid}")
    hub.wait_for("POST /lfs/")  # other files are complete
    hub.kill()
    output, errors = client.communicate(timeout=LIMIT)
    kind, line = json.loads(output.splitlines()[-1])
    assert kind == "OSError" and "\n" not in line
    assert line.startswith(f"cannot push to org/x: {hub.url} does not respond: ")
    assert contents(folder) == before and len(hub.repo()["commits"]) == 1
    arrived = {path.name for path in (hub.folder / "lfs").iterdir() if not path.name.startswith(".")}
    assert arrived and oid not in arrived

    hub.fault()
    hub.start()
    sent = hub.requests("PUT")
    hub.push(folder)
    assert all(hub.files()[name] == before[name] for name in PUSHED)
    again = {line.removeprefix("PUT /lfs/") for line in hub.requests("PUT")[len(sent) :]}
    assert oid in again and not again & arrived


def test_push_space(hub, tmp_path):
    wheels = ["x-1-py3-none-any.whl", "x-2-py3-none-any.whl"]
    contents = {"app.py": "pass", "requirements.txt": "torch", "README.md": README, "x.pt": "", wheels[0]: "1"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    options = {"folder": tmp_path, "repo_id": "org/demo", "private": True}
    pushed = hub.call("push_space", **options, model_id="org/x")
    assert pushed == f"{hub.url}/spaces/org/demo"
    space = hub.repo("org/demo", "spaces")
    assert space["variables"] == {"MODEL_ID": "org/x"} and space["sdk"] == "gradio" and space["private"]
    files = hub.files("org/demo", "spaces")
    assert set(files) == {".gitattributes", "app.py", "requirements.txt", "README.md", wheels[0]}
    assert (
        "models:\n- org/x\n" in files["README.md"].decode() and "python_version: '3.11'" in files["README.md"].decode()
    )
    assert (tmp_path / "README.md").read_text() == README
    (tmp_path / wheels[0]).rename(tmp_path / wheels[1])
    hub.call("push_space", **options, model_id="org/y")
    assert hub.repo("org/demo", "spaces")["variables"] == {"MODEL_ID": "org/y"}
    assert {name for name in hub.files("org/demo", "spaces") if name.endswith(".whl")} == {wheels[1]}
    (tmp_path / "app.py").unlink()
    message = f"cannot push the Space in '{tmp_path}': app.py is missing"
    assert hub.call("push_space", **options, model_id="org/y")[1] == message


@pytest.mark.parametrize("is_private", [True, False])
def test_new_space_has_visibility_of_its_model(hub, folder, tmp_path, is_private):
    (tmp_path / "space").mkdir()
    for name in ("app.py", "requirements.txt", "README.md"):
        (tmp_path / "space" / name).write_text(README)
    hub.push(folder, "org/x", private=is_private)
    options = {"folder": tmp_path / "space", "repo_id": "org/demo", "model_id": "org/x"}
    for _ in range(2):  # the second push updates the Space
        hub.call("push_space", **options)
        assert hub.repo("org/demo", "spaces")["private"] is is_private
    created = [line for line in hub.requests("POST /api/repos/create")]
    assert len(created) == 2


def test_space_that_requires_payment_raises_one_line_error(hub, tmp_path):
    for name in ("app.py", "requirements.txt", "README.md"):
        (tmp_path / name).write_text(README)
    hub.fault({"match": "POST /api/repos/create", "status": 402, "message": "Subscribe to PRO to host Gradio Spaces"})
    assert hub.call("push_space", folder=tmp_path, repo_id="org/demo", model_id="org/x") == [
        "ValueError",
        "cannot push to org/demo: the Hub requires payment: Subscribe to PRO to host Gradio Spaces",
    ]


@pytest.mark.slow
def test_push_script(hub, folder):
    script = ROOT / "scripts" / "push_to_hub.py"
    options = ["--model", folder, "--hub_model_id", "org/x"]
    space = f"demo: {hub.url}/spaces/org/demo\n"
    (folder / "README.md").unlink()
    for name in ("config.yaml", "status.json", "results.json", "metrics.jsonl"):
        (folder / name).unlink()
    code, output, _ = hub.run(script, *options, "--private", "--revision_message", "Mine", "--space", "org/demo")
    assert (code, output) == (0, f"pushed {folder} to {hub.url}/org/x\n{space}")
    pushed = hub.files("org/demo", "spaces")
    (wheel,) = [name for name in pushed if name.endswith(".whl")]
    assert wheel.startswith("hf_ddpm-") and b"\ngradio" in pushed["requirements.txt"]
    assert "hf_ddpm/demo/app.py" in ZipFile(BytesIO(pushed[wheel])).namelist()
    assert b'from_pretrained("org/x")' in hub.files()["README.md"]
    assert hub.repo()["private"] and hub.repo()["commits"][-1]["title"] == "Mine"
    code, _, errors = hub.run(script, *options, "--private", "false")
    assert code == 2 and "push_to_hub.py: error: cannot push to org/x: the repository is private" in errors
    hub.kill()
    code, _, errors = hub.run(script, *options)
    assert code == 1 and errors.splitlines()[-1].startswith("push_to_hub.py: error: cannot push to org/x: http://")
    hub.start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--hub_model_id x", "--hub_model_id x: expected namespace/name"),
        ("--model nowhere", "--model nowhere: expected an existing folder"),
        ("--space demo", "--space demo: expected namespace/name"),
        ("--private maybe", "--private maybe: expected true or false"),
    ],
)
def test_wrong_options_raise_one_line_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_script("push_to_hub").main(["--model", str(tmp_path), "--hub_model_id", "org/x", *options.split()])
    assert "\n" not in str(caught.value)


def test_files_of_training_run(trained):
    files = model_files(trained)
    assert {"model_index.json", UNET, "scheduler/scheduler_config.json", "samples.png", "config.yaml"} < set(files)
    assert not any(name.startswith("checkpoints") for name in files) and "status.json" not in files
