"""Reads the images of a folder with two workers that receive stop signals from the start."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from suite.data.augmentation import Centre
from suite.data.readers.image_folder import FolderReader, Workers
from suite.data.source import Files

CPU = torch.device("cpu")


def main() -> None:
    """`python signalled.py FOLDER`: prints the number of images received."""
    paths = sorted(Path(sys.argv[1]).iterdir())
    reader = FolderReader(
        Files(tuple(map(str, paths)), torch.zeros(len(paths), dtype=torch.int64)), Workers(2, CPU), CPU
    )
    done = threading.Event()
    signalled = set()

    def disturb() -> None:
        while not done.wait(0.001):
            for worker in multiprocessing.active_children():
                if worker.pid is not None and worker.is_alive():
                    signalled.add(worker.pid)
                    for number in (signal.SIGUSR2, signal.SIGTERM):
                        os.kill(worker.pid, number)

    thread = threading.Thread(target=disturb)
    thread.start()
    shares = [torch.tensor([number]) for number in range(len(paths))]
    num_images = sum(len(images) for images, _ in reader.read(shares, Centre(1.0), 8))
    done.set()
    thread.join()
    print(num_images, len(signalled))


if __name__ == "__main__":
    main()
