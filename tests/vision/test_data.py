"""Image data: every accepted layout against independent readings, splits, crops, batches over ranks, refusals."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import types
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from snn_rl.vision import data as data_module
from snn_rl.vision.data import (
    AUGMENTATIONS,
    Crops,
    ImageFiles,
    Images,
    channel_statistics,
    eval_batches,
    hold_out,
    load_images,
    read_image,
    train_batches,
)

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def noise(number: int, height: int, width: int | None = None, seed: int = 0) -> np.ndarray:
    """(N, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, height, width or height, 3), dtype=np.uint8)


def chw(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def write_folder(root: Path, pixels: np.ndarray, classes: tuple[str, ...], ending: str = "png") -> None:
    """Image i in class i % len(classes), lossless."""
    for i, image in enumerate(pixels):
        path = root / classes[i % len(classes)] / f"{i:03}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def memory(number: int, classes: int, size: int = 8) -> Images:
    labels = torch.arange(number) % classes
    return Images(chw(noise(number, size)), labels, tuple(f"c{i}" for i in range(classes)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageFiles, Images]:
    """The same 23 images, 8 x 8, as files and in memory."""
    root = tmp_path_factory.mktemp("files")
    write_folder(root / "train", noise(23, 8), ("a", "b", "c"))
    lazy = load_images(str(root), "train", 8, resident_bytes=23 * 192 - 1)
    resident = load_images(str(root), "train", 8, resident_bytes=23 * 192)
    assert isinstance(lazy, ImageFiles)
    assert isinstance(resident, Images)
    return lazy, resident


# Folders


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    pixels = noise(7, 8)
    write_folder(tmp_path / "train", pixels, ("b", "a", "C"))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    loaded = load_images(str(tmp_path), "train", 8)
    assert isinstance(loaded, Images)
    assert loaded.classes == ("C", "a", "b")
    order = [2, 5, 1, 4, 0, 3, 6]
    assert torch.equal(loaded.images, chw(pixels[order]))
    assert loaded.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert loaded.labels.dtype == torch.int64
    assert len(loaded) == 7


def image_folder(root: Path) -> list[tuple[Path, int]]:
    """Paths and labels by the rule of torchvision's ImageFolder: every file below a class, by folder, then by name."""
    out = []
    for label, name in enumerate(sorted(path.name for path in root.iterdir())):
        for place, _, files in sorted(os.walk(root / name, followlinks=True)):
            out += [(Path(place, file), label) for file in sorted(files) if file.lower().endswith(".png")]
    return out


@pytest.mark.parametrize("resident", [0, 2**20])
def test_folders_below_a_class_are_read_as_torchvision_reads_them(tmp_path: Path, resident: int) -> None:
    names = (
        "b/more/0.png", "b/more-of-it/1.png", "b/more/deep/er/2.png", "b/3.png", "b/Z/4.PNG", "b/more/notes.txt",
        "a/images/5.png", "a/dir.png/6.png", "c/7.png",
    )  # fmt: skip
    pixels = noise(len(names), 8)
    for image, name in zip(pixels, names, strict=True):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, "PNG")
    shutil.move(tmp_path / "train/c/7.png", tmp_path / "7.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "7.png", tmp_path / "elsewhere" / "7.png")
    (tmp_path / "train/c/link").symlink_to(tmp_path / "elsewhere")
    expected = image_folder(tmp_path / "train")
    assert len(expected) == len(names) - 1
    loaded = load_images(str(tmp_path), "train", 8, resident_bytes=resident)
    assert loaded.classes == ("a", "b", "c")
    assert loaded.labels.tolist() == [label for _, label in expected]
    images, _ = loaded.read(torch.arange(len(loaded)), None)
    assert torch.equal(images, chw(np.stack([np.asarray(Image.open(path)) for path, _ in expected])))


def test_hidden_folders_below_a_class_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(2, 8), ("a", "a/.ipynb_checkpoints"))
    Image.fromarray(noise(1, 8)[0]).save(tmp_path / "train" / "a" / "._0.png")
    assert len(load_images(str(tmp_path), "train", 8)) == 1


def test_a_link_to_a_folder_above_it_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(2, 8), ("a/x", "b/y"))
    (tmp_path / "train/a/x/to-b").symlink_to(tmp_path / "train/b")
    assert len(load_images(str(tmp_path), "train", 8)) == 3
    (tmp_path / "train/b/to-a").symlink_to(tmp_path / "train/a")
    with pytest.raises(ValueError, match=r"a/x/to-b/to-a links to a folder that it is in; remove the link"):
        load_images(str(tmp_path), "train", 8)


def tiny_imagenet(root: Path) -> None:
    write_folder(root / "train", noise(4, 8), ("n01/images", "n02/images"))
    (root / "train" / "n01" / "n01_boxes.txt").write_text("n01_0.png\t0\t0\t8\t8\n")
    for split in ("test", "val"):
        write_folder(root / split, noise(2, 8), ("images",))


