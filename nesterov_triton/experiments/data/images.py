"""MNIST and CIFAR-10, as the Hugging Face Hub has them: Parquet files of encoded images and labels."""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from nesterov_triton.experiments.data.files import DataFile, damaged, find
from nesterov_triton.experiments.experiment import CommandError, Split

REQUIRES = ("pyarrow", "PIL")
HUB = "https://huggingface.co/datasets"


@dataclass(frozen=True)
class ImageSet:
    """A data set of small images in ten classes.

    Attributes:
        name: its folder.
        home: of its files.
        column: of the images.
        shape: of an image, channels first.
        rows: of the training and the test part.
    """

    name: str
    home: str
    column: str
    shape: tuple[int, int, int]
    rows: tuple[int, int]

    def file(self, part: int) -> DataFile:
        """Part 0 is for training, 1 for testing."""
        name = f"{('train', 'test')[part]}-00000-of-00001.parquet"
        rows = self.rows[part]

        def look(path: Path) -> None:
            import pyarrow
            from pyarrow import parquet

            try:
                with parquet.ParquetFile(path) as file:
                    found, columns = file.metadata.num_rows, file.schema_arrow.names
            except (pyarrow.ArrowException, OSError) as error:
                size = path.stat().st_size
                raise ValueError(f"it cannot be read as Parquet ({error}), and has {size:,} bytes") from error
            if found != rows:
                raise ValueError(f"it has {found:,} rows")
            if not {self.column, "label"} <= set(columns):
                raise ValueError(f"its columns are {', '.join(columns)}")

        # The Hub's own copy is checked against the sum that the Hub states; others, encoded anew, have other sums.
        contents = f"a Parquet file of {rows:,} rows with the columns {self.column} and label"
        return DataFile(f"{self.name}/{name}", f"{HUB}/{self.home}/{name}", contents, look=look)


MNIST = ImageSet("mnist", "ylecun/mnist/resolve/main/mnist", "image", (1, 28, 28), (60_000, 10_000))
CIFAR10 = ImageSet("cifar10", "uoft-cs/cifar10/resolve/main/plain_text", "img", (3, 32, 32), (50_000, 10_000))


@lru_cache(maxsize=2)
def load(images: ImageSet, folder: Path) -> tuple[Split, Split]:
    """(train, test): uint8 images [n, channels, height, width] and their labels [n].

    Raises:
        CommandError: a file is missing or damaged.
    """
    files = [(images.file(part), find(images.file(part), folder)) for part in (0, 1)]
    train, test = (_decode(images, file, path) for file, path in files)
    return train, test


def _decode(images: ImageSet, file: DataFile, path: Path) -> Split:
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    channels, height, width = images.shape
    mode = "L" if channels == 1 else "RGB"
    pixels: list[Tensor] = []
    try:
        table = parquet.read_table(path, columns=[images.column, "label"])
        for encoded in table[images.column].to_pylist():
            with Image.open(io.BytesIO(encoded["bytes"])) as image:
                if image.size != (width, height):
                    raise ValueError(f"an image has {image.size} pixels")
                pixels.append(torch.frombuffer(bytearray(image.convert(mode).tobytes()), dtype=torch.uint8))
        labels = torch.tensor(table["label"].to_pylist(), dtype=torch.long)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise CommandError(damaged(path, file, error)) from error
    if labels.min() < 0 or labels.max() > 9:
        raise CommandError(damaged(path, file, ValueError(f"labels {labels.min()} to {labels.max()}")))
    stacked = torch.stack(pixels).view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()
    return Split(stacked, labels)
