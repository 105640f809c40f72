"""Data sets: fetch, verify, prepare, load. One file per data set or kind of data."""
