"""Files of a folder or of a hub repository."""

import pytest
from hub_cache import add_repository, use_hub_cache

from rbfast.utils.hub import local_copy


def test_folder_takes_precedence_over_the_repository_of_its_name(tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path / "cache")
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.json").write_text("1")
    add_repository(tmp_path / "cache", "owner/name", tmp_path / "owner/name")
    found = local_copy("owner/name", ["a.json"])
    assert found != tmp_path / "owner/name" and (found / "a.json").read_text() == "1"
    monkeypatch.chdir(tmp_path)
    assert str(local_copy("owner/name", ["a.json"])) == "owner/name"


def test_only_hub_ids_are_looked_up(tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path)
    for name in ("runs", "./owner/name", "../name", "/owner/name", "a/b/c", "a b/c", tmp_path / "none"):
        assert str(local_copy(name, ["a.json"])) == str(name).removeprefix("./")
    with pytest.raises(OSError):
        local_copy("owner/name", ["a.json"])
