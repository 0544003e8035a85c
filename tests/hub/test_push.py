"""What is pushed, what is not, and what becomes of a push that fails: with the unmodified client."""

import hashlib
import json
import shutil
from io import BytesIO
from zipfile import ZipFile

import pytest

from hf_ddpm.hub.push import model_files, push_model
from tests.conftest import LIMIT, load_script
from tests.hub.conftest import CALL, KEPT, PUSHED, ROOT, contents

pytestmark = pytest.mark.hub

UNET = "unet/diffusion_pytorch_model.safetensors"
README = "---\ntitle: Demo\nsdk: gradio\npython_version: '3.11'\nmodels: [else/where]\n---\n"


def test_one_commit_of_the_model_and_of_nothing_else(hub, folder):
    before = contents(folder)
    pushed = hub.push(folder, private=True, message="First")
    commits = hub.repo()["commits"]
    assert [commit["title"] for commit in commits] == ["initial commit", "First"] and hub.repo()["private"]
    there = hub.files()
    assert set(there) - {".gitattributes"} == set(PUSHED)
    assert not set(there) & set(KEPT)
    assert all(there[name] == before[name] for name in PUSHED)
    assert pushed == f"{hub.url}/org/x"
    assert contents(folder) == before


@pytest.mark.slow
def test_only_what_has_changed_is_sent_again(hub, folder):
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
def test_former_weights_go_and_all_else_stays(hub, folder, tiny_pipeline):
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
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED)  # loss.png, too: what it shows may be wanted


def test_best_models_and_numbered_results_go_with_it(folder):
    shutil.copytree(folder / "ema-0.5", folder / "best")
    for name in ("best/results.json", "results_dinov2.json", "evaluations.jsonl"):
        (folder / name).write_text("{}")
    best = {f"best/{name}" for name in PUSHED if "/" in name and "ema" not in name}
    more = {"best/model_index.json", "best/results.json", "results_dinov2.json", "evaluations.jsonl"}
    files = model_files(folder)
    assert set(files) == {*PUSHED, *best, *more} and len(set(files)) == len(files)