def test_tiny_imagenet_is_read_once_its_val_has_class_folders(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    for split in ("train", "test"):
        with pytest.raises(
            ValueError,
            match=r"images only in .*; put the images to report on into .*/val/CLASS .of tiny-imagenet-200, "
            r"val/val_annotations\.txt names the classes",
        ):
            load_images(str(tmp_path), split, 8)
    for i in range(2):
        (tmp_path / f"val/n0{i + 1}").mkdir()
        (tmp_path / f"val/images/00{i}.png").rename(tmp_path / f"val/n0{i + 1}/{i}.png")
    (tmp_path / "val/images").rmdir()
    assert load_images(str(tmp_path), "train", 8).labels.tolist() == [0, 0, 1, 1]
    loaded = load_images(str(tmp_path), "test", 8)  # its own `test` has no labels
    assert loaded.classes == ("n01", "n02")
    assert torch.equal(loaded.read(torch.arange(2), None)[0], chw(noise(2, 8)))


def test_jpeg_is_decoded_as_pillow_does(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(2, 16), ("a",), "JPEG")
    loaded = load_images(str(tmp_path), "train", 16)
    expected = np.stack([np.asarray(Image.open(tmp_path / f"train/a/00{i}.JPEG")) for i in range(2)])
    assert torch.equal(loaded.read(torch.arange(2), None)[0], chw(expected))


def test_the_test_split_may_be_called_val(tmp_path: Path) -> None:
    pixels = noise(4, 8)
    write_folder(tmp_path / "train", pixels[:2], ("a", "b"))
    write_folder(tmp_path / "val", pixels, ("a", "b"))
    assert len(load_images(str(tmp_path), "test", 8)) == 4
    (tmp_path / "test").mkdir()  # ImageNet's own, flat and without labels
    Image.fromarray(pixels[0]).save(tmp_path / "test" / "x.png")
    assert len(load_images(str(tmp_path), "test", 8)) == 4
    write_folder(tmp_path / "test", pixels[:3], ("a", "b"))
    assert len(load_images(str(tmp_path), "test", 8)) == 3


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (14, 20), (28, 29), (29, 28), (32, 32)])
def test_other_sizes_are_resized_and_cut_at_the_centre(tmp_path: Path, height: int, width: int, lazy: bool) -> None:
    pixels = noise(1, height, width)
    write_folder(tmp_path / "train", pixels, ("a",))
    loaded = load_images(str(tmp_path), "train", 28, resident_bytes=0 if lazy else 2**20)
    assert isinstance(loaded, ImageFiles if lazy else Images)
    if height < width:  # the shorter side becomes 28 * 256 / 224 = 32
        image = Image.fromarray(pixels[0]).resize((32 * width // height, 32), Image.Resampling.BILINEAR)
    else:
        image = Image.fromarray(pixels[0]).resize((32, 32 * height // width), Image.Resampling.BILINEAR)
    expected = np.asarray(image).astype(int)
    top, left = round((expected.shape[0] - 28) / 2), round((expected.shape[1] - 28) / 2)
    expected = expected[top : top + 28, left : left + 28]
    found, labels = loaded.read(torch.tensor([0]), None)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), expected)
    assert labels.tolist() == [0]


def test_files_and_memory_agree(files: tuple[ImageFiles, Images]) -> None:
    lazy, resident = files
    assert lazy.classes == resident.classes
    assert torch.equal(lazy.labels, resident.labels)
    index = torch.tensor([5, 0, 5, 22])
    for a, b in ((lazy, resident), (lazy.pick(index), resident.pick(index))):
        assert len(a) == len(b)
        for crops in (None, Crops.pad_and_flip(4, 8, 2, torch.Generator().manual_seed(3))):
            take = index if len(a) == 23 else torch.arange(4)
            (images, labels), (expected, of) = a.read(take, crops), b.read(take, crops)
            assert torch.equal(images, expected)
            assert torch.equal(labels, of)
    crops = Crops.resized_and_flip(23, torch.Generator().manual_seed(3))
    images, expected = (d.read(torch.arange(23), crops)[0].int() for d in files)
    assert (images - expected).abs().max() <= 2  # fixed-point and two roundings against one
    assert lazy.to("cpu") is lazy
    assert torch.equal(resident.to("cpu").images, resident.images)


# The official CIFAR files


def python2(value: Any) -> bytes:
    """What Python 2's cPickle and the NumPy of its day write, protocol 2, for the types in CIFAR's files."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<I", len(value)) + value  # BINSTRING
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(python2(n) for n in value.shape) + b"t"
    return made + b"(K\x01" + shape + kind + b"\x89" + python2(value.tobytes()) + b"tb"


def dump(value: Any, protocol: str) -> bytes:
    return b"\x80\x02" + python2(value) + b"." if protocol == "python 2" else pickle.dumps(value, int(protocol))


def cifar_files(kind: str, protocol: str = "python 2") -> tuple[dict[str, bytes], dict[str, tuple[np.ndarray, list]]]:
    """(contents by name in the archive, (rows (N, 3072), labels) by split)."""
    classes = 100 if "100" in kind else 10
    rng = np.random.default_rng(7)
    names = [f"thing_{i}" for i in range(100)] if classes == 100 else list(CIFAR10)
    parts = {"train": 5 if classes == 10 else 1, "test": 1}
    contents: dict[str, bytes] = {}
    splits = {}
    for split, number in parts.items():
        rows = rng.integers(0, 256, (3 * number, 3072), dtype=np.uint8)
        labels = [int(x) for x in rng.integers(0, classes, 3 * number)]
        labels[0] = classes - 1
        splits[split] = rows, labels
        for part in range(number):
            of, to = rows[3 * part : 3 * part + 3], labels[3 * part : 3 * part + 3]
            stem = split if classes == 100 else f"data_batch_{part + 1}" if split == "train" else "test_batch"
            coarse = [x // 5 for x in to]
            if "bin" in kind:
                label = [bytes([c, f]) if classes == 100 else bytes([f]) for c, f in zip(coarse, to, strict=True)]
                contents[f"{stem}.bin"] = b"".join(a + b.tobytes() for a, b in zip(label, of, strict=True))
            elif classes == 100:
                batch = {b"filenames": [b"x.png"], b"fine_labels": to, b"coarse_labels": coarse, b"data": of}
                contents[stem] = dump(batch, protocol)
            else:
                contents[stem] = dump({b"batch_label": b"batch", b"labels": to, b"data": of}, protocol)
    lines = "".join(f"{name}\n" for name in names) + "\n"
    if "bin" in kind:
        contents["fine_label_names.txt" if classes == 100 else "batches.meta.txt"] = lines.encode()
    else:
        key = b"fine_label_names" if classes == 100 else b"label_names"
        meta = {b"num_vis": 3072, key: [name.encode() for name in names]}
        contents["meta" if classes == 100 else "batches.meta"] = dump(meta, protocol)
    return contents, splits


ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}


def write_cifar(root: Path, kind: str, contents: dict[str, bytes], packed: bool = False) -> None:
    if packed:
        with tarfile.open(root / ARCHIVES[kind], "w:gz") as tar:
            for name, raw in contents.items():
                member = tarfile.TarInfo(f"{kind}/{name}")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
    else:
        for name, raw in contents.items():
            (root / kind).mkdir(exist_ok=True)
            (root / kind / name).write_bytes(raw)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_official_cifar_files(tmp_path: Path, kind: str, packed: bool) -> None:
    contents, splits = cifar_files(kind)
    write_cifar(tmp_path, kind, contents, packed)
    for split, (rows, labels) in splits.items():
        loaded = load_images(str(tmp_path), split, 32)
        assert isinstance(loaded, Images)
        expected = np.stack(
            [np.stack([row[c * 1024 : (c + 1) * 1024].reshape(32, 32) for c in range(3)]) for row in rows]
        )
        assert np.array_equal(loaded.images.numpy(), expected)
        assert loaded.labels.tolist() == labels
        assert len(loaded.classes) == (100 if "100" in kind else 10)
        assert loaded.classes[1] == ("thing_1" if "100" in kind else "automobile")


def test_the_folder_inside_the_archive_will_do(tmp_path: Path) -> None:
    contents, splits = cifar_files("cifar-100-python")
    write_cifar(tmp_path, "cifar-100-python", contents)
    assert load_images(str(tmp_path / "cifar-100-python"), "train", 32).labels.tolist() == splits["train"][1]


@pytest.mark.parametrize("protocol", ["2", "3", "5"])
def test_cifar_pickled_anew_by_python_3(tmp_path: Path, protocol: str) -> None:
    contents, splits = cifar_files("cifar-10-batches-py", protocol)
    write_cifar(tmp_path, "cifar-10-batches-py", contents)
    loaded = load_images(str(tmp_path), "train", 32)
    assert torch.equal(loaded.read(torch.arange(15), None)[0].flatten(1), torch.from_numpy(splits["train"][0]))
    assert loaded.classes == CIFAR10


def test_the_pickles_written_here_are_real_ones() -> None:
    rows = noise(2, 32).reshape(2, 3072)
    raw = dump({b"data": rows, b"labels": [3, 4]}, "python 2").replace(b"numpy.core.", b"numpy._core.")
    value = pickle.loads(raw, encoding="bytes")
    assert np.array_equal(value[b"data"], rows)
    assert value[b"labels"] == [3, 4]


@pytest.mark.parametrize("resident", [0, 2**20])
def test_cifar_at_another_size(tmp_path: Path, resident: int) -> None:
    contents, splits = cifar_files("cifar-10-batches-bin")
    write_cifar(tmp_path, "cifar-10-batches-bin", contents)
    loaded = load_images(str(tmp_path), "test", 28, resident_bytes=resident)
    assert isinstance(loaded, Images if resident else ImageFiles)
    images = splits["test"][0].reshape(3, 3, 32, 32)  # the shorter side is to be 32 and is
    assert np.array_equal(loaded.read(torch.arange(3), None)[0].numpy(), images[:, :, 2:30, 2:30])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_code(tmp_path: Path, protocol: int) -> None:
    contents, _ = cifar_files("cifar-10-batches-py")
    marker = tmp_path / "ran"
    raw = pickle.dumps({b"data": Evil(marker), b"labels": [0]}, protocol)
    write_cifar(tmp_path, "cifar-10-batches-py", {**contents, "data_batch_3": raw})
    with pytest.raises(
        ValueError, match=r"data_batch_3 is not read \(it asks for _?_?(io|builtin__|builtins)\.open, and"
    ):
        load_images(str(tmp_path), "train", 32)
    assert not marker.exists()
    pickle.loads(raw)[b"data"].close()  # it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"\x80\x02cnumpy\ndtype\n(U\x02O8tR.", "an array of O8"),
        (b"\x80\x02cnumpy\ndtype\n(U\x02i8K\x00K\x01tR(K\x03U\x01>NNNtb.", "an array that is big-endian"),
        (b"\x80\x02c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "the encoding hex"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "it asks for numpy.core.multiarray.scalar"),
        (b"\x80\x02](K\x01", ""),
        (b"", "Ran out of input"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, value: bytes, said: str) -> None:
    contents, _ = cifar_files("cifar-10-batches-py")
    write_cifar(tmp_path, "cifar-10-batches-py", {**contents, "test_batch": value})
    message = re.escape(f"{tmp_path}/cifar-10-batches-py/test_batch is not read ({said}")
    with pytest.raises(ValueError, match=message + ".*restore it from the official archive"):
        load_images(str(tmp_path), "test", 32)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({b"labels": [0, 1]}, "must hold 'data' of shape (N, 3072) in bytes, got None; restore it"),
        ({b"data": PIXELS[:, :5], b"labels": [0, 1]}, "must hold 'data' of shape (N, 3072) in bytes, got (2, 5)"),
        ({b"data": PIXELS}, "must hold a label for each of 2 images, got (0,); restore it"),
        ({b"data": PIXELS, b"labels": [1]}, "must hold a label for each of 2 images, got (1,); restore it"),
        ({b"data": PIXELS, b"labels": [1, 10]}, "must hold labels of 0 to 9, got 1 to 10; restore it"),
    ],
)
def test_wrong_python_batches(tmp_path: Path, batch: dict, said: str) -> None:
    contents, _ = cifar_files("cifar-10-batches-py")
    write_cifar(tmp_path, "cifar-10-batches-py", {**contents, "test_batch": dump(batch, "python 2")})
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/cifar-10-batches-py/test_batch {said}")):
        load_images(str(tmp_path), "test", 32)


def test_wrong_binary_batches(tmp_path: Path) -> None:
    contents, _ = cifar_files("cifar-100-binary")
    write_cifar(tmp_path, "cifar-100-binary", {**contents, "test.bin": b"\0" * 3073, "train.bin": b"\xff" * 3074})
    with pytest.raises(ValueError, match=r"test\.bin must hold rows of 3074 bytes, got 3073 bytes; restore it"):
        load_images(str(tmp_path), "test", 32)
    with pytest.raises(ValueError, match=r"train\.bin must hold labels of 0 to 99, got 255 to 255; restore it"):
        load_images(str(tmp_path), "train", 32)
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"fine_label_names\.txt must name 100 classes, got 2; restore it"):
        load_images(str(tmp_path), "test", 32)


@pytest.mark.parametrize("packed", [False, True])
def test_an_incomplete_official_set(tmp_path: Path, packed: bool) -> None:
    contents, _ = cifar_files("cifar-10-batches-py")
    del contents["data_batch_2"], contents["data_batch_5"]
    write_cifar(tmp_path, "cifar-10-batches-py", contents, packed)
    message = r"lacks data_batch_2, data_batch_5; restore it from the official cifar-10-python\.tar\.gz"
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path), "train", 32)
    with pytest.raises(ValueError, match=r"CIFAR in .* has the splits train and test, got val"):
        load_images(str(tmp_path), "val", 32)


def test_a_damaged_archive_and_an_ambiguous_folder(tmp_path: Path) -> None:
    contents, _ = cifar_files("cifar-10-batches-bin")
    write_cifar(tmp_path, "cifar-10-batches-bin", contents, packed=True)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive" * 100, whole[:1500] + bytes(9) + whole[1509:]):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is corrupt \(.*\); download it again"):
            load_images(str(tmp_path), "train", 32)
    write_cifar(tmp_path, "cifar-100-binary", cifar_files("cifar-100-binary")[0])
    with pytest.raises(ValueError, match="holds both CIFAR-10 and CIFAR-100; put each into a folder of its own"):
        load_images(str(tmp_path), "train", 32)


# What is refused


def test_missing_sources_and_splits(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no data set cifar11: neither a folder nor one of cifar10, cifar100, imagenet"
    ):
        load_images("cifar11", "train", 32)
    with pytest.raises(
        ValueError, match="has no split test; accepted are test/CLASS/NAME \\(or val/CLASS/NAME\\) and the"
    ):
        load_images(str(tmp_path), "test", 32)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train has no class folders; the layout is .*train/CLASS/NAME"):
        load_images(str(tmp_path), "train", 32)
    with pytest.raises(ValueError, match="image_size must be >= 1, got 0"):
        load_images(str(tmp_path), "train", 0)


def test_empty_and_differing_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", noise(3, 8), ("a", "b", "c"))
    write_folder(tmp_path / "test", noise(3, 8), ("a", "b", "x"))
    for split, order in (
        ("train", "c only in .*train; x only in .*test"),
        ("test", "x only in .*test; c only in .*train"),
    ):
        with pytest.raises(ValueError, match=f"must have the same class folders: {order}"):
            load_images(str(tmp_path), split, 8)
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "train" / "b" / "001.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 3 class folders in .*train hold no images: b; remove them or add images"
    ):
        load_images(str(tmp_path), "train", 8)


def spoil(root: Path) -> None:
    """12 of 20 images: 5 corrupt, 5 not RGB, 2 missing."""
    write_folder(root, noise(20, 8), ("a",))
    for i in range(5):
        (root / "a" / f"{i:03}.png").write_bytes(b"no image")
    for i, mode in enumerate(("L", "RGBA", "P", "CMYK", "LA"), 5):
        path = root / "a" / f"{i:03}.png"
        image = Image.open(path).convert(mode)
        path.unlink()
        image.save(path, format="JPEG" if mode == "CMYK" else "PNG")
    for i in (10, 11):
        (root / "a" / f"{i:03}.png").unlink()
        (root / "a" / f"{i:03}.png").symlink_to("nowhere.png")


@pytest.mark.parametrize("resident", [0, 2**20])
def test_all_unusable_images_are_told_at_once(tmp_path: Path, resident: int) -> None:
    spoil(tmp_path / "train")
    message = (
        f"12 of 20 images in {tmp_path}/train cannot be used: 5 corrupt (a/000.png, a/001.png, a/002.png, ...), "
        "2 missing (a/010.png, a/011.png), 5 not RGB (a/005.png is L, a/006.png is RGBA, a/007.png is P, ...); "
        "remove or convert them, or convert them while loading (convert=True, --convert)"
    )
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        load_images(str(tmp_path), "train", 8, resident_bytes=resident)


@pytest.mark.parametrize("resident", [0, 2**20])
def test_images_are_converted_where_one_asks_for_it(tmp_path: Path, resident: int) -> None:
    spoil(tmp_path / "train")
    for i in (*range(5), 10, 11):
        (tmp_path / "train" / "a" / f"{i:03}.png").unlink()
    loaded = load_images(str(tmp_path), "train", 8, resident_bytes=resident, convert=True)
    expected = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((tmp_path / "train/a").iterdir())]
    assert torch.equal(loaded.read(torch.arange(13), None)[0], chw(np.stack(expected)))


GREY_16 = np.array(
    [[0, 128, 129, 255], [256, 257, 385, 386], [32_767, 32_768, 33_000, 65_406], [65_407, 65_534, 65_535, 1]]
)


def rounded(values: np.ndarray, white: int) -> Tensor:
    """Greyscale of ``white`` + 1 values as 8 bits, to the nearest, in RGB (1, 3, H, W)."""
    nearest = [[int(Fraction(int(v) * 255, white) + Fraction(1, 2)) for v in row] for row in values]
    return torch.tensor(nearest, dtype=torch.uint8).expand(1, 3, -1, -1)


def tiff(rows: bytes, bits: int, photometric: int) -> bytes:
    """An uncompressed greyscale TIFF file of 4 x 4 pixels, little-endian."""
    tags = [
        (256, 4),
        (257, 4),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 4),
        (279, len(rows)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed_12(values: np.ndarray) -> bytes:
    bits = "".join(f"{v:012b}" for v in values.flatten())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("resident", [0, 2**20])
@pytest.mark.parametrize(
    "kind", ["png", "tif", "big-endian tif", "white-is-zero tif", "12-bit tif", "pgm", "12-bit pgm"]
)
def test_greyscale_of_more_than_8_bits_is_scaled(tmp_path: Path, kind: str, resident: int) -> None:
    path = tmp_path / "train" / "a" / f"0.{kind[-3:]}"
    path.parent.mkdir(parents=True)
    values = GREY_16 % 4096 if "12-bit" in kind else GREY_16
    white = 4095 if "12-bit" in kind else 65_535
    if kind in ("png", "tif"):
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif kind == "big-endian tif":
        Image.frombytes("I;16B", (4, 4), values.astype(">u2").tobytes()).save(path)
        assert path.read_bytes()[:2] == b"MM"
    elif kind == "white-is-zero tif":
        path.write_bytes(tiff((65_535 - values).astype("<u2").tobytes(), 16, 0))
    elif kind == "12-bit tif":
        path.write_bytes(tiff(packed_12(values), 12, 1))
    else:
        path.write_bytes(b"P5 4 4 %d\n" % white + values.astype(">u2").tobytes())
    loaded = load_images(str(tmp_path), "train", 4, resident_bytes=resident, convert=True)
    found, _ = loaded.read(torch.tensor([0]), None)
    if kind == "12-bit pgm":  # Pillow scales it to 16 bits first
        assert (found.int() - rounded(values, white).int()).abs().max() <= 1
    else:
        assert torch.equal(found, rounded(values, white))
    assert np.array_equal(read_image(path, 4, convert=True)[None], found.numpy())


def test_16_bits_of_8_bit_values_are_those_values(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values * 257).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 16, convert=True)[0], values)


@pytest.mark.parametrize("resident", [0, 2**20])
def test_modes_without_a_known_white_are_refused(tmp_path: Path, resident: int) -> None:
    folder = tmp_path / "train" / "a"
    write_folder(tmp_path / "train", noise(1, 8), ("a",))
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "f.tif")
    Image.fromarray(np.ones((8, 8), np.int32)).save(folder / "i.tif")
    Image.fromarray(np.ones((8, 8), np.uint16)).save(folder / "i16.png")
    said = "2 not convertible to RGB (a/f.tif is F, a/i.tif is I); remove or convert them, or"
    out = "save those that are not convertible as 8-bit RGB"
    with pytest.raises(ValueError, match=re.escape(f"{said} {out}") + "$"):
        load_images(str(tmp_path), "train", 8, resident_bytes=resident, convert=True)
    message = f"1 not RGB (a/i16.png is I;16), {said} convert them while loading (convert=True, --convert), or {out}"
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        load_images(str(tmp_path), "train", 8, resident_bytes=resident)
    with pytest.raises(ValueError, match=r"f\.tif is not convertible to RGB: F; save it as 8-bit RGB"):
        read_image(folder / "f.tif", 8, convert=True)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_orientation_and_pages_are_taken_as_pillow_takes_them(tmp_path: Path, ending: str) -> None:
    first, second = (Image.fromarray(image) for image in noise(2, 8, seed=5))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "train" / "a" / f"0.{ending}"
    path.parent.mkdir(parents=True)
    pages = {} if ending == "jpg" else {"save_all": True, "append_images": [second]}
    lossless = {"lossless": True} if ending == "webp" else {}
    first.save(path, exif=exif, **pages, **lossless)
    found = load_images(str(tmp_path), "train", 8).read(torch.tensor([0]), None)[0]
    with Image.open(path) as image:  # what ImageFolder does
        assert torch.equal(found, chw(np.asarray(image.convert("RGB"))[None]))
    if ending != "jpg":
        stored = np.rot90(np.asarray(first), -1) if ending == "tif" else np.asarray(first)
        assert torch.equal(found, chw(stored[None]))


def truncate(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_truncated_file(tmp_path: Path, ending: str) -> None:
    write_folder(tmp_path / "train", noise(3, 64), ("a",), ending)
    truncate(tmp_path / "train" / "a" / f"001.{ending}")
    with pytest.raises(
        ValueError, match=rf"1 of 3 images in .* cannot be used: 1 corrupt \(a/001\.{ending}\); remove or"
    ):
        load_images(str(tmp_path), "train", 64)
    lazy = load_images(str(tmp_path), "train", 64, resident_bytes=0)  # its header is whole
    message = rf"{tmp_path}/train/a/001\.{ending} is corrupt: .*; restore or remove it"
    with pytest.raises(ValueError, match=message):
        lazy.read(torch.arange(3), None)
    with pytest.raises(ValueError, match=message):
        list(eval_batches(lazy, 1, device="cpu"))
    (tmp_path / "train" / "a" / f"001.{ending}").unlink()
    with pytest.raises(ValueError, match=rf"001\.{ending} is missing: no such file; restore or remove it"):
        lazy.read(torch.arange(3), None)


# The hub


class FakeRows:
    def __init__(self, pixels: np.ndarray, labels: list[int], image: str, label: str, cast: bool = False) -> None:
        self.pixels, self.labels, self.image, self.label, self.cast = pixels, labels, image, label, cast
        self.features = {label: types.SimpleNamespace(names=["x", "y"])}

    def cast_column(self, name: str, feature: Any) -> FakeRows:
        assert name == self.image
        assert feature == ("image feature", False)
        return FakeRows(self.pixels, self.labels, self.image, self.label, cast=True)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            assert key == self.label
            return self.labels
        assert self.cast
        file = io.BytesIO()
        Image.fromarray(self.pixels[key]).save(file, format="PNG")
        return {self.image: {"bytes": file.getvalue(), "path": None}, self.label: self.labels[key]}


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[str, str]]:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> Any:
        asked.append((name, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.__dict__.update(load_dataset=load_dataset, Image=lambda decode: ("image feature", decode))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("resident", [0, 2**20])
@pytest.mark.parametrize(
    ("source", "split", "image", "label", "asked"),
    [
        ("cifar10", "train", "img", "label", ("uoft-cs/cifar10", "train")),
        ("cifar10", "test", "img", "label", ("uoft-cs/cifar10", "test")),
        ("cifar100", "test", "img", "fine_label", ("uoft-cs/cifar100", "test")),
        ("imagenet-1k", "train", "image", "label", ("ILSVRC/imagenet-1k", "train")),
        ("imagenet-1k", "test", "image", "label", ("ILSVRC/imagenet-1k", "validation")),
    ],
)
def test_public_names(
    monkeypatch: pytest.MonkeyPatch, source: str, split: str, image: str, label: str, asked: tuple, resident: int
) -> None:
    pixels = noise(5, 8)
    calls = fake_hub(monkeypatch, FakeRows(pixels, [0, 1, 1, 0, 1], image, label))
    loaded = load_images(source, split, 8, resident_bytes=resident)
    assert calls == [asked]
    assert isinstance(loaded, Images if resident else ImageFiles)
    assert loaded.classes == ("x", "y")
    images, labels = loaded.read(torch.tensor([4, 0]), None)
    assert torch.equal(images, chw(pixels[[4, 0]]))
    assert labels.tolist() == [1, 0]
    if isinstance(loaded, ImageFiles):
        assert str(loaded.paths[4]) == f"{asked[0]} {asked[1]}[4]"


def test_public_names_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, FakeRows(noise(2, 8), [0, -1], "img", "label"))
    with pytest.raises(ValueError, match=r"uoft-cs/cifar10 \(test\) has images without labels; give a folder"):
        load_images("cifar10", "test", 8)
    with pytest.raises(ValueError, match="cifar10 has the splits train and test, got val"):
        load_images("cifar10", "val", 8)
    fake_hub(monkeypatch, FakeRows(noise(2, 8)[..., 0], [0, 1], "img", "label"))
    with pytest.raises(
        ValueError, match=r"2 not RGB \(uoft-cs/cifar10 test\[0\] is L, uoft-cs/cifar10 test\[1\] is L\)"
    ):
        load_images("cifar10", "test", 8)
    fake_hub(monkeypatch, OSError("no route"))
    with pytest.raises(
        ValueError, match=r"ILSVRC/imagenet-1k \(train\) is not loaded \(no route\); check the network and"
    ):
        load_images("imagenet-1k", "train", 8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"datasets, which is not installed: pip install 'snn_rl\[vision\]', or give a"
    ):
        load_images("cifar10", "train", 8)


# Splitting


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(2, 9), min_size=1, max_size=5), seed=st.integers(0, 2**40), extra=st.data())
def test_hold_out_is_a_stratified_partition(counts: list[int], seed: int, extra: st.DataObject) -> None:
    labels = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    # Each image says which one it is.
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    whole = Images(images, labels, tuple(map(str, range(len(counts)))))
    number = extra.draw(st.integers(1, (min(counts) - 1) * len(counts)))
    train, held = hold_out(whole, number, seed)
    assert len(held) == number
    ids = [part.images[:, 0, 0, 0].long() for part in (train, held)]
    assert sorted(torch.cat(ids).tolist()) == list(range(len(labels)))
    for part, which in zip((train, held), ids, strict=True):
        assert torch.equal(part.labels, labels[which])
        assert part.classes == whole.classes
    of = torch.bincount(held.labels, minlength=len(counts))
    assert of.max() - of.min() <= 1
    assert (torch.bincount(train.labels, minlength=len(counts)) > 0).all()
    assert torch.equal(hold_out(whole, number, seed)[1].images, held.images)


def test_hold_out_depends_on_the_seed_and_keeps_files_files(files: tuple[ImageFiles, Images]) -> None:
    whole = memory(200, 2)
    assert not torch.equal(hold_out(whole, 100, 0)[1].images, hold_out(whole, 100, 1)[1].images)
    (lazy, held), (resident, same) = (hold_out(part, 6, 3) for part in files)
    assert isinstance(lazy, ImageFiles)
    assert torch.equal(held.read(torch.arange(6), None)[0], same.read(torch.arange(6), None)[0])
    assert torch.equal(lazy.labels, resident.labels)


def test_hold_out_refuses_to_empty_a_class() -> None:
    message = "10 held-out images would take 5 of the 5 images of class c0 and leave none for training; hold out fewer"
    with pytest.raises(ValueError, match=message):
        hold_out(memory(10, 2), 10, 0)
    with pytest.raises(ValueError, match="the number of held-out images must be >= 1, got 0"):
        hold_out(memory(10, 2), 0, 0)


# Crops


@pytest.mark.parametrize(("size", "padding"), [(8, 1), (8, 4), (5, 0), (32, 4)])
def test_pad_and_crop_is_padding_and_slicing(size: int, padding: int) -> None:
    pixels = noise(40, size)
    crops = Crops.pad_and_flip(40, size, padding, torch.Generator().manual_seed(5))
    found = crops.apply(chw(pixels))
    assert crops.offset is not None
    for i in range(40):
        padded = np.pad(pixels[i], ((padding, padding), (padding, padding), (0, 0)))
        top, left = crops.offset[i].tolist()
        expected = padded[top : top + size, left : left + size]
        expected = expected[:, ::-1] if crops.flip[i] else expected
        assert np.array_equal(found[i].permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(np.asarray(crops.cut(Image.fromarray(pixels[i]), size, i)), expected)


def test_pad_and_crop_draws_uniformly() -> None:
    crops = Crops.pad_and_flip(20_000, 32, 2, torch.Generator().manual_seed(0))
    assert crops.offset is not None
    for i in (0, 1):
        share = torch.bincount(crops.offset[:, i]) / 20_000
        assert len(share) == 5
        assert (share - 0.2).abs().max() < 0.02
    assert abs(float(crops.flip.float().mean()) - 0.5) < 0.02


def test_resized_crops_are_pillows() -> None:
    size = 48
    pixels = noise(30, 12)
    smooth = np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pixels])
    crops = Crops.resized_and_flip(30, torch.Generator().manual_seed(1))
    boxes = crops.boxes(size, size)
    found = crops.apply(chw(smooth)).int()
    for i, (left, top, w, h) in enumerate(boxes.tolist()):
        assert 0 <= left <= size - w
        assert 0 <= top <= size - h
        image = Image.fromarray(smooth[i]).resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, left + w, top + h)
        )
        expected = np.asarray(image).astype(int)
        expected = expected[:, ::-1] if crops.flip[i] else expected
        assert np.abs(found[i].permute(1, 2, 0).numpy() - expected).max() <= 1
        cut = np.asarray(crops.cut(Image.fromarray(smooth[i]), size, i))
        assert np.array_equal(cut, expected)
    assert len(set(map(tuple, boxes.tolist()))) > 20


@pytest.mark.parametrize("size", [7, 32, 224])
def test_a_crop_of_the_whole_image_is_the_image(size: int) -> None:
    images = chw(noise(6, size))
    crops = Crops.resized_and_flip(6, torch.Generator().manual_seed(2), scale=(1, 1), ratio=(1, 1))
    expected = torch.stack([x.flip(-1) if flip else x for x, flip in zip(images, crops.flip, strict=True)])
    assert torch.equal(crops.apply(images), expected)
    assert 0 < int(crops.flip.sum()) < 6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crops.apply(images), expected)


def test_resized_crops_have_the_shares_and_ratios_asked_for() -> None:
    crops = Crops.resized_and_flip(5_000, torch.Generator().manual_seed(0))
    w, h = crops.boxes(1_000, 1_000)[:, 2:].double().unbind(1)
    area, ratio = w * h / 1e6, w / h
    assert 0.249 < area.min() < 0.26
    assert 0.95 < area.max() <= 1
    assert 0.745 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.34
    assert abs(float(ratio.log().mean())) < 0.02  # symmetric, which a uniform ratio would not be
    assert abs(float((ratio.log() > 0.1438).double().mean()) - 0.25) < 0.03


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(100, 1_000, (433, 0, 133, 100)), (1_000, 90, (0, 440, 90, 120)), (60, 60, (0, 0, 60, 60))],
)
def test_where_no_try_fits_the_centre_is_taken(height: int, width: int, box: tuple[int, ...]) -> None:
    crops = Crops.resized_and_flip(3, torch.Generator().manual_seed(0), scale=(1.1, 1.2))
    assert [tuple(b) for b in crops.boxes(height, width).tolist()] == [box] * 3


def test_a_part_of_the_crops_is_that_part() -> None:
    images = chw(noise(10, 8))
    for crops in (
        Crops.pad_and_flip(10, 8, 2, torch.Generator().manual_seed(0)),
        Crops.resized_and_flip(10, torch.Generator().manual_seed(0)),
    ):
        whole = crops.apply(images)
        for part in (slice(2, 7), torch.tensor([9, 3, 3])):
            assert torch.equal(crops[part].apply(images[part]), whole[part])
        assert len(crops[2:7]) == 5


def test_crops_refused() -> None:
    generator = torch.Generator()
    crops = Crops.pad_and_flip(2, 8, 1, generator)
    with pytest.raises(ValueError, match="2 crops must be applied to as many images, got 3"):
        crops.apply(chw(noise(3, 8)))
    with pytest.raises(ValueError, match="the crops are for images of 8 pixels, got 9"):
        crops.apply(chw(noise(2, 9)))
    with pytest.raises(ValueError, match=r"scale must be an increasing range above 0, got \(0.5, 0.2\)"):
        Crops.resized_and_flip(2, generator, scale=(0.5, 0.2))
    with pytest.raises(ValueError, match=r"ratio must be an increasing range above 0, got \(0, 1\)"):
        Crops.resized_and_flip(2, generator, ratio=(0, 1))


# Batches


def joined(ranks: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Batch by batch, the ranks' parts in order of rank."""
    most = max(map(len, ranks))
    rows = [[rank[i] for rank in ranks if i < len(rank)] for i in range(most)]
    return [(torch.cat([x for x, _ in row]), torch.cat([y for _, y in row])) for row in rows]


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


@settings(deadline=None, max_examples=40)
@given(
    number=st.integers(12, 30),
    each=st.integers(1, 3),
    world=st.integers(1, 4),
    augmentation=st.sampled_from(AUGMENTATIONS),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
)
def test_ranks_together_train_on_the_single_process_batches(
    number: int, each: int, world: int, augmentation: str, seed: int, epoch: int
) -> None:
    whole = memory(number, 3)

    def run(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
        kwargs = {"augmentation": augmentation, "seed": seed, "epoch": epoch, "rank": rank, "world": world}
        return list(train_batches(whole, each * full, **kwargs, device="cpu"))  # type: ignore[arg-type]

    full = world
    alone = run(0, 1)
    ranks = [run(rank, world) for rank in range(world)]
    assert all(len(images) == each for rank in ranks for images, _ in rank)
    assert len(alone) == number // (each * world)
    assert same(joined(ranks), alone)


@settings(deadline=None, max_examples=40)
@given(number=st.integers(0, 30), each=st.integers(1, 4), world=st.integers(1, 4))
def test_ranks_together_evaluate_every_image_once(number: int, each: int, world: int) -> None:
    whole = memory(number, 3)
    alone = list(eval_batches(whole, each * world, device="cpu"))
    ranks = [list(eval_batches(whole, each * world, rank=r, world=world, device="cpu")) for r in range(world)]
    if number:
        assert same(joined(ranks), alone)
        assert torch.equal(torch.cat([x for x, _ in alone]), whole.images)
        assert torch.equal(torch.cat([y for _, y in alone]), whole.labels)
    else:
        assert not alone
        assert not any(ranks)


def test_an_epoch_holds_every_image_once_and_depends_on_seed_and_epoch() -> None:
    whole = memory(24, 24)

    def labels(seed: int, epoch: int) -> list[int]:
        run = train_batches(whole, 5, augmentation="none", seed=seed, epoch=epoch, device="cpu")
        batches = list(run)
        for images, labels in batches:
            assert torch.equal(images, whole.images[labels])
            assert images.dtype == torch.uint8
        return torch.cat([y for _, y in batches]).tolist()

    orders = [labels(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for order in orders:
        assert len(order) == len(set(order)) == 20  # the incomplete batch is dropped
    assert len(set(map(tuple, orders))) == 4
    assert labels(0, 1) == orders[1]


def test_the_default_padding_is_an_eighth() -> None:
    white = Images(torch.full((400, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(400, dtype=torch.int64), ("a",))
    ((images, _),) = train_batches(white, 400, augmentation="crop-flip", seed=0, epoch=0, device="cpu")
    black = (images[:, 0] == 0).all(2).sum(1)  # rows of padding
    assert set(black.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_files_give_the_batches_that_memory_gives(files: tuple[ImageFiles, Images], augmentation: str) -> None:
    def run(part: ImageFiles | Images, **kwargs: int) -> list[tuple[Tensor, Tensor]]:
        return list(train_batches(part, 4, augmentation=augmentation, seed=3, epoch=2, **kwargs, device="cpu"))

    lazy, resident = (run(part) for part in files)
    assert len(lazy) == 5
    for (images, labels), (expected, of) in zip(lazy, resident, strict=True):
        assert torch.equal(labels, of)
        assert (images.int() - expected.int()).abs().max() <= (2 if augmentation == "resized-crop-flip" else 0)
    assert same(joined([run(files[0], rank=rank, world=2) for rank in (0, 1)]), lazy)
    assert same(*(list(eval_batches(part, 5, device="cpu")) for part in files))


def test_a_crop_of_a_file_is_a_crop_of_the_whole_file(tmp_path: Path) -> None:
    """Not of the square that is evaluated: the left and right ends of a wide image appear in training."""
    wide = np.zeros((1, 20, 80, 3), np.uint8)
    wide[:, :, :20] = 255
    write_folder(tmp_path / "train", wide, ("a",))
    lazy = load_images(str(tmp_path), "train", 16, resident_bytes=0)
    assert not lazy.read(torch.tensor([0]), None)[0].any()
    crops = Crops.resized_and_flip(40, torch.Generator().manual_seed(0))
    seen, _ = lazy.read(torch.zeros(40, dtype=torch.int64), crops)
    assert (seen.flatten(1).float().mean(1) > 128).any()


def test_an_epoch_of_files_may_be_left_early(files: tuple[ImageFiles, Images]) -> None:
    batches = train_batches(files[0], 2, augmentation="none", seed=0, epoch=0, device="cpu")
    assert isinstance(batches, Iterator)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not list(batches)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 11}, "batch_size must be <= 10, the number of training images, got 11"),
        ({"batch_size": 5, "world": 2}, "batch_size must be a multiple of the 2 processes, got 5"),
        ({"rank": 2, "world": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"augmentation": "mixup"}, "augmentation must be one of none, crop-flip, resized-crop-flip, got mixup"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"epoch": -1}, "epoch must be >= 0, got -1"),
    ],
)
def test_batches_refused_before_the_first(kwargs: dict[str, Any], message: str) -> None:
    call = {"batch_size": 2, "augmentation": "none", "seed": 0, "epoch": 0, "device": "cpu", **kwargs}
    with pytest.raises(ValueError, match=message):
        train_batches(memory(10, 2), **call)
    if "world" in kwargs or kwargs.get("batch_size") == 0:
        for name in ("augmentation", "seed", "epoch"):
            del call[name]
        with pytest.raises(ValueError, match=message):
            eval_batches(memory(10, 2), **call)


# Statistics


def test_channel_statistics(files: tuple[ImageFiles, Images], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = files[1].images.numpy() / 255.0
    for part in files:
        mean, std = channel_statistics(part)
        assert mean == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-12)
        assert std == pytest.approx(pixels.std((0, 2, 3)), abs=1e-12)
    monkeypatch.setattr(data_module, "STATISTICS_SAMPLE", 5)
    mean, _ = channel_statistics(files[0])
    assert mean == pytest.approx(pixels[[0, 4, 9, 13, 18]].mean((0, 2, 3)), abs=1e-12)
    with pytest.raises(ValueError, match="the statistics of 0 images are not defined; load some"):
        channel_statistics(memory(0, 1))
