"""Images for classification: loading, checking, splitting, shuffling and augmenting them, resident or from files."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from snn_rl.vision._formats import INCONVERTIBLE, WORKERS, Entry, Unusable, check, fit, list_images, to_rgb, with_image
from snn_rl.vision.recipe import AUGMENTATIONS

TRIES = 10  # of a resized crop, until one lies within the image
PREFETCH = 3  # batches of files that are being decoded while one is in use
STATISTICS_SAMPLE = 5_000  # files


@dataclass(frozen=True, eq=False)
class Crops:
    """Of a batch: for each image what is cut out and whether it is flipped.

    Drawn on the CPU, whatever device they are applied on. ``crops[part]`` are those of a part of the batch.
    """

    flip: Tensor  # (B,) bool: left to right, after cutting
    padding: int = 0
    offset: Tensor | None = None  # (B, 2): row and column in the padded image
    size: int = 0  # of the images that ``offset`` is for
    tries: Tensor | None = None  # (B, TRIES, 2): share of the area, and width over height
    place: Tensor | None = None  # (B, 2) in [0, 1): where in the room that the box leaves, vertically, horizontally
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    @classmethod
    def pad_and_flip(cls, batch: int, size: int, padding: int, generator: torch.Generator) -> Crops:
        """Squares of ``size`` pixels out of images of that size with ``padding`` black pixels around them."""
        offset = torch.randint(0, 2 * padding + 1, (batch, 2), generator=generator)
        return cls(_flips(batch, generator), padding, offset, size)

    @classmethod
    def resized_and_flip(
        cls,
        batch: int,
        generator: torch.Generator,
        scale: tuple[float, float] = (0.25, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> Crops:
        """Boxes with a share ``scale`` of the area, uniform, and width over height ``ratio``, log-uniform.

        Raises:
            ValueError: ranges that are not increasing or not positive.
        """
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be an increasing range above 0, got {(low, high)}")
        draw = torch.rand(batch, TRIES, 2, dtype=torch.float64, generator=generator)
        area = scale[0] + (scale[1] - scale[0]) * draw[..., 0]
        low, high = np.log(ratio)
        aspect = (low + (high - low) * draw[..., 1]).exp()
        place = torch.rand(batch, 2, dtype=torch.float64, generator=generator)
        return cls(_flips(batch, generator), tries=torch.stack((area, aspect), -1), place=place, ratio=ratio)

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, part: slice | Tensor) -> Crops:
        offset, tries, place = (None if x is None else x[part] for x in (self.offset, self.tries, self.place))
        return dataclasses.replace(self, flip=self.flip[part], offset=offset, tries=tries, place=place)

    def boxes(self, height: int, width: int) -> Tensor:
        """(B, 4) int64: left, top, width and height of the resized crops in images of this size."""
        assert self.tries is not None
        assert self.place is not None
        area = self.tries[..., 0] * height * width
        w = (area * self.tries[..., 1]).sqrt().round().long()
        h = (area / self.tries[..., 1]).sqrt().round().long()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)
        w, h, fits = (x.gather(1, first).squeeze(1) for x in (w, h, fits))
        # None fits: the largest box in the centre with an admitted ratio.
        w = w.where(fits, torch.tensor(max(1, min(width, round(height * self.ratio[1])))))
        h = h.where(fits, torch.tensor(max(1, min(height, round(width / self.ratio[0])))))
        top = (self.place[:, 0] * (height - h + 1)).long().where(fits, (height - h) // 2)
        left = (self.place[:, 1] * (width - w + 1)).long().where(fits, (width - w) // 2)
        return torch.stack((left, top, w, h), 1)

    def apply(self, images: Tensor) -> Tensor:
        """Cut (B, 3, S, S) uint8 images, on their device.

        Raises:
            ValueError: another number or size of images than the crops were drawn for.
        """
        size, device = images.shape[-1], images.device
        if len(images) != len(self):
            raise ValueError(f"{len(self)} crops must be applied to as many images, got {len(images)}")
        if self.offset is None:
            return self._resize(images)
        self._check_size(size)
        rows, columns = (self.offset[:, i, None] + torch.arange(size) for i in (0, 1))
        columns = columns.flip(1).where(self.flip[:, None], columns)
        stride = size + 2 * self.padding
        index = (rows.to(device) * stride)[:, :, None] + columns.to(device)[:, None, :]  # into a padded plane
        padded = F.pad(images, (self.padding,) * 4).flatten(2)
        return padded.gather(2, index.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)

    def _resize(self, images: Tensor) -> Tensor:
        size, device = images.shape[-1], images.device
        left, top, w, h = self.boxes(size, size).double().unsqueeze(-1).unbind(1)
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        x, y = left + w * centres, top + h * centres
        x = x.flip(1).where(self.flip[:, None], x)
        # Not `affine_grid`, which is a matrix product: in TF32 or under autocast it would move pixels about.
        x, y = ((2 * at / size - 1).float().to(device) for at in (x, y))
        grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
        cut = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return cut.round().to(torch.uint8)

    def cut(self, image: Image.Image, size: int, which: int) -> Image.Image:
        """Crop ``which`` of an RGB image of any size, ``size`` x ``size``."""
        if self.offset is not None:
            self._check_size(size)
            top, left = (self.offset[which] - self.padding).tolist()
            image = fit(image, size).crop((left, top, left + size, top + size))  # black beyond the edges
        else:
            left, top, w, h = self[which : which + 1].boxes(image.height, image.width)[0].tolist()
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip[which] else image

    def _check_size(self, size: int) -> None:
        if size != self.size:
            raise ValueError(f"the crops are for images of {self.size} pixels, got {size}")


def _flips(batch: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator) < 0.5


@dataclass(frozen=True, eq=False)
class Images:
    """A data set in memory: images (N, 3, S, S) uint8, labels (N,) int64, class names in label order."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def to(self, device: str) -> Images:
        return Images(self.images.to(device), self.labels.to(device), self.classes)

    def pick(self, index: Tensor) -> Images:
        """A subset, in the order of ``index``."""
        index = index.to(self.images.device)
        return Images(self.images[index], self.labels[index], self.classes)

    def read(self, index: Tensor, crops: Crops | None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 and labels (B,) on the data set's device."""
        part = self.pick(index)
        return part.images if crops is None else crops.apply(part.images), part.labels


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A data set whose decoded images would not fit into memory: threads decode the files batch by batch.

    ``paths`` holds a row of a larger file where there is no file for each image. The labels stay on the CPU.
    """

    paths: tuple[Entry, ...]
    labels: Tensor
    classes: tuple[str, ...]
    image_size: int
    convert: bool = False  # images that are not RGB; else they raise

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str) -> ImageFiles:
        """Itself: each batch goes to the device when it is decoded."""
        return self

    def pick(self, index: Tensor) -> ImageFiles:
        """A subset, in the order of ``index``."""
        paths = tuple(self.paths[i] for i in index.tolist())
        return dataclasses.replace(self, paths=paths, labels=self.labels[index.cpu()])

    def read(self, index: Tensor, crops: Crops | None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 and labels (B,), on the CPU.

        Raises:
            ValueError: a file that cannot be decoded, by name.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            return self.start(index, crops, pool, pin=False)()

    def start(
        self, index: Tensor, crops: Crops | None, pool: ThreadPoolExecutor, pin: bool
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Begin to read a batch; what is returned waits for it."""
        part = self.pick(index)
        images = torch.empty(len(part), 3, self.image_size, self.image_size, dtype=torch.uint8, pin_memory=pin)
        target = images.numpy()

        def decode(first: int) -> None:
            for i in range(first, min(first + step, len(part))):
                try:
                    target[i] = _decode(part.paths[i], self.image_size, self.convert, crops, i)
                except Unusable as error:
                    raise ValueError(f"{part.paths[i]} is {error}; restore or remove it") from error

        step = max(1, min(8, len(part) // WORKERS))
        waiting: list[Future[None]] = [pool.submit(decode, first) for first in range(0, len(part), step)]

        def wait() -> tuple[Tensor, Tensor]:
            for future in waiting:
                future.result()
            return images, part.labels

        return wait


Data = TypeVar("Data", bound=Images | ImageFiles)


def _decode(entry: Entry, size: int, convert: bool, crops: Crops | None = None, which: int = 0) -> NDArray[np.uint8]:
    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        image.load()  # the whole file, also where the crop would need a part alone
        image = to_rgb(image)
        image = fit(image, size) if crops is None else crops.cut(image, size, which)
        return np.asarray(image).transpose(2, 0, 1)

    return with_image(entry, pixels, convert)


def read_image(path: Path, size: int, *, convert: bool) -> NDArray[np.uint8]:
    """One file as (3, size, size), as it is evaluated. Raises ValueError where it is missing, corrupt or not RGB."""
    try:
        return _decode(path, size, convert)
    except Unusable as error:
        way_out = "; save it as 8-bit RGB" if error.kind == INCONVERTIBLE else ""
        raise ValueError(f"{path} is {error}{way_out}") from error


def load_images(
    source: str, split: str, image_size: int, *, resident_bytes: int = 4 * 2**30, convert: bool = False
) -> Images | ImageFiles:
    """Load and check one split, ``train`` or ``test``, of a data set.

    ``source`` is cifar10, cifar100 or imagenet-1k, from the Hugging Face hub, or a folder: ``SPLIT/CLASS/NAME`` (for
    test also ``val``), or one with the official CIFAR files, python or binary, unpacked or as .tar.gz. An image that
    is not ``image_size`` x ``image_size`` is resized, its shorter side to 256/224 of that, and cut at the centre.
    Where the images take more than ``resident_bytes``, they stay files of which the headers alone are checked here.

    Class folders are read as torchvision's ``ImageFolder`` reads them: folders below them too, in its order, links
    followed, files without an image's ending left out; here hidden files and folders are left out as well. Pixels are
    taken as Pillow decodes them: the orientation that a camera notes (EXIF) turns TIFF files and no others.
    Of an animation or a file of several pages, the first image counts.

    ``convert`` turns greyscale, palette, CMYK and transparent images into RGB; ImageNet has some. Transparency is
    dropped. Greyscale PNG, TIFF and PGM files of 9 to 16 bits are scaled to 8, to the nearest value (Pillow, and so
    ``ImageFolder``, would cut them off at 255). Of 16-bit RGB, Pillow reads the upper 8 bits. Images with 32 bits a
    pixel, integers or floating point, are refused: their files do not say which value is white.

    Raises:
        ValueError: no such data set or split, class folders that are empty or differ between the splits, images that
            are missing, corrupt or not RGB, a folder that links to one that it is in.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be >= 1, got {image_size}")
    listing = list_images(source, split)
    number = len(listing.entries)
    labels = torch.from_numpy(listing.labels)
    if number * 3 * image_size**2 > resident_bytes:
        if listing.pixels is None:
            check(listing, lambda i: with_image(listing.entries[i], lambda image: None, convert))
        return ImageFiles(listing.entries, labels, listing.classes, image_size, convert)
    if listing.pixels is not None and listing.pixels.shape[-1] == image_size:
        return Images(torch.from_numpy(listing.pixels), labels, listing.classes)
    images = torch.empty(number, 3, image_size, image_size, dtype=torch.uint8)
    target = images.numpy()

    def decode(i: int) -> None:
        target[i] = _decode(listing.entries[i], image_size, convert)

    check(listing, decode)
    return Images(images, labels, listing.classes)


def hold_out(data: Data, number: int, seed: int) -> tuple[Data, Data]:
    """(training, validation) data: ``number`` images in all are held out, from each class equally many, drawn by seed.

    Where ``number`` is no multiple of the classes, the largest classes give one more.

    Raises:
        ValueError: a number below 1, or one that leaves a class without training images.
    """
    if number < 1:
        raise ValueError(f"the number of held-out images must be >= 1, got {number}")
    labels, classes = data.labels.cpu(), len(data.classes)
    counts = torch.bincount(labels, minlength=classes)
    quota = torch.full((classes,), number // classes)
    quota[counts.argsort(descending=True, stable=True)[: number % classes]] += 1
    if (short := (quota >= counts).nonzero().flatten()).numel():
        first = int(short[0])
        raise ValueError(
            f"{number} held-out images would take {int(quota[first])} of the {int(counts[first])} images of class "
            f"{data.classes[first]} and leave none for training; hold out fewer"
        )
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = _generator(seed)
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: int(quota[label])]]] = True
    train, validation = (data.pick(part.nonzero().flatten()) for part in (~held, held))
    return cast(Data, train), cast(Data, validation)


def train_batches(
    data: Images | ImageFiles,
    batch_size: int,
    *,
    augmentation: str,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of uint8 images (B, 3, S, S) and labels (B,) on ``device``, shuffled by (seed, epoch), augmented.

    ``batch_size`` counts the images of all ranks together; each of ``world`` ranks gets an equal, contiguous part of
    the batch that a single process would get. The last batch is dropped where it is incomplete. The augmentation is
    none, crop-flip (an eighth of the size as padding) or resized-crop-flip.

    Raises:
        ValueError: an unknown augmentation, a batch larger than the data or not divisible by ``world``.
    """
    part = _part(batch_size, rank, world)
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation}")
    if len(data) < batch_size:
        raise ValueError(f"batch_size must be <= {len(data)}, the number of training images, got {batch_size}")
    if epoch < 0:
        raise ValueError(f"epoch must be >= 0, got {epoch}")
    size, generator = data.image_size, _generator(seed, epoch)

    def plan() -> Iterator[tuple[Tensor, Crops | None]]:
        order = torch.randperm(len(data), generator=generator)
        for batch in order.split(batch_size)[: len(data) // batch_size]:
            crops = None  # of the whole batch on every rank, which keeps the draws in step
            if augmentation == "crop-flip":
                crops = Crops.pad_and_flip(batch_size, size, size // 8, generator)
            elif augmentation == "resized-crop-flip":
                crops = Crops.resized_and_flip(batch_size, generator)
            yield batch[part], crops if crops is None else crops[part]

    return _read_all(data, plan(), device)


def eval_batches(
    data: Images | ImageFiles, batch_size: int, *, rank: int = 0, world: int = 1, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once over all ranks, in order, as it is: batches as of ``train_batches``, the last one smaller.

    Ranks may differ in the number of batches.

    Raises:
        ValueError: a batch size that is not divisible by ``world``.
    """
    part = _part(batch_size, rank, world)
    batches = (batch[part] for batch in torch.arange(len(data)).split(batch_size))
    return _read_all(data, ((batch, None) for batch in batches if len(batch)), device)


def channel_statistics(
    data: Images | ImageFiles,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel's pixels in [0, 1]; of files, at most 5000 evenly spread ones."""
    if not len(data):
        raise ValueError("the statistics of 0 images are not defined; load some")
    batches: Iterator[Tensor] = iter([])
    if isinstance(data, Images):
        batches = iter(data.images.split(10_000))
    else:
        sample = torch.arange(STATISTICS_SAMPLE) * len(data) // STATISTICS_SAMPLE
        sample = sample if len(data) > STATISTICS_SAMPLE else torch.arange(len(data))
        batches = (images for images, _ in eval_batches(data.pick(sample), 256, device="cpu"))
    histogram = torch.zeros(3, 256, dtype=torch.float64)  # exact, whatever the number of pixels
    for images in batches:
        for channel in range(3):
            histogram[channel] += torch.bincount(images[:, channel].flatten(), minlength=256).cpu()
    values = torch.arange(256, dtype=torch.float64) / 255
    share = histogram / histogram.sum(1, keepdim=True)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    (r, g, b), (s, t, u) = mean.tolist(), std.tolist()
    return (r, g, b), (s, t, u)


def _part(batch_size: int, rank: int, world: int) -> slice:
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must lie in [0, {world}), got {rank}")
    if batch_size % world:
        raise ValueError(f"batch_size must be a multiple of the {world} processes, got {batch_size}")
    each = batch_size // world
    return slice(rank * each, (rank + 1) * each)


def _generator(*key: int) -> torch.Generator:
    """A CPU generator of its own for each key: neighbouring seeds and epochs share no draws."""
    if key[0] < 0:
        raise ValueError(f"seed must be >= 0, got {key[0]}")
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _read_all(
    data: Images | ImageFiles, plan: Iterator[tuple[Tensor, Crops | None]], device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Images):
        for index, crops in plan:
            images, labels = (x.to(device) for x in data.read(index, None))
            yield images if crops is None else crops.apply(images), labels
        return
    pin = torch.device(device).type == "cuda"
    waiting: deque[Any] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for index, crops in plan:
            waiting.append(data.start(index, crops, pool, pin))
            if len(waiting) > PREFETCH:
                yield _move(waiting.popleft()(), device)
        while waiting:
            yield _move(waiting.popleft()(), device)
    finally:
        pool.shutdown(cancel_futures=True)  # where the epoch is left early


def _move(batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
