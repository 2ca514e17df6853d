// Lets @sigstore/verify, which nobody here wrote, judge bundles: one JSON question on standard input, one JSON answer.
// Question: {trustedRoot, checks: [{bundle, keys: {hint: PEM}, artifact: base64 or null, identity, tlogs, timestamps}]}
// Answer: [{ok, reason}], in the order of the checks.
import fs from 'node:fs';
import crypto from 'node:crypto';
import { bundleFromJSON } from '@sigstore/bundle';
import { TrustedRoot } from '@sigstore/protobuf-specs';
import { Verifier, toSignedEntity, toTrustMaterial } from '@sigstore/verify';

const { trustedRoot, checks } = JSON.parse(fs.readFileSync(0));

function judge({ bundle, keys, artifact, identity, tlogs, timestamps }) {
  const keyOf = (hint) => {
    if (!(hint in keys)) throw new Error(`no key for the hint ${hint}`);
    return { publicKey: crypto.createPublicKey(keys[hint]), validFor: () => true };
  };
  const managed = keys !== null;
  const material = toTrustMaterial(TrustedRoot.fromJSON(trustedRoot), managed ? keyOf : undefined);
  const verifier = new Verifier(material, {
    ctlogThreshold: managed ? 0 : 1, tlogThreshold: tlogs, timestampThreshold: timestamps,
  });
  const data = artifact === null ? undefined : Buffer.from(artifact, 'base64');
  const policy = identity === null ? undefined : { subjectAlternativeName: identity };
  verifier.verify(toSignedEntity(bundleFromJSON(bundle), data), policy);
}

process.stdout.write(JSON.stringify(checks.map((check) => {
  try {
    judge(check);
    return { ok: true, reason: '' };
  } catch (error) {
    return { ok: false, reason: [error.code, error.message].filter(Boolean).join(': ') };
  }
})));
