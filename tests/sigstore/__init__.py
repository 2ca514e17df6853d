"""Sigstore around a test: a log, a timestamp authority, a certificate authority, trust, and independent verdicts.

    with LogStandin() as log, Tsa() as tsa, Fulcio() as fulcio:                 # log_standin, tsa, fulcio
        parts = fulcio.trusted_root_parts()
        root = trusted_root(                                                    # trust
            tlogs=log.trusted_root_tlogs(), tsas=[tsa.trusted_root_tsa()],
            authorities=parts["certificateAuthorities"], ctlogs=parts["ctlogs"],
        )
        signer = managed()                                                      # bundles
        bundle = signed(log.url, 2, tsa.url, signer, statement())
        assert judge_js(root, [Check(bundle, key_hints(signer.pem))])[0].ok     # peers

Real parts stand where a package brings one: openssl stamps, `@sigstore/mock` issues certificates, python-tuf builds the
repository, `@sigstore/verify` and sigstore-python judge.
The log is a stand-in.
`make tests/sigstore/node_modules/installed` brings what is npm's.
"""
