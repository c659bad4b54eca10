"""Files of a folder or of a hub repository."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_cache import add_repository, use_hub_cache
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging

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


def test_name_that_the_hub_forbids_is_a_folder(tmp_path, monkeypatch):
    use_hub_cache(monkeypatch, tmp_path)
    for name in ("runs/a--b", "runs/a.git", "rüns/é", "runs/a-"):
        assert local_copy(name, ["a.json"]) == Path(name)


def test_repository_without_the_files_is_no_news(tmp_path, monkeypatch, capsys, caplog):
    use_hub_cache(monkeypatch, tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: SimpleNamespace(sha="0a" * 20))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", lambda *_, **__: [_entry("config.json")])
    logger = logging.get_logger()
    logger.addHandler(caplog.handler)
    level = logger.level
    assert not (local_copy("owner/name", ["a.json"]) / "a.json").exists()
    logger.removeHandler(caplog.handler)
    assert capsys.readouterr().err == caplog.text == ""
    assert logger.level == level


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("the connection broke off")])
def test_every_failure_of_the_hub_is_an_oserror(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(OSError, match=str(error)):
        local_copy("owner/name", ["a.json"])


def _entry(path):
    return RepoFile(path=path, size=2, oid="0a", lastCommit=None)
