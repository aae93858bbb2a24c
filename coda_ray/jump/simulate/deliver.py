"""A simulated microscope that delivers its plates one by one: images first, the image list last."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from coda_ray.jump.simulate.layout import Plate
from coda_ray.storage import Folder

COPIES_AT_A_TIME = 16


def deliver_plate(
    gallery: Folder, bucket: Folder, plate: Plate, spoil: Callable[[bytes], bytes | None] = lambda data: data
) -> None:
    """Copy a plate from one bucket into another, as a microscope's computer uploads it.

    Parameters
    ----------
    gallery
        A simulated bucket that has it.
    bucket
        Where it arrives.
    plate
        The plate.
    spoil
        What happens to each image; None where it is not delivered.
    """

    def copy(path: str, change: Callable[[bytes], bytes | None] = lambda data: data) -> None:
        data = change(gallery.read(path))
        if data is not None:
            bucket.write(path, data)

    with ThreadPoolExecutor(COPIES_AT_A_TIME) as pool:
        for folder, change in ((plate.illumination, lambda data: data), (plate.images, spoil)):
            list(pool.map(lambda name, f=folder, c=change: copy(f"{f}/{name}", c), gallery.names(folder)))
    for path in plate.lists:
        copy(path)
