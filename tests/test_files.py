import pytest

from helpers.files import write_text


def test_a_file_is_written_whole_with_its_folder(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "grün\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "grün\n".encode()


def test_an_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")  # cannot be encoded: fails in the middle of writing
    assert path.read_text() == "old"
