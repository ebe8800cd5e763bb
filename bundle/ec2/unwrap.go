package ec2

import "crypto/rsa"

// Unwrap returns the key and initialisation vector of the bundle, opened with
// the cloud's private key. It does so only once the manifest's signature has
// verified against t, which must not allow unsigned manifests: whoever opens
// keys for others would otherwise open any that were copied into a manifest.
func (m *Manifest) Unwrap(priv *rsa.PrivateKey, t Trust) (key, iv BlockKey, err error) {
	t.AllowUnsigned = false
	if _, err := m.CheckTrust(t); err != nil {
		return key, iv, err
	}
	var ok bool
	if key, ok = unwrap(priv, m.EC2Key); ok {
		iv, ok = unwrap(priv, m.EC2IV)
	}
	if !ok {
		return BlockKey{}, BlockKey{}, fail(ErrKey, objManifest, "was encrypted for another cloud's key than this one")
	}
	return key, iv, nil
}
