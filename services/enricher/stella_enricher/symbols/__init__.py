"""Names for addresses in files: found, read in a child process, kept, looked up."""
