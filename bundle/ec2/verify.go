package ec2

import (
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
)

// VerifyOptions say what [Verify] checks.
type VerifyOptions struct {
	UnbundleOptions // Key may be nil: then the archive is not looked into
	// ManifestOnly leaves the parts alone.
	ManifestOnly bool
}

// Report is what [Verify] found out.
type Report struct {
	Name        string `json:"name"`
	Account     string `json:"account"`
	Arch        string `json:"architecture"`
	Type        string `json:"type"`
	Size        int64  `json:"size"`         // bytes of the image
	BundledSize int64  `json:"bundled_size"` // bytes of the parts by the manifest

	// Signature is "good", "unsigned" (and allowed) or "bad".
	Signature string `json:"signature"`
	// Signer is the SHA-256 of the signing key's SubjectPublicKeyInfo, in hex.
	Signer string `json:"signer,omitempty"`

	Parts     int   `json:"parts"`
	PartsGood int   `json:"parts_good"`
	PartBytes int64 `json:"part_bytes"` // read from good parts

	// Archive is "good", "bad" or "not checked" (needs a private key).
	Archive string `json:"archive"`

	// Unsigned are claims of the manifest that no signature covers.
	Unsigned UnsignedClaims `json:"unsigned"`
	// Weak names what is legacy about the format.
	Weak []string `json:"weak"`

	Problems []Problem `json:"problems"`
}

// UnsignedClaims are the parts of a manifest that are only for display.
type UnsignedClaims struct {
	Version string `json:"version"`
	Bundler string `json:"bundler"`
}

// Problem is something wrong with one object of the bundle.
type Problem struct {
	Object string `json:"object"`
	Class  string `json:"class"` // text of the Err… value
	Text   string `json:"text"`
}

// OK tells whether all that was checked is good.
func (r *Report) OK() bool { return len(r.Problems) == 0 }

var weak = []string{
	"the signature is RSA PKCS#1 v1.5 over SHA-1",
	"the cipher is AES-128-CBC without authentication of its own",
	"digests are SHA-1",
	"the key is transported by RSA PKCS#1 v1.5",
}

// Verify checks the signature, the digest of every part, the sizes and, with
// a private key, the archive within; nothing is written anywhere. It goes on
// after a bad part, so that the report names all of them. The error is nil if
// all is good; else it joins what was found, or is the source's own.
func Verify(ctx context.Context, o VerifyOptions, m *Manifest, src PartSource) (*Report, error) {
	r := &Report{
		Name: m.Name, Account: m.Account, Arch: m.Arch, Type: m.Type, Size: m.Size, BundledSize: m.BundledSize,
		Parts: len(m.Parts), Archive: "not checked", Weak: weak,
		Unsigned: UnsignedClaims{Version: m.Version, Bundler: fmt.Sprintf("%s %s %s", m.Bundler.Name, m.Bundler.Version, m.Bundler.Release)},
	}
	var errs []error
	add := func(object string, err error) {
		errs = append(errs, err)
		p := Problem{Object: object, Class: "cannot be read", Text: err.Error()}
		if e, ok := errors.AsType[*Error](err); ok {
			p.Object, p.Class = e.Object, e.Class.Error()
		}
		r.Problems = append(r.Problems, p)
	}
	signer, err := o.checkTrust(m)
	switch {
	case err != nil:
		r.Signature = "bad"
		add(objManifest, err)
		// What an untrusted manifest asks for is not done.
		return r, errors.Join(errs...)
	case signer == nil:
		r.Signature = "unsigned"
	default:
		r.Signature, r.Signer = "good", Fingerprint(signer)
	}
	if o.ManifestOnly {
		return r, nil
	}
	if err := r.verifyParts(ctx, o, m, src, add); err != nil {
		return r, err
	}
	return r, errors.Join(errs...)
}

func (r *Report) verifyParts(ctx context.Context, o VerifyOptions, m *Manifest, src PartSource, add func(string, error)) error {
	var deep error // what is wrong with the whole; perhaps one part's fault
	if o.Key != nil {
		key, iv, err := o.open(m)
		if err != nil {
			add(objManifest, err)
		} else if deep = decodeParts(ctx, m, key, iv, newFetcher(m, src, o.SpoolDir), &nowhere{}); deep == nil {
			r.Archive, r.PartsGood, r.PartBytes = "good", len(m.Parts), m.BundledSize
			return nil
		} else {
			r.Archive = "bad"
		}
	}
	before := len(r.Problems)
	err := newFetcher(m, src, o.SpoolDir).eachResult(ctx, func(i int, p *fetched) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if p.err != nil {
			add(objPart(m.Parts[i].Filename), p.err)
			return nil
		}
		r.PartsGood++
		r.PartBytes += p.size
		return nil
	})
	if err != nil {
		return err
	}
	if len(r.Problems) > before {
		return nil
	}
	if r.PartBytes != m.BundledSize {
		add("parts", fail(ErrSize, "parts", "have %d bytes in all, the manifest says %d", r.PartBytes, m.BundledSize))
	} else if deep != nil {
		add(objArchive, deep)
	}
	return nil
}

// Fingerprint identifies a public key: the SHA-256 of its DER encoding
// (SubjectPublicKeyInfo) in hex.
func Fingerprint(pub *rsa.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}
