"""Folders that appear whole or not at all."""

import pytest

from modeling_encodec.atomic import atomic_folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_when_complete(tmp_path):
    target = tmp_path / "deep" / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as new:
            assert not target.exists() or (target / "a").read_text() == "one"
            (new / "a").write_text(content)
            assert names(new) == ["a"]
        assert (target / "a").read_text() == content and names(target.parent) == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("one")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as new:
        (new / "a").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "a").read_text() == "one" and names(tmp_path) == ["model"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".model-new", ".model-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("half")
    with atomic_folder(tmp_path / "model") as new:
        assert names(new) == []
        (new / "a").write_text("one")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["a"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as new:
        (new / "a").write_text("one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "one"
