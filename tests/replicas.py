"""Replicas of one process: threads that sum arrays over each other."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


class Replicas:
    """Threads that sum arrays over each other, and what they summed."""

    def __init__(self, number):
        self.number, self.barrier = number, Barrier(number, timeout=60)
        self.slots, self.calls = [None] * number, [[] for _ in range(number)]

    def all_reduce(self, rank):
        def sum_of_all(array):
            self.slots[rank] = array
            self.calls[rank].append(tuple(array.shape))
            self.barrier.wait()
            total = sum(self.slots[1:], start=self.slots[0] * 1.0)
            self.barrier.wait()
            return total

        return sum_of_all

    def run(self, work):
        """work(rank, all_reduce) of every rank."""

        def guarded(rank):
            try:
                return work(rank, self.all_reduce(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(guarded, range(self.number)))
