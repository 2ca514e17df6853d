// The certificate authority and the certificate log of @sigstore/mock, one JSON request a line, one JSON reply a line.
// tests/sigstore/fulcio.py is its HTTP front.
import crypto from 'node:crypto';
import readline from 'node:readline';
import mock from '@sigstore/mock';

const keyPair = () => crypto.generateKeyPairSync('ec', { namedCurve: 'prime256v1' });
const ctlog = await mock.initializeCTLog(keyPair());
const authority = await mock.initializeCA(keyPair(), ctlog);
const { fn: issue } = mock.fulcioHandler(authority, { strict: true });

const say = (value) => process.stdout.write(JSON.stringify(value) + '\n');
say({
  root: Buffer.from(authority.rootCertificate).toString('base64'),
  ctlog: Buffer.from(ctlog.publicKey).toString('base64'),
});
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { ageSeconds, request } = JSON.parse(line);
  // Certificates live for ten minutes, always; one that was issued a while ago has less of them left.
  authority.getCurrentTime = () => new Date(Date.now() - ageSeconds * 1000);
  const { statusCode, response } = await issue(JSON.stringify(request));
  say({ status: statusCode, body: response });
}
