"""Background pushes during training: they are complete, and never delay or fail the run."""

import json
import os
import signal

import pytest

from tests.hub.conftest import PUSHED

pytestmark = [pytest.mark.hub, pytest.mark.slow]

UNET = "unet/diffusion_pytorch_model.safetensors"
RUN = """
import json, os, shutil, sys, time
from pathlib import Path
from hf_ddpm.hub.background import BackgroundPush

folder, hub = Path(sys.argv[1]), Path(sys.argv[2])
errors = []
push = BackgroundPush(folder, "org/x", True, errors.append)

def fault(*faults):
    (hub / "faults.json").write_text(json.dumps(faults))

def wait_for(line):
    while line not in (hub / "requests.log").read_text():
        time.sleep(0.01)

def titles():
    return [commit["title"] for commit in json.loads((hub / "repos.json").read_text())["models/org/x"]["commits"][1:]]
"""


@pytest.fixture
def run(hub, folder):
    """Run code with background pushes; return the JSON lines it prints."""
    hub.fault()
    (hub.folder / "requests.log").touch()

    def run(code, token="hf_write"):
        status, output, errors = hub.run("-c", RUN + code, folder, hub.folder, token=token)
        assert status == 0, errors
        return [json.loads(line) for line in output.splitlines()]

    return run


def test_newest_state_is_pushed_at_end(run, hub, folder):
    assert run("""
push.start("1")
push._process.wait()
(folder / "metrics.jsonl").write_text("more")
push.start("2")
print(json.dumps([push.finish(), errors, titles()]))
""") == [[True, [], ["1", "2"]]]
    assert hub.files()["metrics.jsonl"] == b"more" and hub.repo()["private"]
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED) and not (folder / ".push").exists()


def test_push_uses_state_at_its_start_and_skips_states_in_between(run, hub, folder):
    first = (folder / UNET).read_bytes()
    assert run(f"""
fault({{"match": "POST /api/models/org/x/preupload", "wait": 3}})
push.start("1")
wait_for("preupload")
shutil.copyfile(folder / "ema-0.5" / {UNET!r}, folder / {UNET!r})
for number in "234":
    push.start(number)
print(json.dumps([titles(), push._process.poll()]))
push._process.wait()
print(json.dumps([titles(), push.finish(), titles(), errors]))
""") == [[[], None], [["1"], True, ["1", "4"], []]]
    oids = [commit["files"][UNET]["lfs"]["oid"] for commit in hub.repo()["commits"][1:]]
    assert (hub.folder / "lfs" / oids[0]).read_bytes() == first
    assert (hub.folder / "lfs" / oids[1]).read_bytes() == (folder / UNET).read_bytes() != first


def test_failure_is_reported_and_push_repeated(run, folder):
    ((at_next, at_end, titles, errors),) = run("""
fault({"match": "POST /api/models/org/x/commit", "status": 500, "message": "full"})
push.start("1")
push._process.wait()
push.start("2")
at_next = list(errors)
push._process.wait()
(folder / "model_index.json").rename(folder / "elsewhere")
push.start("3")
(folder / "elsewhere").rename(folder / "model_index.json")
at_end = push.finish()
fault()
print(json.dumps([at_next, at_end, [push.finish(), titles()], errors]))
""")
    assert len(at_next) == 1 and at_next[0].startswith("cannot push to org/x: ") and at_next[0].endswith("full")
    assert not at_end and titles == [True, ["3"]]
    assert [message.split(": ")[1] for message in errors[2:3]] == ["model_index.json is missing"]
    assert len(errors) == 4 and all("\n" not in message for message in errors)
    assert not (folder / ".push").exists()


def test_invalid_token_does_not_end_run(run):
    (result,) = run("push.start(); print(json.dumps([push.finish(), *errors]))", token="hf_nobody")
    line = "cannot push to org/x: the Hub rejected the token; log in with `hf auth login`, or set HF_TOKEN"
    assert result == [False, line, line]  # one for the push, one for the retry at the end


def test_unresponsive_hub_does_not_keep_run_alive(run, hub, folder):
    ending = """
fault({"match": "PUT /lfs", "stall": True})
push.start()
wait_for("PUT /lfs")
pid = push._process.pid
"""
    assert run(
        ending
        + """
print(json.dumps([push.finish(time_limit=0.5), errors]))
"""
    ) == [[False, ["cannot push to org/x: not finished after 0.5 s"]]]
    assert not (folder / ".push").exists()
    # A run ended by SIGTERM closes its push.
    assert run(ending + "push.close(); print(json.dumps([errors, os.path.exists(f'/proc/{pid}')]))") == [[[], False]]
    assert not (folder / ".push").exists() and len(hub.repo()["commits"]) == 1
    # The push of a killed run continues; the next push removes its leftovers.
    os.kill(run(ending + "print(pid)")[0], signal.SIGKILL)
    (folder / ".push" / "unet" / "old.safetensors").write_text("left behind")
    hub.fault()
    assert run("push.start(); print(json.dumps([push.finish(), errors]))") == [[True, []]]
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED) and not (folder / ".push").exists()


def test_finish_without_push_succeeds(run):
    assert run("print(json.dumps([push.finish(), push.close(), errors]))") == [[True, None, []]]
