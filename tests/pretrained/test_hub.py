"""To the hub and from there, with stand-ins for what needs a network."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from equilibria import UserError
from equilibria.pretrained import Pretrained, hub
from equilibria.pretrained.folder import FILES

huggingface_hub = pytest.importorskip("huggingface_hub")
Make = Callable[..., Pretrained]


class StandInHub:
    """Repositories as folders, in the place of `HfApi`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.created: dict[str, Any] = {}

    def __call__(self, **_: Any) -> StandInHub:
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        self.created[repo_id] = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, name: str, allow_patterns: list[str], **_: Any) -> str:
        assert set(allow_patterns) == set(FILES)
        if not (self.root / name).is_dir():
            raise ConnectionError("no such repository\nand more")
        return str(self.root / name)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    found = StandInHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", found)
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_model_goes_to_the_hub_and_comes_back(make: Make, stand_in: StandInHub) -> None:
    mine = make()
    assert mine.push_to_hub("me/tiny", private=True) == "https://hub/me/tiny/commit/1"
    assert stand_in.created == {"me/tiny": True}
    assert {path.name for path in (stand_in.root / "me/tiny").iterdir()} == set(FILES)
    found = Pretrained.from_pretrained("me/tiny")
    assert found.config == mine.config
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(found.model(tokens).logits, mine.model(tokens).logits)


def test_the_card_is_the_one_given(make: Make, stand_in: StandInHub) -> None:
    make().push_to_hub("me/tiny")
    assert (stand_in.root / "me/tiny/README.md").read_text() == "# A card\n"
    bare = make()
    plain = Pretrained(bare.model, bare.config, vocabulary_size=11)
    plain.push_to_hub("me/bare")
    assert "library_name: equilibria" in (stand_in.root / "me/bare/README.md").read_text()


def test_it_is_a_model_of_the_mixin(make: Make) -> None:
    assert isinstance(make(), huggingface_hub.ModelHubMixin)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "me/nothing",
            r"cannot be downloaded from the hub \(ConnectionError: no such repository\)",
        ),
        ("runs/no/such folder", "neither a folder here nor OWNER/NAME"),
    ],
)
def test_what_is_not_there(stand_in: StandInHub, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pretrained.from_pretrained(name)


def test_folders_need_no_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    spec = importlib.util.spec_from_file_location("hub_without_hub", hub.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.Pretrained.from_pretrained(folder)
    found.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    for call in (lambda: found.push_to_hub("me/x"), lambda: found.from_pretrained("me/x")):
        with pytest.raises(UserError, match=r"pip install 'equilibria\[hub\]'"):
            call()
