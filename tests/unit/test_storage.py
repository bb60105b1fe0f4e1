"""Files, what URLs name, and where credentials come from."""

import io
import os
from pathlib import Path

import pytest

from data_pipeline.errors import DataError, MissingError
from data_pipeline.storage import (
    StorageSettings,
    delete,
    exists,
    is_remote,
    join_url,
    list_url,
    local_path,
    open_url,
    read_range,
    read_ranges,
    size_of,
    sizes_in,
    statistics,
    write_object,
)
from data_pipeline.storage.clients import client_of
from data_pipeline.storage.credentials import s3_options
from data_pipeline.storage.ranges import NEAR_BYTES, PART_BYTES, assemble, pieces


def content_of(url: str) -> bytes:
    with open_url(url) as file:
        return file.read()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_are_written_listed_and_read(tmp_path: Path, scheme: str):
    folder = f"{scheme}{tmp_path}/data"
    url = join_url(folder, "a b.tar")
    assert not exists(url) and list_url(folder) == []
    write_object(url, b"0123456789")
    write_object(join_url(folder, "sub/c"), io.BytesIO(b"c"))
    assert list_url(folder) == [url, f"{folder}/sub"] and list_url(url) == [url]
    assert exists(url) and size_of(url) == 10 and not is_remote(url)
    assert content_of(url) == b"0123456789" and read_range(url, 3, 4) == b"3456"
    before = statistics()
    assert read_ranges(url, [(8, 2), (0, 1), (3, 0)]) == [b"89", b"0", b""]
    assert statistics() == before  # counts of stores only
    with pytest.raises(MissingError, match=r"a b\.tar ends before byte 11, so it was cut short"):
        read_range(url, 8, 3)
    with pytest.raises(MissingError, match="none does not exist"):
        read_range(join_url(folder, "none"), 0, 1)


def test_what_is_written_anew_or_deleted_is_not_read_from_before(tmp_path: Path):
    url = f"{tmp_path}/x"
    for content in (b"one", b"three"):
        write_object(url, content)
        assert read_range(url, 0, len(content)) == content
    assert sizes_in(str(tmp_path)) == {"x": 5}
    delete([url, f"{tmp_path}/none"])
    assert not exists(url) and sizes_in(str(tmp_path)) == {}
    with pytest.raises(MissingError, match="does not exist"):
        read_range(url, 0, 1)
    with pytest.raises(MissingError, match="does not exist"):
        sizes_in(url)


def test_a_file_is_whole_or_absent(tmp_path: Path):
    class Broken(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(28, "No space left on device")

    write_object(f"{tmp_path}/x", b"old")
    with pytest.raises(DataError, match=r"x cannot be written \(No space left"):
        write_object(f"{tmp_path}/x", Broken())
    assert os.listdir(tmp_path) == ["x"] and content_of(f"{tmp_path}/x") == b"old"


def test_lists():
    assert list_url("s3://b/{000..002}.tar") == [f"s3://b/00{number}.tar" for number in range(3)]
    assert list_url("/d/{a,b}-{08..10}::x") == [f"/d/{w}-{n}" for w in "ab" for n in ("08", "09", "10")] + ["x"]
    assert len(list_url("http://h/{000000..099999}")) == 100_000
    assert list_url("http://h/a.tar") == ["http://h/a.tar"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/d/{0..3.tar", "braces that name no list"),
        ("/d/0..3}", "braces that name no list"),
        ("/d/{3..0}", "braces that name no list"),
        ("/d/{0..2}{a,{b,c}}", "braces that name no list"),
        ("/d/{x}", "braces that name no list"),
        ("/d/{0..99}{0..9999}", "more than 100,000 objects"),
        ("/d/{0..999999999}{0..999999999}", "more than 100,000 objects"),
        ("a::b::a", "an object twice"),
        ("a::::b", "an empty URL"),
    ],
)
def test_wrong_lists(url: str, reason: str):
    with pytest.raises(DataError, match=reason):
        list_url(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://h/x", "unknown scheme: use a path"),
        ("s3:///x", "names no bucket"),
        ("https:///x", "names no host"),
        ("s3://b/", "names no object"),
        ("http://h?x", "names no object"),
        ("s3://key:hush@b/x", "take them out"),
        ("https://me:hush@h/x?sig=hush", "take them out"),
    ],
)
def test_wrong_urls(url: str, reason: str):
    with pytest.raises(DataError, match=reason) as caught:
        size_of(url)
    assert "hush" not in str(caught.value)


def test_what_is_not_for_this_machine_or_not_for_writing():
    with pytest.raises(DataError, match=r"s3://b/x is not on this machine"):
        local_path("s3://b/x")
    with pytest.raises(DataError, match=r"http://h/x cannot be written: web servers are only read"):
        write_object("http://h/x?sig=hush", b"")
    with pytest.raises(DataError, match=r"http://h/x cannot be deleted: web servers are only read"):
        delete(["http://h/x?sig=hush"])


def test_pieces_hold_all_ranges_and_are_no_larger_than_needed():
    content = os.urandom(100) * (PART_BYTES // 25)
    ranges = [(0, 3 * PART_BYTES), (5, 1), (10, 20), (31, 0), (3 * PART_BYTES + NEAR_BYTES + 1, 9), (7, 3)]
    wanted = pieces(ranges)
    parts = [part for piece in wanted for part in piece.parts]
    assert len(wanted) == 2 and len(parts) == 4 and sum(size for _, size in parts) == 3 * PART_BYTES + 9
    found = assemble(ranges, wanted, [content[offset : offset + size] for offset, size in parts])
    assert found == [content[offset : offset + size] for offset, size in ranges]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile lab]\nendpoint_url = http://lab\n[profile sso]\nsso_session = x\n"
    )
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = AK\naws_secret_access_key = hush%x\n"
        "[lab]\naws_access_key_id = LK\naws_secret_access_key = hush\naws_session_token = ST\n"
    )
    return tmp_path


def test_profiles(aws: Path, monkeypatch: pytest.MonkeyPatch):
    assert s3_options() == {"access_key_id": "AK", "secret_access_key": "hush%x", "region": "eu-west-1"}
    monkeypatch.setenv("AWS_PROFILE", "lab")
    keys = {"access_key_id": "LK", "secret_access_key": "hush", "session_token": "ST"}
    assert s3_options() == keys | {"endpoint": "http://lab"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://other")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "EK")
    assert s3_options() == {}


def test_wrong_profiles(aws: Path, monkeypatch: pytest.MonkeyPatch):
    for profile, reason in (("none", "names 'none', which"), ("sso", "by sso_session, which is not read here")):
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(DataError, match=reason):
            s3_options()
    (aws / "credentials").write_text("[default]\nhush\n[oops")
    with pytest.raises(DataError, match="cannot be read as a file of AWS profiles") as caught:
        s3_options()
    assert "hush" not in str(caught.value) and caught.value.__context__ is None


@pytest.mark.parametrize("url", ["s3://b/x", "gs://b/x", "az://b/x", "https://h/x"])
def test_every_scheme_has_a_client(aws: Path, monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    assert client_of(url, StorageSettings()) is client_of(url + "y", StorageSettings())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        StorageSettings(timeout_s=0)