BROKEN = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "it has no model_index.json"),
    "no JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is no JSON"),
    "no components": (lambda folder: (folder / "model_index.json").write_text("{}"), "names no components"),
    "no weights": (lambda folder: (folder / UNET).unlink(), r"unet/ has no weights, \*.safetensors"),
    "no network": (lambda folder: shutil.rmtree(folder / "unet"), "unet/ has no config.json"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "scheduler/ has no config.json"),
    "half a file": (lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-1]), "is damaged"),
    "half an average": (lambda folder: (folder / "ema-0.5" / UNET).write_bytes(b""), "ema-0.5.*is damaged"),
    "a shard less": (
        lambda folder: (folder / f"{UNET}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "unet/ has no b.safetensors",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_only_whole_models_are_pushed(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        push_model(folder, "org/x")  # offline: nobody is asked
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_model_is_as_private_as_asked_or_not_pushed(hub, folder):
    for private, is_now, wanted in [(True, "public", "private"), (False, "private", "public")]:
        hub.push(folder, f"org/{is_now}", private=not private)
        commits = hub.repo(f"org/{is_now}")["commits"]
        (folder / "config.yaml").write_text(f"{private}")
        kind, line = hub.push(folder, f"org/{is_now}", private=private)
        assert (kind, line) == (
            "ValueError",
            f"org/{is_now} cannot be pushed to: it is {is_now}, not {wanted} as asked for: change its settings on the "
            "Hub, or do not ask",
        )
        assert hub.repo(f"org/{is_now}")["commits"] == commits
        hub.push(folder, f"org/{is_now}")
        assert hub.repo(f"org/{is_now}")["private"] is not private
        assert len(hub.repo(f"org/{is_now}")["commits"]) == 3


WHO_MAY_NOT = [
    (None, "org/x", "there is no token: log in with `hf auth login`, or set HF_TOKEN"),
    ("hf_nobody", "org/x", "the Hub does not know the token: log in with `hf auth login`, or set HF_TOKEN"),
    ("hf_read", "org/x", "the token may not write there: Authorization error."),
    ("hf_read", "org/new", "the token may not write there: You don't have the rights"),
    ("hf_stranger", "org/x", "the token may not write there: You don't have the rights"),
    ("hf_write", "nowhere/x", "the token may not write there: You don't have the rights"),
    ("hf_write", "x", "its name is not of the form namespace/name"),
    ("hf_write", "org/a b", "Repo id must use alphanumeric chars"),
]


@pytest.mark.slow
def test_who_may_not_push_is_told_in_a_line(hub, folder):
    hub.push(folder, private=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    before = contents(folder), (hub.folder / "repos.json").read_text()
    for token, repo_id, message in WHO_MAY_NOT:
        kind, line = hub.push(folder, repo_id, token=token)
        assert kind == "ValueError" and line.startswith(f"{repo_id} cannot be pushed to: {message}")
        assert "\n" not in line and (contents(folder), (hub.folder / "repos.json").read_text()) == before


def test_a_card_that_is_not_valid_is_told_before_anything_is_sent(hub, folder):
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    kind, line = hub.push(folder)
    assert kind == "ValueError" and "Invalid metadata in README.md" in line and "\n" not in line
    assert not hub.requests("PUT")


def test_a_long_run_can_be_refused_at_its_start(hub):
    assert hub.call("check_push", repo_id="org/x", private=True) is None and hub.repo()["private"]
    assert hub.call("check_push", repo_id="org/x", token="hf_read") == [
        "ValueError", "org/x cannot be pushed to: the token may only read",
    ]  # fmt: skip
    assert "it is private" in hub.call("check_push", repo_id="org/x", private=False)[1]


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_fails_is_told_in_a_line_and_a_second_push_completes(hub, folder, status):
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
def test_a_hub_that_is_killed_in_the_middle_of_an_upload(hub, folder):
    oid = hashlib.sha256((folder / UNET).read_bytes()).hexdigest()
    hub.fault({"match": f"PUT /lfs/{oid}", "stall": True})
    before = contents(folder)
    options = {"folder": str(folder), "repo_id": "org/x"}
    client = hub.popen("-c", CALL, "push_model", json.dumps(options))
    hub.wait_for(f"PUT /lfs/{oid}")
    hub.wait_for("POST /lfs/")  # others have arrived
    hub.kill()
    output, errors = client.communicate(timeout=LIMIT)
    kind, line = json.loads(output.splitlines()[-1])
    assert kind == "OSError" and "\n" not in line
    assert line.startswith(f"org/x cannot be pushed to: {hub.url} does not answer: ")
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


def test_a_space_shows_the_model(hub, tmp_path):
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
    assert hub.call("push_space", **options, model_id="org/y")[1].endswith("cannot be pushed: it has no app.py")


@pytest.mark.parametrize("is_private", [True, False])
def test_a_new_space_is_as_private_as_its_model(hub, folder, tmp_path, is_private):
    (tmp_path / "space").mkdir()
    for name in ("app.py", "requirements.txt", "README.md"):
        (tmp_path / "space" / name).write_text(README)
    hub.push(folder, "org/x", private=is_private)
    options = {"folder": tmp_path / "space", "repo_id": "org/demo", "model_id": "org/x"}
    for _ in range(2):  # the second push finds it there
        hub.call("push_space", **options)
        assert hub.repo("org/demo", "spaces")["private"] is is_private
    created = [line for line in hub.requests("POST /api/repos/create")]
    assert len(created) == 2


def test_a_space_that_costs_is_told_in_a_line(hub, tmp_path):
    for name in ("app.py", "requirements.txt", "README.md"):
        (tmp_path / name).write_text(README)
    hub.fault({"match": "POST /api/repos/create", "status": 402, "message": "Subscribe to PRO to host Gradio Spaces"})
    assert hub.call("push_space", folder=tmp_path, repo_id="org/demo", model_id="org/x") == [
        "ValueError",
        "org/demo cannot be pushed to: the Hub wants to be paid for it: Subscribe to PRO to host Gradio Spaces",
    ]


@pytest.mark.slow
def test_the_command_pushes(hub, folder):
    script = ROOT / "scripts" / "push_to_hub.py"
    words = ["--model", folder, "--hub_model_id", "org/x"]
    space = f"demo: {hub.url}/spaces/org/demo\n"
    (folder / "README.md").unlink()
    for name in ("config.yaml", "status.json", "results.json", "metrics.jsonl"):
        (folder / name).unlink()
    code, output, _ = hub.run(script, *words, "--private", "--revision_message", "Mine", "--space", "org/demo")
    assert (code, output) == (0, f"pushed {folder} to {hub.url}/org/x\n{space}")
    pushed = hub.files("org/demo", "spaces")
    (wheel,) = [name for name in pushed if name.endswith(".whl")]
    assert wheel.startswith("hf_ddpm-") and b"\ngradio" in pushed["requirements.txt"]
    assert "hf_ddpm/demo/app.py" in ZipFile(BytesIO(pushed[wheel])).namelist()
    assert b'from_pretrained("org/x")' in hub.files()["README.md"]
    assert hub.repo()["private"] and hub.repo()["commits"][-1]["title"] == "Mine"
    code, _, errors = hub.run(script, *words, "--private", "false")
    assert code == 2 and "push_to_hub.py: error: org/x cannot be pushed to: it is private" in errors
    hub.kill()
    code, _, errors = hub.run(script, *words)
    assert code == 1 and errors.splitlines()[-1].startswith("push_to_hub.py: error: org/x cannot be pushed to: http://")
    hub.start()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--hub_model_id x", "hub_model_id='x' is not allowed: namespace/name"),
        ("--model nowhere", "--model nowhere: expected an existing folder"),
        ("--space demo", "space='demo' is not allowed: namespace/name"),
        ("--private maybe", "argument --private: 'maybe': expected true or false"),
    ],
)
def test_wrong_requests_to_push_are_one_line(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_script("push_to_hub").main(["--model", str(tmp_path), "--hub_model_id", "org/x", *wrong.split()])
    assert "\n" not in str(caught.value)


def test_a_run_of_training_can_be_pushed(trained):
    files = model_files(trained)
    assert {"model_index.json", UNET, "scheduler/scheduler_config.json", "samples.png", "config.yaml"} < set(files)
    assert not any(name.startswith("checkpoints") for name in files) and "status.json" not in files
