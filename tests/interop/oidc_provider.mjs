// A real OIDC provider for test_oidc.py: the npm package oidc-provider, on loopback, with one client and one API.
//
//     node oidc_provider.mjs PACKAGES PORT KID CLIENT_ID CLIENT_SECRET
//
// PACKAGES is the node_modules folder with oidc-provider in it; PORT 0 is any free port, the line "ready PORT" names it; KID
// is the key ID of the RSA key that it makes and signs with. It ends with its standard input.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';
import { pathToFileURL } from 'node:url';

const [packages, port, kid, clientId, clientSecret] = process.argv.slice(2);
const { default: Provider } = await import(pathToFileURL(`${packages}/oidc-provider/lib/index.js`));

const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
const key = { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig', alg: 'RS256' };

const server = createServer();
await new Promise((done) => server.listen(Number(port), '127.0.0.1', done));
const actualPort = server.address().port;

const provider = new Provider(`http://127.0.0.1:${actualPort}`, {
  jwks: { keys: [key] },
  clients: [{
    client_id: clientId,
    client_secret: clientSecret,
    grant_types: ['client_credentials'],
    redirect_uris: [],
    response_types: [],
  }],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_context, resource) => ({
        scope: '',
        audience: resource,
        accessTokenTTL: 600,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: 'RS256', kid } },
      }),
    },
  },
});
server.on('request', provider.callback());
process.stdin.on('end', () => process.exit(0)).resume();
console.log(`ready ${actualPort}`);
