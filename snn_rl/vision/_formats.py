"""Where images come from: folders, the official CIFAR files, the Hugging Face hub. Lists, opens and checks them."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WORKERS = min(32, os.cpu_count() or 1)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
TIFF_TAGS = {"BitsPerSample": 258, "PhotometricInterpretation": 262}
CONVERTIBLE = {"L", "LA", "P", "PA", "1", "RGBA", "CMYK", "YCbCr"}  # of 8 bits, and to RGB by Pillow


@dataclass(frozen=True)
class Table:
    """A file that holds many images: ``open(index)`` gives one."""

    name: str
    open: Callable[[int], Image.Image]


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a table; stands where the path of a file would."""

    table: Table
    index: int

    def __str__(self) -> str:
        return f"{self.table.name}[{self.index}]"


Entry = Path | Row


@dataclass(frozen=True)
class Listing:
    """The images of one split, none of them decoded, or all where the official file holds pixels."""

    where: str  # for messages
    root: Path | None  # what the entries' names are relative to
    entries: tuple[Entry, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    pixels: NDArray[np.uint8] | None = None  # (N, 3, 32, 32)

    def name(self, entry: Entry) -> str:
        return str(entry.relative_to(self.root) if self.root and isinstance(entry, Path) else entry)


NOT_RGB, INCONVERTIBLE = "not RGB", "not convertible to RGB"  # the former `to_rgb` can change
WAYS_OUT = {
    NOT_RGB: "convert them while loading (convert=True, --convert)",
    INCONVERTIBLE: "save those that are not convertible as 8-bit RGB",
}


class Unusable(Exception):
    """An image that cannot be used: ``kind`` is missing, unreadable, corrupt or of `WAYS_OUT`, ``detail`` says more."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def with_image(entry: Entry, use: Callable[[Image.Image], Any], convert: bool) -> Any:
    """``use(image)`` of the opened image, whose pixels PIL reads when they are first needed.

    The image is RGB, or where ``convert`` is true of any mode that `to_rgb` takes.

    Raises:
        Unusable: a missing or corrupt file, or an image of another mode.
    """
    try:
        opened = Image.open(entry) if isinstance(entry, Path) else entry.table.open(entry.index)
        with opened as image:
            mode = image.mode
            convertible = mode in CONVERTIBLE or _white(image) is not None
            if mode == "RGB" or (convert and convertible):
                return use(image)
    except FileNotFoundError as error:
        raise Unusable("missing", "no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever their damaged input leads them to
        system = isinstance(error, OSError) and error.errno is not None  # no permission, too many open files
        raise Unusable("unreadable" if system else "corrupt", str(error) or type(error).__name__) from error
    raise Unusable(NOT_RGB if convertible else INCONVERTIBLE, mode)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image that `with_image` lets through, in RGB.

    Transparency is dropped. Greyscale of more than 8 bits is scaled, black to 0 and white to 255: Pillow's own
    conversion would cut all of it off at 255.
    """
    if (white := _white(image)) is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    grey = (np.asarray(image).astype(np.int64) * 510 + white) // (2 * white)  # to the nearest
    if _white_is_zero(image):
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """The largest value of a greyscale image of more than 8 bits; None for other images, and where it is unknown."""
    if image.mode.startswith("I") and image.format in (
        "PNG",
        "PPM",
    ):  # Pillow scales a PGM file of any range to 16 bits
        return 2**16 - 1
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return 2 ** _tag(image, "BitsPerSample") - 1  # 12 bits stay as they are
    return None


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF file of 16 bits counts from white to black, which Pillow inverts for 8 bits alone."""
    return image.format == "TIFF" and _tag(image, "PhotometricInterpretation") == 0


def _tag(image: Any, name: str) -> int:
    value = image.tag_v2.get(TIFF_TAGS[name], 0)
    return int(value[0] if isinstance(value, tuple) else value)


def fit(image: Image.Image, size: int) -> Image.Image:
    """The image as it is evaluated: the shorter side to 256/224 of ``size``, then the centre; as is where it fits."""
    if image.size == (size, size):
        return image
    shorter = round(size * 256 / 224)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def list_images(source: str, split: str) -> Listing:
    """The images of a public data set or of a folder (see ``load_images``).

    Raises:
        ValueError: the source or the split is not there, or not in an accepted layout.
    """
    if source in HUB:
        return _hub(source, split)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no data set {source}: neither a folder nor one of {', '.join(HUB)}")
    if root := _split_folder(folder, split):
        return _image_folder(folder, root)
    found = [(kind, place) for kind in CIFAR if (place := kind.find(folder))]
    if len({kind.classes for kind, _ in found}) > 1:
        raise ValueError(f"{folder} holds both CIFAR-10 and CIFAR-100; put each into a folder of its own")
    if found and split in ("train", "test"):
        return found[0][0].read(found[0][1], split)
    if found:
        raise ValueError(f"CIFAR in {folder} has the splits train and test, got {split}")
    accepted = ", ".join(kind.folder for kind in CIFAR)
    raise ValueError(
        f"{folder} has no split {split}; accepted are {split}/CLASS/NAME{' (or val/CLASS/NAME)' * (split == 'test')} "
        f"and the official CIFAR files, unpacked ({accepted}) or as .tar.gz"
    )


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, comma-separated, with an ellipsis where there are more."""
    names = list(names)
    return ", ".join(names[:limit]) + ", ..." * (len(names) > limit)


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))


