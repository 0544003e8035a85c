"""The server answers the unmodified client as the Hub does, where no other test asks it to."""

import json

import pytest

pytestmark = pytest.mark.hub

CLIENT = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

api, found = HfApi(), []
api.create_repo("org/data", repo_type="dataset")
add = [CommitOperationAdd(name, name.encode() * 9) for name in ("train/a.parquet", "train/b.txt", "README.md")]
first = api.create_commit("org/data", add, commit_message="Add", repo_type="dataset").oid
found.append([info.path for info in api.list_repo_tree("org/data", repo_type="dataset")])
found.append([info.size for info in api.get_paths_info("org/data", ["train/a.parquet", "no"], repo_type="dataset")])
files = api.dataset_info("org/data", files_metadata=True).siblings
found.append([(file.rfilename, file.lfs is not None) for file in files])
api.create_commit("org/data", [CommitOperationDelete("train/")], commit_message="Delete", repo_type="dataset")
found.append(api.list_repo_files("org/data", repo_type="dataset"))
path = hf_hub_download("org/data", "train/a.parquet", repo_type="dataset", revision=first)
found.append(open(path).read())
api.update_repo_settings("org/data", private=True, repo_type="dataset")
found.append([[info.id for info in HfApi(token=token).list_datasets(author="org")] for token in ("hf_write", False)])

def error(call, *words, **options):
    try:
        call(*words, **options)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        found.append(type(error).__name__)
    except HfHubHTTPError as error:
        found.append(error.response.status_code)

error(hf_hub_download, "org/data", "no", repo_type="dataset")
error(hf_hub_download, "org/data", "README.md", repo_type="dataset", revision="no")
error(hf_hub_download, "org/data", "README.md", repo_type="dataset", token=False, cache_dir="elsewhere")
stale = {"commit_message": "Late", "repo_type": "dataset", "parent_commit": first}
error(api.create_commit, "org/data", [CommitOperationAdd("c.txt", b"c")], **stale)
error(api.whoami, token="hf_nobody")
api.delete_repo("org/data", repo_type="dataset")
error(api.dataset_info, "org/data")
print(json.dumps(found))
"""


def test_the_client_finds_a_hub(hub):
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
