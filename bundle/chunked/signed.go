package chunked

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/keys"
)

// Namespaces of signatures, which are the "format" of their documents: what
// was signed as one kind of document is none of another kind.
const (
	NamespaceImage  = "instar-image"
	NamespaceHead   = "instar-head"
	NamespaceDomain = "instar-domain"
	NamespaceTrace  = "instar-trace"
)

// MaxManifest is the most bytes that a signed document has, without its
// signature. All kinds but manifests have lower limits.
const MaxManifest = 64 << 20

// MaxSigned is the most bytes that a signed document has with its signature:
// whoever fetches one stops there.
const MaxSigned = MaxManifest + keys.MaxSignature

var signatureLine = []byte("\n-----BEGIN SSH SIGNATURE-----\n")

// Sign gives doc with its signature behind it: a signed document.
func Sign(ctx context.Context, doc []byte, namespace string, s keys.Signer) ([]byte, error) {
	if len(doc) == 0 || doc[len(doc)-1] != '\n' || len(doc) > MaxManifest {
		return nil, fmt.Errorf("%w: sign a document of %d bytes that ends a line", ErrUsage, len(doc))
	}
	sig, err := s.Sign(ctx, namespace, doc)
	if err != nil {
		return nil, fmt.Errorf("sign %s document: %w", namespace, err)
	}
	return append(bytes.Clone(doc), sig...), nil
}

// Split takes a signed document apart, at the last line that begins a
// signature. Neither part is to be believed.
func Split(object []byte) (doc, signature []byte, err error) {
	if len(object) > MaxSigned {
		return nil, nil, bad(ErrLimit, "signed document", "%d bytes are more than %d", len(object), MaxSigned)
	}
	i := bytes.LastIndex(object, signatureLine)
	if i < 0 {
		return nil, nil, &Error{Class: keys.ErrSignature, Object: "signed document", Detail: "it has no signature"}
	}
	return object[:i+1], object[i+1:], nil
}

// Verified is a document whose signature is right, by a key that may sign for
// the principal.
type Verified struct {
	Doc       []byte // part of what was verified
	Key       ssh.PublicKey
	Principal string
	grant     *keys.Grant
}

// At makes sure that the key was allowed to sign at time t, the document's own
// time of creation: else keys.ErrExpired.
func (v *Verified) At(t time.Time) error { return v.grant.At(t) }

// Verify checks the signature of a signed document: its form, that its key is
// in trust for principal and namespace, that it was made for namespace and is
// of these bytes; in this order, so that only keys of one's own allowed_signers
// file are ever computed with. What is wrong is one of the errors of package
// keys: ErrSignature, ErrKeyType, ErrUntrusted, ErrNamespace. The document
// itself is not read; OpenManifest and its like do that as well.
func Verify(object []byte, namespace string, trust *keys.AllowedSigners, principal string) (*Verified, error) {
	doc, armored, err := Split(object)
	if err != nil {
		return nil, err
	}
	named := func(err error) error {
		return fmt.Errorf("%s document of %q: %w", namespace, principal, err)
	}
	sig, err := keys.ParseSignature(armored)
	if err != nil {
		return nil, named(err)
	}
	grant, err := trust.Check(sig.Key(), principal, namespace)
	if err != nil {
		return nil, named(err)
	}
	if err := sig.Verify(doc, namespace); err != nil {
		return nil, named(err)
	}
	return &Verified{Doc: doc, Key: sig.Key(), Principal: principal, grant: grant}, nil
}

// signedDocument is a document that names whom it speaks for, and when.
type signedDocument interface {
	document
	about() (principal string, created time.Time)
}

// open verifies a signed document and reads it into d.
func open(d signedDocument, object []byte, trust *keys.AllowedSigners, principal string) (*Verified, error) {
	v, err := Verify(object, d.format(), trust, principal)
	if err != nil {
		return nil, err
	}
	if err := decode(d, v.Doc); err != nil {
		return nil, err
	}
	name, created := d.about()
	if name != principal {
		return nil, &Error{
			Class: ErrOther, Object: d.format() + " document",
			Detail: fmt.Sprintf("it is that of %q, not of %q", name, principal),
		}
	}
	if err := v.At(created); err != nil {
		return nil, fmt.Errorf("%s document of %q: %w", d.format(), principal, err)
	}
	return v, nil
}

// readUnverified reads a document out of a signed one without looking at the
// signature.
func readUnverified(d document, object []byte) error {
	doc, _, err := Split(object)
	if err != nil {
		return err
	}
	return decode(d, doc)
}

// sign gives the signed document that says d.
func sign(ctx context.Context, d document, s keys.Signer) ([]byte, error) {
	doc, err := encode(d)
	if err != nil {
		return nil, err
	}
	return Sign(ctx, doc, d.format(), s)
}
