"""Data files: found, fetched from a server that is not always well, checked, decoded."""

import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("PIL")
pytest.importorskip("pyarrow")

import pyarrow
from PIL import Image
from pyarrow import parquet

from nesterov_triton.experiments.cli import main
from nesterov_triton.experiments.data import data_folder, download, files, images, silverbox, walker
from nesterov_triton.experiments.experiment import CommandError

CONTENT = bytes(range(256)) * 8192  # 2 MiB


@dataclass
class Host:
    """What the server does: cuts each answer after so many bytes, ignores ranges, states sums, counts requests."""

    content: bytes = CONTENT
    cut: int | None = None
    ranges: bool = True
    stated: str | None = None
    redirects: bool = False
    seen: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def host() -> Iterator[Host]:
    what = Host()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if self.path == "/file" and what.redirects:
                self.send_response(302)
                self.send_header("Location", "/elsewhere")
                self.send_header("X-Linked-ETag", f'"{what.stated}"')
                self.end_headers()
                return
            if self.path not in ("/file", "/elsewhere"):
                self.send_error(404)
                return
            wanted = self.headers.get("Range")
            what.seen.append(wanted)
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and what.ranges else 0  # type: ignore[index]
            if start >= len(what.content):
                self.send_error(416)
                return
            body = what.content[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(what.content) - 1}/{len(what.content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: what.cut])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    what.url = f"http://127.0.0.1:{server.server_port}/file"
    yield what
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


