"""Programs: loops made of the kernels, for a processor through numba and for a GPU through CuPy."""