def _split_folder(folder: Path, split: str) -> Path | None:
    names = ("test", "val") if split == "test" else (split,)
    there = [folder / name for name in names if (folder / name).is_dir()]
    if split != "test":
        return there[0] if there else None
    # Some `test` folders hold images without labels, and `val` is what one reports: ImageNet's is flat, that of
    # tiny-imagenet-200 has one folder, of no class.
    trained = folder / "train"
    known = set(_class_folders(trained)) if trained.is_dir() else set()
    classes = {path: set(_class_folders(path)) for path in there}
    labelled = [path for path in there if classes[path] & known] or [path for path in there if classes[path]]
    return next(iter(labelled or there), None)


def _image_folder(folder: Path, root: Path) -> Listing:
    classes = _class_folders(root)
    if not classes:
        raise ValueError(f"{root} has no class folders; the layout is {root}/CLASS/NAME")
    other = _split_folder(folder, "test" if root.name == "train" else "train")
    if other and root.name in ("train", "test", "val") and (names := _class_folders(other)) not in ((), classes):
        only = [(set(classes) - set(names), root), (set(names) - set(classes), other)]
        said = "; ".join(f"{some(sorted(extra))} only in {path}" for extra, path in only if extra)
        if not set(classes) & set(names):
            said += (
                f"; put the images to report on into {folder}/val/CLASS (of tiny-imagenet-200, val/val_annotations.txt "
                "names the classes)"
            )
        raise ValueError(f"{root} and {other} must have the same class folders: {said}")
    entries: list[Entry] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = _images_below(root / name)
        if not found:
            empty.append(name)
        entries += found
        labels += [label] * len(found)
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders in {root} hold no images: {some(empty)}; "
            f"remove them or add images ({', '.join(sorted(EXTENSIONS))})"
        )
    return Listing(str(root), root, tuple(entries), np.asarray(labels, np.int64), classes)