def wanted(host: Host, **changes: Any) -> files.DataFile:
    """The file that the host has when it is well."""
    good = files.DataFile("set/file.bin", host.url, "bytes", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    return replace(good, **changes)


def test_a_missing_file_is_downloaded_once(host: Host, tmp_path: Path) -> None:
    for _ in range(2):
        path = files.find(wanted(host), tmp_path)
        assert path.read_bytes() == CONTENT
    assert host.seen == [None]
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(host: Host, tmp_path: Path) -> None:
    host.cut = 500_000
    assert files.find(wanted(host), tmp_path).read_bytes() == CONTENT
    assert len(host.seen) == 5
    assert host.seen[0] is None
    starts = [int(str(each).removeprefix("bytes=").removesuffix("-")) for each in host.seen[1:]]
    assert starts == sorted(starts)
    assert starts[0] > 0


def test_what_came_before_a_kill_is_not_fetched_again(host: Host, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(CONTENT[:1_000_000])
    assert files.find(wanted(host), tmp_path).read_bytes() == CONTENT
    assert host.seen == ["bytes=1000000-"]


def test_a_host_without_ranges_gives_the_whole(host: Host, tmp_path: Path) -> None:
    host.ranges = False
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.part").write_bytes(b"x" * 1000)
    assert files.find(wanted(host), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_part_of_another_file_is_fetched_anew(size: int | None, host: Host, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for old in (b"x" * 1000, b"x" * (len(CONTENT) + 5), b"x" * len(CONTENT)):
        (tmp_path / "set" / "file.bin").unlink(missing_ok=True)
        (tmp_path / "set" / "file.bin.part").write_bytes(old)
        assert files.find(wanted(host, size=size), tmp_path).read_bytes() == CONTENT


def test_a_wrong_sum_is_told_and_not_kept(host: Host, tmp_path: Path) -> None:
    host.content = CONTENT[:-1] + b"x"
    with pytest.raises(CommandError) as error:
        files.find(wanted(host), tmp_path)
    message = str(error.value)
    assert all(word in message for word in ("set/file.bin", "SHA-256", wanted(host).sha256, "--data", host.url))
    assert not list((tmp_path / "set").iterdir())


def test_a_wrong_size_is_told_before_it_is_fetched(host: Host, tmp_path: Path) -> None:
    host.content = CONTENT * 2
    with pytest.raises(CommandError, match="4,194,304 bytes"):
        files.find(wanted(host), tmp_path)


@pytest.mark.parametrize("right", [True, False])
def test_the_sum_that_the_host_states_is_checked(right: bool, host: Host, tmp_path: Path) -> None:
    host.redirects, host.stated = True, hashlib.sha256(CONTENT if right else b"").hexdigest()
    file = wanted(host, size=None, sha256=None)
    if right:
        assert files.find(file, tmp_path).read_bytes() == CONTENT
        return
    with pytest.raises(CommandError, match=f"its host states {host.stated}"):
        files.find(file, tmp_path)


def test_no_host_says_what_to_do(tmp_path: Path) -> None:
    file = files.DataFile("walker.zip", "http://127.0.0.1:9/walker.zip", "the archive", 12, "ab" * 32)
    with pytest.raises(CommandError) as error:
        files.find(file, tmp_path)
    message = str(error.value)
    for word in (str(tmp_path / "walker.zip"), "127.0.0.1:9", "12 bytes", "ab" * 32, "--data", "NESTEROV_TRITON_DATA"):
        assert word in message


def test_a_missing_page_is_no_file(host: Host, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="HTTP 404"):
        files.find(wanted(host, url=host.url + "s"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_command_says_it_too(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(walker, "FILE", replace(walker.FILE, url="http://127.0.0.1:9/walker.zip"))
    given = ["reproduce", "walker2d", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(given) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path / 'walker.zip'} is missing" in message
    assert "Traceback" not in message


def test_where_data_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTEROV_TRITON_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder(None) == tmp_path / "nesterov-triton"
    monkeypatch.setenv("NESTEROV_TRITON_DATA", "/there")
    assert data_folder(None) == Path("/there")
    assert data_folder(Path("here")) == Path("here")


def test_damaged_archives_are_told(tmp_path: Path) -> None:
    (tmp_path / "walker.zip").write_bytes(b"x" * 1000)
    with pytest.raises(CommandError, match=r"walker\.zip is truncated or corrupt: it has 1,000 bytes.*32,632,158"):
        walker.load(tmp_path)
    with open(tmp_path / "walker.zip", "wb") as file:
        file.truncate(32_632_158)
    with pytest.raises(CommandError, match=r"its SHA-256 is .*expected .*403b4c4ae644"):
        walker.load(tmp_path)
    (tmp_path / "silverbox.csv").write_text('"V1","V2",\n')
    with pytest.raises(CommandError, match=r"silverbox\.csv.*2,649,632"):
        silverbox.load(tmp_path)


# -- walker ------------------------------------------------------------------------------------------------------------


def test_walker_windows_are_the_published_ones() -> None:
    """Against the published preparation, written out."""
    draw = np.random.RandomState(3)
    rollouts = [draw.randn(100 + 10 * i, 17) for i in range(20)]
    found = walker.prepare(rollouts)

    names = list(range(20))
    np.random.RandomState(125487).shuffle(names)
    generator = np.random.RandomState(891374)
    for split, chosen in zip(found, (names[5:], names[3:5], names[:3]), strict=True):
        xs, ts, ys = [], [], []
        for name in chosen:
            x, t, y, skip = [], [], [], 0
            for step in range(len(rollouts[name]) - 1):
                skip += 1
                if generator.rand() < 0.9:
                    x.append(rollouts[name][step])
                    y.append(rollouts[name][step + 1])
                    t.append(skip)
                    skip = 0
            for start in range(0, len(y) - 64, 16):
                xs.append(x[start : start + 64])
                ys.append(y[start : start + 64])
                ts.append(t[start : start + 64])
        torch.testing.assert_close(split.inputs[..., :17], torch.tensor(np.array(xs)))
        torch.testing.assert_close(split.inputs[..., 17] * 64, torch.tensor(np.array(ts), dtype=torch.float64))
        torch.testing.assert_close(split.targets, torch.tensor(np.array(ys)))


def test_an_archive_of_something_else_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "walker.zip", "w") as archive:
        archive.writestr("walker/rollout_000.npy", b"nothing")
    with pytest.raises(CommandError, match=r"walker\.zip is truncated or corrupt"):
        walker.read(tmp_path / "walker.zip")


# -- images ------------------------------------------------------------------------------------------------------------

TINY = replace(images.MNIST, rows=(4, 2))


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_images(folder: Path, data: images.ImageSet, seed: int = 0, labels: range = range(10)) -> list[np.ndarray]:
    """Parquet files with as many rows as the data set has; gives their pixels."""
    channels, height, width = data.shape
    draw = np.random.RandomState(seed)
    written = []
    (folder / data.name).mkdir(exist_ok=True)
    for part, rows in enumerate(data.rows):
        shape = (rows, height, width) if channels == 1 else (rows, height, width, channels)
        pixels = draw.randint(0, 256, shape, dtype=np.uint8)
        column = [{"bytes": encoded(each), "path": None} for each in pixels]
        table = pyarrow.table({data.column: column, "label": [labels[i % len(labels)] for i in range(rows)]})
        parquet.write_table(table, folder / data.file(part).name)
        written.append(pixels)
    return written


@pytest.mark.parametrize("data", [TINY, replace(images.CIFAR10, rows=(4, 2))], ids=["mnist", "cifar10"])
def test_images_come_as_they_are(data: images.ImageSet, tmp_path: Path) -> None:
    written = write_images(tmp_path, data)
    for split, pixels in zip(images.load(data, tmp_path), written, strict=True):
        expected = torch.from_numpy(pixels)
        assert split.inputs.dtype == torch.uint8
        assert torch.equal(split.inputs, expected.unsqueeze(1) if data is TINY else expected.permute(0, 3, 1, 2))
        assert split.targets.tolist() == list(range(len(pixels)))


def test_damaged_image_files_are_told(tmp_path: Path) -> None:
    write_images(tmp_path, TINY)
    path = tmp_path / TINY.file(0).name
    whole = path.read_bytes()
    with pytest.raises(CommandError, match=r"has 4 rows; expected a Parquet file of 60,000 rows"):
        images.load(images.MNIST, tmp_path)
    with pytest.raises(CommandError, match=r"columns are image, label; expected .*columns img and label"):
        images.load(replace(TINY, column="img"), tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CommandError, match=re.escape(f"{path} is truncated or corrupt")):
        images.load(TINY, tmp_path)
    middle = whole.index(b"IDAT") + 20
    path.write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    with pytest.raises(CommandError, match=re.escape(f"{path} is truncated or corrupt")):
        images.load(TINY, tmp_path)


def test_labels_out_of_range_are_told(tmp_path: Path) -> None:
    write_images(tmp_path, TINY, labels=range(9, 12))
    with pytest.raises(CommandError, match="labels 9 to 11"):
        images.load(TINY, tmp_path)


# -- the real ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"), [("mnist", (60_000, 10_000)), ("walker.zip", (9684, 1937)), ("silverbox.csv", (131_072,))]
)
def test_real_data(name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_folder(None)
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; NESTEROV_TRITON_DATA names another folder")
    if name == "mnist":
        train, test = images.load(images.MNIST, folder)
        assert (len(train.inputs), len(test.inputs)) == sizes
        assert train.targets[:5].tolist() == [5, 0, 4, 1, 9]
    elif name == "walker.zip":
        train, _, test = walker.load(folder)
        assert (len(train.inputs), len(test.inputs)) == sizes
    else:
        v1, _ = silverbox.load(folder)
        assert v1.shape == sizes
        assert abs(v1.mean()) < 1e-12
