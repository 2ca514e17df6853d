"""What a transparency log and a timestamp authority add to a signature, and how anybody checks it offline.

    tree, checkpoint → trust (whose logs, authorities and certificates count) → entry, timestamp, certificate
    → bundle (Sigstore v0.3, written and read) → proof_of_log (all of it together)

Nothing here opens a file of the evidence, and nothing uses a network.  What is wrong is a `ValueError` that
says what; who called decides what it means.
"""
