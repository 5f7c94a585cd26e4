"""Programs: loops made of the kernels, for a processor through numba and for a GPU through CuPy."""

from anynorm.executors.programs.run import backward, forward, statistics, supports

__all__ = ["backward", "forward", "statistics", "supports"]
