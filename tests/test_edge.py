"""The edge example: frames from files, cameras and its own drawing, answers, and what it says of memory."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from calls import IMPORTED_FROM

ROOT = Path(__file__).parents[1]
if not (ROOT / "examples" / "edge").is_dir():
    pytest.skip("the examples are not here", allow_module_level=True)
sys.path.append(str(ROOT))

frames, run, memory, networks, runs = (
    importlib.import_module(f"examples.{name}")
    for name in ("edge.frames", "edge.run", "edge.memory", "digits.numpy_network", "digits.runs")
)
COUNT = 12


@pytest.fixture(scope="module")
def network():
    return networks.Network(run.VARIANT, state=runs.read_weights()[0][run.VARIANT])


@pytest.fixture(scope="module")
def drawn():
    """The first frames that the example draws."""
    found = frames.drawn(runs.read_weights()[2])
    return [next(found) for _ in range(COUNT)]


def said(network, source, **settings):
    return [answer[1:3] for answer in run.answers(network, source, **settings)]


def write_pgm(path, pixels):
    height, width = pixels.shape
    path.write_bytes(b"P5 # a comment 1 2\n%d %d\n#\n255\n" % (width, height) + pixels.tobytes())


def write_png(path, pixels):
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)


WRITERS = {".npy": np.save, ".pgm": write_pgm, ".png": write_png}


# ---- frames


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_give_the_answers_of_arrays(suffix, tmp_path, network, drawn):
    for index, frame in enumerate(drawn):
        WRITERS[suffix](tmp_path / f"{index:02}{suffix}", frame.pixels)
    (tmp_path / "notes.txt").write_text("no frame")
    read = list(frames.from_folder(tmp_path))
    assert [frame.name for frame in read] == [f"{index:02}{suffix}" for index in range(COUNT)]
    for found, frame in zip(read, drawn, strict=True):
        np.testing.assert_array_equal(found.pixels, frame.pixels)
    assert said(network, read) == said(network, drawn)


def test_a_prepared_network_gives_the_bits_of_another_until_it_reads_others(network, drawn):
    state, image = network.state_dict(), run.as_input(frames.on_canvas(drawn[0])[None])
    other = networks.Network(run.VARIANT)
    other.load_state_dict(state)
    other.prepare(image.shape)
    for _ in range(2):
        np.testing.assert_array_equal(other.logits(image), network.logits(image))
    with pytest.raises(ValueError, match="the layer is prepared for"):
        other.logits(image.repeat(2, axis=0))
    other.load_state_dict({key: -value for key, value in state.items()})
    assert not np.array_equal(other.logits(image), network.logits(image))
    assert len(other.logits(image.repeat(2, axis=0))) == 2


def test_drawn_digits_are_told(network):
    found = frames.drawn(runs.read_weights()[2])
    answers = list(run.answers(network, (next(found) for _ in range(100))))
    assert sum(answer.name.endswith(str(answer.digit)) for answer in answers) >= 90
    assert all(0.1 < answer.probability <= 1 and answer.seconds > 0 for answer in answers)


def test_a_digit_drawn_upright_is_the_original_enlarged():
    original = np.zeros((8, 8))
    original[2, 5] = 16
    large = frames.turned(original, 0.0, 1.0)
    assert large.shape == (28, 28)
    assert large.dtype == np.uint8
    middle = large[6:22, 6:22].reshape(8, 2, 8, 2)[2, :, 5, :]
    assert (middle == round(255 * 0.75**2)).all()
    quarter = frames.turned(original, np.pi / 2, 1.0)
    np.testing.assert_array_equal(quarter, np.rot90(large, -1))


def test_a_larger_frame_is_cut_square_and_averaged(network, drawn):
    wide = np.zeros((85, 121), np.uint8)
    wide[:84, 18:102] = drawn[0].pixels.repeat(3, axis=0).repeat(3, axis=1)
    np.testing.assert_array_equal(frames.on_canvas(frames.Frame("wide", wide)), drawn[0].pixels)


def test_dark_digits_are_inverted(network, drawn):
    dark = [frame._replace(pixels=255 - frame.pixels) for frame in drawn]
    assert said(network, dark, invert=True) == said(network, drawn)
    assert said(network, dark) != said(network, drawn)


def test_a_pgm_of_fewer_grey_values_is_brightened(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 15\n" + bytes([0, 5, 15]))
    (frame,) = frames.from_folder(tmp_path)
    np.testing.assert_array_equal(frame.pixels, [[0, 85, 255]])


def test_pillow_or_opencv_or_neither(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no picture")
    wanted = {"PIL.Image": None, "cv2": None}
    monkeypatch.setattr(frames, "_module", wanted.get)
    with pytest.raises(frames.FrameError, match=r"a\.png cannot be read: it needs Pillow or OpenCV"):
        list(frames.from_folder(tmp_path))
    shot = np.ones((30, 30), np.uint8)
    wanted["cv2"] = SimpleNamespace(IMREAD_GRAYSCALE=0, imread=lambda path, flags: shot)
    assert next(frames.from_folder(tmp_path)).pixels is shot
    wanted["cv2"].imread = lambda path, flags: None
    with pytest.raises(frames.FrameError, match=r"a\.png cannot be read: OpenCV knows"):
        list(frames.from_folder(tmp_path))


class Camera:
    """As many shots as it is given."""

    def __init__(self, shots, opened=True):
        self.shots, self.isOpened, self.released = list(shots), lambda: opened, False

    def read(self):
        return (True, self.shots.pop(0)) if self.shots else (False, None)

    def release(self):
        self.released = True


def opencv(camera):
    return SimpleNamespace(
        VideoCapture=lambda number: camera, COLOR_BGR2GRAY=6, cvtColor=lambda shot, code: shot[..., 0]
    )


def test_a_camera_is_read_until_it_ends(monkeypatch, network, drawn):
    camera = Camera(frame.pixels[..., None].repeat(3, axis=2) for frame in drawn)
    monkeypatch.setattr(frames, "_module", {"cv2": opencv(camera)}.get)
    found = list(frames.from_camera(0))
    assert [frame.name for frame in found[:2]] == ["shot 0", "shot 1"]
    assert said(network, found) == said(network, drawn)
    assert camera.released


@pytest.mark.parametrize(
    ("cv2", "message"), [(None, "OpenCV"), (opencv(Camera([], False)), "camera 3 cannot")]
)
def test_a_camera_that_is_not_there(cv2, message, monkeypatch):
    monkeypatch.setattr(frames, "_module", {"cv2": cv2}.get)
    with pytest.raises(frames.FrameError, match=message):
        frames.from_camera(3)


# ---- bad input


def test_a_folder_without_frames(tmp_path, capsys):
    for folder, message in ((tmp_path, "holds no frames; wanted"), (tmp_path / "none", "is no folder")):
        with pytest.raises(SystemExit, match="2"):
            run.main([str(folder)])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", "a.npy cannot be read: "),
        ("a.npy", b"PK\x03\x04 an archive", "a.npy cannot be read: "),
        ("a.pgm", b"P2 1 1 255 0", "a.pgm cannot be read: begins with b'P2'"),
        ("a.pgm", b"P5 28 28 255 short", "a.pgm cannot be read: 5 bytes for 28 x 28"),
        ("a.pgm", b"P5 1 1 65535 ab", "at most 65535"),
        ("a.pgm", b"P5" + 9999 * b" ", "a.pgm cannot be read: begins with b'P5'"),
        ("a.pgm", b"P5 28 27 255\n" + bytes(28 * 27), "a.pgm is 27 x 28 pixels; wanted 28 x 28 or more"),
    ],
)
def test_a_file_that_is_no_frame_is_named(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        run.main([str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("array", [np.zeros((28, 28)), np.zeros((28, 28, 3), np.uint8), np.array(["a"])])
def test_an_array_that_is_no_frame_is_named(array, tmp_path, capsys):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(SystemExit, match="2"):
        run.main([str(tmp_path)])
    assert f"a.npy is {array.dtype} {array.shape}; wanted uint8 (height, width)" in capsys.readouterr().err


def test_an_array_of_objects_is_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(frames.FrameError, match="Object arrays cannot be loaded"):
        list(frames.from_folder(tmp_path))


def test_a_broken_picture_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(frames.FrameError, match=r"a\.png cannot be read: "):
        list(frames.from_folder(tmp_path))


def test_no_frames_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--frames", "0"])
    assert "--frames is 0; wanted at least 1" in capsys.readouterr().err


# ---- the run


def test_the_run_says_its_answers_its_rate_and_its_memory(tmp_path, drawn, network, capsys):
    for index, frame in enumerate(drawn):
        np.save(tmp_path / f"{index:02}.npy", frame.pixels)
    assert run.main([str(tmp_path), "--frames", "5"]) == 0
    first, *answers, rate, peak, goal = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"DCNv2, \d+ threads, \w+", first)
    assert answers == [
        f"{index:02}.npy: {digit} ({100 * probability:.0f} %)"
        for index, (digit, probability) in enumerate(said(network, drawn[:5]))
    ]
    assert re.fullmatch(r"5 frames, \d+ per second; \d+\.\d\d ms in the network, the median", rate)
    assert re.fullmatch(r"peak memory \d+\.\d MiB: \d+\.\d of numpy's import, .* of the frames", peak)
    assert "twice the 23520 bytes" in goal


def test_nothing_but_numpy_and_dcn_np_is_imported(tmp_path):
    # A module of None cannot be imported.
    absent = ["scipy", "sklearn", "torch", "PIL", "cv2", "tqdm", "ml_dtypes"]
    code = (
        f"import sys; sys.path[:0] = {IMPORTED_FROM}; sys.path.append({str(ROOT)!r})\n"
        f"sys.modules |= dict.fromkeys({absent})\n"
        "from examples.edge.run import main; main(['--frames', '3'])\n"
        "known = set(sys.stdlib_module_names) | {'numpy', 'dcn_np', 'examples', 'cython_runtime'}\n"
        "there = {name.partition('.')[0] for name, module in sys.modules.items() if module is not None}\n"
        "print(*(name for name in there - known if not name.startswith('_')), file=sys.stderr)"
    )
    command = [sys.executable, "-S", "-c", code]
    path = str(Path(np.__file__).parents[1])
    found = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert found.stderr.split() == []
    assert found.stdout.count("a drawn") == 3


def test_the_peak_grows_with_what_is_held():
    before = memory.peak_memory()
    held = np.ones(max(2 * before, 2**26), np.uint8)
    assert memory.peak_memory() >= before + held.nbytes / 4
    assert 5e6 < memory.memory_of_numpy() < 1e8  # not what this process, its parent, holds


def test_the_peak_of_each_import_is_said():
    command = [sys.executable, "-m", "examples.edge.memory", "numpy", "numpy.random"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    peaks = [int(line.split()[0]) for line in found.splitlines()]
    assert re.fullmatch(r"\d+ bytes after numpy\n\d+ bytes after numpy\.random\n", found)
    assert peaks == sorted(peaks)


def test_the_verdict_on_memory():
    peaks = {"numpy": 20 * 2**20, "imports": 30 * 2**20, "network": 31 * 2**20, "frames": 33 * 2**20}
    text = run.memory(peaks, 2**20)
    assert "33.0 MiB: 20.0 of numpy's import, 10.0 of dcn_np's" in text
    assert "1.0 of the network, 2.0 of the frames" in text
    assert text.endswith("missed by 11.0 MiB")
    assert run.memory(peaks, 7 * 2**20).endswith("reached")