def _images_below(folder: Path) -> list[Path]:
    """The images in a folder and the folders below it, as ImageFolder orders them; hidden ones are left out."""
    found: dict[str, list[str]] = {}

    def walk(place: str, above: frozenset[str]) -> None:
        real = os.path.realpath(place)
        if real in above:
            raise ValueError(f"{place} links to a folder that it is in; remove the link")
        with os.scandir(place) as scanned:
            entries = [entry for entry in scanned if not entry.name.startswith(".")]
        found[place] = sorted(e.name for e in entries if not e.is_dir() and _is_image(e.name))
        for entry in entries:
            if entry.is_dir():
                walk(entry.path, above | {real})

    walk(str(folder), frozenset())
    return [Path(place, name) for place in sorted(found) for name in found[place]]


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class _Dtype:
    """Stands for numpy's dtype while a pickle is read."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name
        if self.name not in ("u1", "i4", "i8"):
            raise pickle.UnpicklingError(f"an array of {self.name}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in (">", b">"):  # the official files hold bytes alone
            raise pickle.UnpicklingError("an array that is big-endian")


class _Array:
    """Stands for numpy's array while a pickle is read."""

    array: NDArray[Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = np.frombuffer(raw, dtype.name).reshape(shape, order="F" if fortran else "C")


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Numbers, strings, lists, dicts and arrays. A pickle could name any function: here none but ours are called."""

    ADMITTED: dict[tuple[str, str], Any] = {  # noqa: RUF012
        **{
            (f"numpy.{core}.{module}", name): value
            for core in ("core", "_core")
            for module, name, value in (
                ("multiarray", "_reconstruct", lambda *_: _Array()),
                ("numeric", "_frombuffer", _from_buffer),
            )
        },
        ("numpy", "ndarray"): None,  # an argument of `_reconstruct`, not called itself
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a CIFAR file needs arrays alone")
        return self.ADMITTED[module, name]


def _unpickle(raw: bytes, path: str) -> dict[str, Any]:
    try:
        value = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        items = {k.decode() if isinstance(k, bytes) else k: v for k, v in value.items()}
        return {k: v.array if isinstance(v, _Array) else v for k, v in items.items()}
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"{path} is not read ({error}); restore it from the official archive") from error


@dataclass(frozen=True)
class Cifar:
    """One official edition: how its folder, archive and files are called and what they hold."""

    folder: str
    archive: str
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str  # the key in a pickle
    names: str
    label_bytes: int = 0  # before the pixels of a row in the binary edition; 0 is the pickled one

    def find(self, folder: Path) -> Path | None:
        """The folder or archive of this edition at ``folder``."""
        if folder.name == self.folder:
            return folder
        if (folder / self.folder).is_dir():
            return folder / self.folder
        return folder / self.archive if (folder / self.archive).is_file() else None

    def read(self, place: Path, split: str) -> Listing:
        files = self.train if split == "train" else self.test
        raw = self._files(place, (self.meta, *files))
        meta = f"{place}/{self.meta}"
        if self.label_bytes:
            classes = tuple(line.strip() for line in raw[self.meta].decode("latin1").splitlines() if line.strip())
        else:
            names = _unpickle(raw[self.meta], meta).get(self.names, ())
            classes = tuple(n.decode("latin1") if isinstance(n, bytes) else str(n) for n in names)
        if len(set(classes)) != self.classes:
            raise ValueError(f"{meta} must name {self.classes} classes, got {len(set(classes))}; restore it")
        parts = [self._rows(raw[name], f"{place}/{name}") for name in files]
        pixels = np.concatenate([p for p, _ in parts])
        table = Table(f"{place} {split}", lambda i: Image.fromarray(pixels[i].transpose(1, 2, 0)))
        entries = tuple(Row(table, i) for i in range(len(pixels)))
        return Listing(str(place), None, entries, np.concatenate([n for _, n in parts]), classes, pixels)

    def _files(self, place: Path, names: tuple[str, ...]) -> dict[str, bytes]:
        if place.is_dir():
            raw = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
        else:
            raw = {}
            try:
                # Once from front to end: gzip cannot go back, and its checksum stands at the end.
                with gzip.open(place) as whole, tarfile.open(fileobj=whole, mode="r|") as tar:
                    for member in tar:
                        parent, _, name = member.name.removeprefix("./").rpartition("/")
                        if parent == self.folder and name in names and (file := tar.extractfile(member)):
                            raw[name] = file.read()
                    while whole.read(2**20):
                        pass
            except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{place} is corrupt ({error}); download it again") from error
        if absent := [name for name in names if name not in raw]:
            raise ValueError(f"{place} lacks {some(absent, 7)}; restore it from the official {self.archive}")
        return raw

    def _rows(self, raw: bytes, path: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels: Any
        pixels: Any
        if self.label_bytes:
            width = self.label_bytes + 3072
            if not raw or len(raw) % width:
                raise ValueError(f"{path} must hold rows of {width} bytes, got {len(raw)} bytes; restore it")
            rows = np.frombuffer(raw, np.uint8).reshape(-1, width)
            labels, pixels = rows[:, self.label_bytes - 1], rows[:, self.label_bytes :]
        else:
            batch = _unpickle(raw, path)
            pixels, labels = batch.get("data"), batch.get(self.labels)
            shape = getattr(pixels, "shape", None)
            if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,)):
                raise ValueError(f"{path} must hold 'data' of shape (N, 3072) in bytes, got {shape}; restore it")
        labels = np.asarray([] if labels is None else labels)
        if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu" or not len(labels):
            raise ValueError(
                f"{path} must hold a label for each of {len(pixels)} images, got {labels.shape}; restore it"
            )
        if labels.min() < 0 or labels.max() >= self.classes:
            raise ValueError(
                f"{path} must hold labels of 0 to {self.classes - 1}, got {labels.min()} to {labels.max()}; restore it"
            )
        return pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR = (
    Cifar("cifar-10-batches-py", "cifar-10-python.tar.gz", 10, _BATCHES, ("test_batch",), "batches.meta",
          "labels", "label_names"),
    Cifar("cifar-100-python", "cifar-100-python.tar.gz", 100, ("train",), ("test",), "meta",
          "fine_labels", "fine_label_names"),
    Cifar("cifar-10-batches-bin", "cifar-10-binary.tar.gz", 10, tuple(f"{n}.bin" for n in _BATCHES),
          ("test_batch.bin",), "batches.meta.txt", "", "", label_bytes=1),
    Cifar("cifar-100-binary", "cifar-100-binary.tar.gz", 100, ("train.bin",), ("test.bin",),
          "fine_label_names.txt", "", "", label_bytes=2),  # coarse, then fine
)  # fmt: skip

HUB = {  # repository, image column, label column, the split with labels to report on
    "cifar10": ("uoft-cs/cifar10", "img", "label", "test"),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test"),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label", "validation"),
}


def _hub(source: str, split: str) -> Listing:
    repository, image, label, test = HUB[source]
    if split not in ("train", "test"):
        raise ValueError(f"{source} has the splits train and test, got {split}")
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} comes through the package datasets, which is not installed: pip install 'snn_rl[vision]', "
            "or give a folder"
        ) from error
    name = "train" if split == "train" else test
    try:
        rows = datasets.load_dataset(repository, split=name)
        rows = rows.cast_column(image, datasets.Image(decode=False))  # our threads decode and check
        classes, labels = tuple(rows.features[label].names), np.asarray(list(rows[label]), np.int64)
    except Exception as error:  # no network, no licence accepted, no space: each has exceptions of its own
        raise ValueError(
            f"{repository} ({name}) is not loaded ({error}); check the network and `hf auth login`, or give a folder"
        ) from error

    def open_row(index: int) -> Image.Image:
        cell = rows[index][image]
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])

    if not len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{repository} ({name}) has images without labels; give a folder")
    table = Table(f"{repository} {name}", open_row)
    return Listing(table.name, None, tuple(Row(table, i) for i in range(len(labels))), labels, classes)


def check(listing: Listing, use: Callable[[int], None]) -> None:
    """Call ``use(i)`` for every image, in threads, and raise one ValueError for all that are unusable."""
    number = len(listing.entries)
    bad: list[tuple[int, Unusable]] = []

    def chunk(first: int) -> None:
        for i in range(first, min(first + 256, number)):
            try:
                use(i)
            except Unusable as error:
                bad.append((i, error))

    pool = ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(chunk, range(0, number, 256)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for the rest
    if not bad:
        return
    kinds: dict[str, list[str]] = {}
    for i, error in sorted(bad, key=lambda item: item[0]):
        name = listing.name(listing.entries[i])
        kinds.setdefault(error.kind, []).append(f"{name} is {error.detail}" if error.kind in WAYS_OUT else name)
    said = ", ".join(f"{len(kinds[kind])} {kind} ({some(kinds[kind])})" for kind in sorted(kinds))
    ways = ["remove or convert them", *(out for kind, out in WAYS_OUT.items() if kind in kinds)]
    raise ValueError(f"{len(bad)} of {number} images in {listing.where} cannot be used: {said}; {', or '.join(ways)}")
