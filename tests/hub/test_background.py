"""Pushes beside a run: it neither waits for them nor fails with them, and what is pushed is whole."""

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
said = []
push = BackgroundPush(folder, "org/x", True, said.append)

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
    """Runs code beside which there are pushes; returns what it prints."""
    hub.fault()
    (hub.folder / "requests.log").touch()

    def run(code, token="hf_write"):
        status, output, errors = hub.run("-c", RUN + code, folder, hub.folder, token=token)
        assert status == 0, errors
        return [json.loads(line) for line in output.splitlines()]

    return run


def test_the_newest_state_is_there_at_the_end(run, hub, folder):
    assert run("""
push.start("1")
while push._process.poll() is None: time.sleep(0.01)
(folder / "metrics.jsonl").write_text("more")
push.start("2")
print(json.dumps([push.finish(), said, titles()]))
""") == [[True, [], ["1", "2"]]]
    assert hub.files()["metrics.jsonl"] == b"more" and hub.repo()["private"]
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED) and not (folder / ".push").exists()


def test_a_push_is_of_the_moment_of_its_start_and_what_is_due_meanwhile_comes_last(run, hub, folder):
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
print(json.dumps([titles(), push.finish(), titles(), said]))
""") == [[[], None], [["1"], True, ["1", "4"], []]]
    oids = [commit["files"][UNET]["lfs"]["oid"] for commit in hub.repo()["commits"][1:]]
    assert (hub.folder / "lfs" / oids[0]).read_bytes() == first
    assert (hub.folder / "lfs" / oids[1]).read_bytes() == (folder / UNET).read_bytes() != first


def test_a_failure_is_reported_and_made_up_for(run, folder):
    line = "org/x cannot be pushed to: "
    ((at_next, at_end, titles, said),) = run("""
fault({"match": "POST /api/models/org/x/commit", "status": 500, "message": "full"})
push.start("1")
push._process.wait()
push.start("2")
at_next = list(said)
push._process.wait()
(folder / "model_index.json").rename(folder / "elsewhere")
push.start("3")
(folder / "elsewhere").rename(folder / "model_index.json")
at_end = push.finish()
fault()
print(json.dumps([at_next, at_end, [push.finish(), titles()], said]))
""")
    assert len(at_next) == 1 and at_next[0].startswith(line) and at_next[0].endswith("full")
    assert not at_end and titles == [True, ["3"]]
    assert [message.split(": ")[1] for message in said[2:3]] == ["it has no model_index.json"]
    assert len(said) == 4 and all("\n" not in message for message in said)
    assert not (folder / ".push").exists()


def test_a_bad_token_ends_no_run(run):
    (found,) = run("push.start(); print(json.dumps([push.finish(), *said]))", token="hf_nobody")
    line = "org/x cannot be pushed to: the Hub does not know the token: log in with `hf auth login`, or set HF_TOKEN"
    assert found == [False, line, line]  # once for the push, once for the attempt at the end


def test_a_hub_that_never_answers_keeps_no_run_from_ending(run, hub, folder):
    ending = """
fault({"match": "PUT /lfs", "stall": True})
push.start()
wait_for("PUT /lfs")
pid = push._process.pid
"""
    assert run(
        ending
        + """
print(json.dumps([push.finish(time_limit=0.5), said]))
"""
    ) == [[False, ["org/x cannot be pushed to: it takes more than 0.5 s"]]]
    assert not (folder / ".push").exists()
    # As a run that a signal ends: it closes what it has opened.
    assert run(ending + "push.close(); print(json.dumps([said, os.path.exists(f'/proc/{pid}')]))") == [[[], False]]
    assert not (folder / ".push").exists() and len(hub.repo()["commits"]) == 1
    # As one that is killed: the push goes on, and what it leaves is gone with the next one.
    os.kill(run(ending + "print(pid)")[0], signal.SIGKILL)
    (folder / ".push" / "unet" / "old.safetensors").write_text("left behind")
    hub.fault()
    assert run("push.start(); print(json.dumps([push.finish(), said]))") == [[True, []]]
    assert set(hub.files()) - {".gitattributes"} == set(PUSHED) and not (folder / ".push").exists()


def test_nothing_to_push_is_no_failure(run):
    assert run("print(json.dumps([push.finish(), push.close(), said]))") == [[True, None, []]]
