"""Arrays of Dask, chunk by chunk: each is run by the executor of its own library."""
