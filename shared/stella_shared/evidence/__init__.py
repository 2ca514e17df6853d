"""The evidence format: how it is written, and how anybody proves it.

    canonical → merkle, dsse → keys → records (chain, ledger, notes) → statement
    transparency: log entries, timestamps, certificates → vouching: who vouches for a statement
    directory (what lies there) → chunk_reader, lines (the lines) → comparison → verify → verdicts → report
    proof, prover: one line; manifest, export, importing, extent, pins: a part of a chain; cleanup, reset: its end
    disk, store: how files are written, and where a node keeps them

`docs/evidence-format.md` is the byte-exact description; these modules are its reference implementation.
"""
