package metadata

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/smallstep/pkcs7"
)

// Signatures are what proves an identity document: the PKCS#1 v1.5 signature
// of its SHA-256, and CMS signed data with the document inside, once for each
// of EC2's two names. All are base64, in lines, without BEGIN and END.
type Signatures struct{ Signature, PKCS7, RSA2048 string }

// Signer signs identity documents.
type Signer struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate

	mu    sync.Mutex
	cache map[*Instance]*Signatures // bounded: a boot asks for all of them at once, then rarely
}

// NewSigner returns a Signer that uses an RSA key of at least 2,048 bits and
// its certificate, by which clients verify.
func NewSigner(key *rsa.PrivateKey, cert *x509.Certificate) (*Signer, error) {
	pub, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok || !pub.Equal(&key.PublicKey) {
		return nil, errors.New("the identity certificate is not the identity key's: give the pair, or remove both to have new ones made")
	}
	if key.N.BitLen() < 2048 {
		return nil, fmt.Errorf("the identity key has %d bits, fewer than 2048", key.N.BitLen())
	}
	return &Signer{key: key, cert: cert, cache: make(map[*Instance]*Signatures)}, nil
}

func (s *Signer) sign(in *Instance) (*Signatures, error) {
	s.mu.Lock()
	have := s.cache[in]
	s.mu.Unlock()
	if have != nil {
		return have, nil
	}
	doc := []byte(in.document())
	sum := sha256.Sum256(doc)
	raw, err := rsa.SignPKCS1v15(rand.Reader, s.key, crypto.SHA256, sum[:])
	if err != nil {
		return nil, fmt.Errorf("signing the identity document of %s: %w", in.ID, err)
	}
	cms, err := s.cms(doc)
	if err != nil {
		return nil, fmt.Errorf("signing the identity document of %s: %w", in.ID, err)
	}
	out := &Signatures{Signature: base64Lines(raw, 76), PKCS7: base64Lines(cms, 64), RSA2048: base64Lines(cms, 64)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.cache) >= 256 {
		clear(s.cache)
	}
	s.cache[in] = out
	return out, nil
}

func (s *Signer) cms(doc []byte) ([]byte, error) {
	sd, err := pkcs7.NewSignedData(doc)
	if err != nil {
		return nil, err
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	if err := sd.AddSigner(s.cert, s.key, pkcs7.SignerInfoConfig{}); err != nil {
		return nil, err
	}
	return sd.Finish()
}

// base64Lines encodes in lines of the given width, without a final newline.
func base64Lines(b []byte, width int) string {
	s := base64.StdEncoding.EncodeToString(b)
	var out strings.Builder
	for len(s) > width {
		out.WriteString(s[:width] + "\n")
		s = s[width:]
	}
	return out.String() + s
}

// document is the instance identity document, laid out as EC2 does.
func (in *Instance) document() string {
	str := func(s string) string {
		if s == "" {
			return "null"
		}
		return quote(s)
	}
	list := func(l []string) string {
		if len(l) == 0 {
			return "null"
		}
		q := make([]string, len(l))
		for i, s := range l {
			q[i] = quote(s)
		}
		return "[ " + strings.Join(q, ", ") + " ]"
	}
	pending := "null"
	if !in.LaunchTime.IsZero() {
		pending = quote(stamp(in.LaunchTime))
	}
	members := []string{
		`"accountId" : ` + str(in.AccountID),
		`"architecture" : ` + str(in.Architecture),
		`"availabilityZone" : ` + str(in.Placement.Zone),
		`"billingProducts" : null`,
		`"devpayProductCodes" : ` + list(in.ProductCodes),
		`"marketplaceProductCodes" : null`,
		`"imageId" : ` + str(in.AMI),
		`"instanceId" : ` + str(in.ID),
		`"instanceType" : ` + str(in.Type),
		`"kernelId" : ` + str(in.Kernel),
		`"pendingTime" : ` + pending,
		`"privateIp" : ` + str(addr(in.localIPv4())),
		`"ramdiskId" : ` + str(in.Ramdisk),
		`"region" : ` + str(in.Placement.Region),
		`"version" : "2017-09-30"`,
	}
	return "{\n  " + strings.Join(members, ",\n  ") + "\n}"
}
