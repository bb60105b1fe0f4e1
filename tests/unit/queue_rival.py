"""A rival process of test_queue.py: claims FOLDERS from START on, prints what it won, and waits for stdin to end."""

import sys
import threading
import time
from pathlib import Path

from sctrain.evaluation.queue import claim

THREADS = 3


def main(start: float, folders: list[Path]) -> None:
    won: list[str] = []
    barrier = threading.Barrier(THREADS)

    def rival() -> None:
        for folder in folders:
            barrier.wait(30)
            if claim(folder, claim_seconds=60) is not None:
                won.append(folder.name)

    threads = [threading.Thread(target=rival) for _ in range(THREADS)]
    time.sleep(max(0.0, start - time.time()))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(*won, flush=True)
    sys.stdin.read()  # a process that has exited looks dead to the others


if __name__ == "__main__":
    main(float(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
