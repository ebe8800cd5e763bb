package ec2

import (
	"crypto/rsa"
	"crypto/x509"
)

// MigrateOptions say how a manifest is to be changed for another region or
// cloud.
type MigrateOptions struct {
	// Trust are the keys the old manifest may be signed with; if there are
	// none, the public half of Key. It must be signed.
	Trust []*rsa.PublicKey
	// Key signs the new manifest and, with EC2Cert, recovers the bundle's key.
	Key *rsa.PrivateKey
	// EC2Cert is the new cloud's certificate: the bundle's key is encrypted for
	// it instead of the old cloud. nil keeps what is there.
	EC2Cert *x509.Certificate
	// KernelID and RamdiskID replace the old ones; empty ones drop them. Set
	// KeepIDs to keep them instead.
	KernelID, RamdiskID string
	KeepIDs             bool
}

// Migrate makes a 2007-10-10 manifest of m, which may be of any version: the
// same parts, new kernel and ramdisk, encrypted for the cloud of o.EC2Cert,
// signed with o.Key. Who is said to have bundled it stays. m is not changed.
// The document is to replace the old one, of which the caller keeps a copy.
func Migrate(m *Manifest, o MigrateOptions) (*Manifest, []byte, error) {
	if o.Key == nil {
		return nil, nil, fail(ErrOption, "private key", "none given to sign the new manifest with")
	}
	u := UnbundleOptions{Key: o.Key, Trust: o.Trust}
	if _, err := u.checkTrust(m); err != nil {
		return nil, nil, err
	}
	n := *m
	n.Version = Version20071010
	if !o.KeepIDs {
		n.KernelID, n.RamdiskID = o.KernelID, o.RamdiskID
	}
	if o.EC2Cert != nil {
		key, iv, _, err := m.sessionKey(o.Key)
		if err != nil {
			return nil, nil, err
		}
		if n.EC2Key, n.EC2IV, err = wrapPair(o.EC2Cert, key, iv); err != nil {
			return nil, nil, err
		}
	}
	if err := n.check(); err != nil {
		return nil, nil, err
	}
	doc, err := n.encode(o.Key)
	if err != nil {
		return nil, nil, err
	}
	return &n, doc, nil
}
