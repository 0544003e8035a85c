"""Requests to the local Hub server that no other test covers, with the unmodified client."""

import json

import pytest

pytestmark = pytest.mark.hub

CLIENT = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

api, results = HfApi(), []
api.create_repo("org/data", repo_type="dataset")
add = [CommitOperationAdd(name, name.encode() * 9) for name in ("train/a.parquet", "train/b.txt", "README.md")]
first = api.create_commit("org/data", add, commit_message="Add", repo_type="dataset").oid
results.append([info.path for info in api.list_repo_tree("org/data", repo_type="dataset")])
results.append([info.size for info in api.get_paths_info("org/data", ["train/a.parquet", "no"], repo_type="dataset")])
files = api.dataset_info("org/data", files_metadata=True).siblings
results.append([(file.rfilename, file.lfs is not None) for file in files])
api.create_commit("org/data", [CommitOperationDelete("train/")], commit_message="Delete", repo_type="dataset")
results.append(api.list_repo_files("org/data", repo_type="dataset"))
path = hf_hub_download("org/data", "train/a.parquet", repo_type="dataset", revision=first)
results.append(open(path).read())
api.update_repo_settings("org/data", private=True, repo_type="dataset")
results.append([[info.id for info in HfApi(token=token).list_datasets(author="org")] for token in ("hf_write", False)])

def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        results.append(type(error).__name__)
    except HfHubHTTPError as error:
        results.append(error.response.status_code)

error(hf_hub_download, "org/data", "no", repo_type="dataset")
error(hf_hub_download, "org/data", "README.md", repo_type="dataset", revision="no")
error(hf_hub_download, "org/data", "README.md", repo_type="dataset", token=False, cache_dir="elsewhere")
stale = {"commit_message": "Late", "repo_type": "dataset", "parent_commit": first}
error(api.create_commit, "org/data", [CommitOperationAdd("c.txt", b"c")], **stale)
error(api.whoami, token="hf_nobody")
api.delete_repo("org/data", repo_type="dataset")
error(api.dataset_info, "org/data")
print(json.dumps(results))
"""


def test_client_requests(hub):
    code, output, errors = hub.run("-c", CLIENT)
    assert code == 0, errors
    assert json.loads(output) == [
        [".gitattributes", "README.md", "train"],
        [9 * len("train/a.parquet")],
        [[".gitattributes", False], ["README.md", False], ["train/a.parquet", True], ["train/b.txt", False]],
        [".gitattributes", "README.md"],
        9 * "train/a.parquet",
        [["org/data"], []],
        "RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError", 412, 401,
        "RepositoryNotFoundError",
    ]  # fmt: skip
