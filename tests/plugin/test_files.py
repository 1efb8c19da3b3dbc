import pytest

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_room, remove_leftovers, temporary_name


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    path = tmp_path / "photo.v2.png"
    ours = [temporary_name(path), tmp_path / ".photo.v2.png.99", tmp_path / ".photo.v2.png.7.raw"]
    others = [
        path,
        tmp_path / ".v2.png.7",
        tmp_path / ".photo.v2.png",
        tmp_path / ".photo.v2.png.x",
    ]
    for file in (*ours, *others):
        file.write_bytes(b"")
    remove_leftovers([path, tmp_path / "nowhere" / "a.png"])
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_room_of_the_disk_that_a_new_folder_will_be_on(tmp_path):
    check_room(tmp_path / "new" / "deep", 1)
    with pytest.raises(InputError, match=r"no room in .*deep: 1099511627776\.0 MiB are needed"):
        check_room(tmp_path / "new" / "deep", 2**60)
