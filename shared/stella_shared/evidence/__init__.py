"""The evidence format: how it is written, and how anybody proves it.

    canonical → merkle, dsse → keys → records (chain, ledger, statement) → verify → report
    disk, store: the only two that write files

`docs/evidence-format.md` is the byte-exact description; these modules are its reference implementation.
"""
