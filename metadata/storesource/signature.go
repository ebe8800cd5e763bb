package storesource

import (
	"bytes"
	"crypto/rand"
	"crypto/sha512"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"
)

// Namespace is what records are signed for: signatures made for anything else
// are refused.
const Namespace = "instar-instance"

// An object is an armored SSHSIG signature, as `ssh-keygen -Y sign` makes it,
// a newline, and an age file; the signature is over the age file's bytes.
const pemType = "SSH SIGNATURE"

// sigBlob is the signature's wire format after its magic (PROTOCOL.sshsig).
type sigBlob struct {
	Version   uint32
	PublicKey []byte
	Namespace string
	Reserved  string
	Hash      string
	Signature []byte
}

// sigMessage is what is signed, after the same magic.
type sigMessage struct {
	Namespace string
	Reserved  string
	Hash      string
	Digest    []byte
}

const (
	sigMagic = "SSHSIG"
	sigHash  = "sha512"
)

func message(data []byte) []byte {
	sum := sha512.Sum512(data)
	return append([]byte(sigMagic), ssh.Marshal(sigMessage{Namespace, "", sigHash, sum[:]})...)
}

// Seal makes an object of a record's YAML.
func Seal(record []byte, signer ssh.Signer, recipients ...age.Recipient) ([]byte, error) {
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, recipients...)
	if err == nil {
		_, err = w.Write(record)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("sealing the record: %w", err)
	}
	var sig *ssh.Signature
	if as, ok := signer.(ssh.AlgorithmSigner); ok && signer.PublicKey().Type() == ssh.KeyAlgoRSA {
		sig, err = as.SignWithAlgorithm(rand.Reader, message(sealed.Bytes()), ssh.KeyAlgoRSASHA512)
	} else {
		sig, err = signer.Sign(rand.Reader, message(sealed.Bytes()))
	}
	if err != nil {
		return nil, fmt.Errorf("signing the record: %w", err)
	}
	blob := append([]byte(sigMagic), ssh.Marshal(sigBlob{1, signer.PublicKey().Marshal(), Namespace, "", sigHash, ssh.Marshal(sig)})...)
	return append(pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: blob}), sealed.Bytes()...), nil
}

// ErrUnsigned is the error of objects without a signature, or with one that
// is not by an allowed signer.
var ErrUnsigned = errors.New("not signed by an allowed signer")

// open verifies an object and returns the record inside it.
func open(object []byte, id string, signers []Signer, identities []age.Identity) ([]byte, error) {
	// Only an armor at the very beginning is one: what stands before it
	// would not be signed.
	if !bytes.HasPrefix(object, []byte("-----BEGIN "+pemType+"-----\n")) {
		return nil, fmt.Errorf("%w: it does not begin with a signature", ErrUnsigned)
	}
	block, sealed := pem.Decode(object)
	if block == nil || block.Type != pemType || len(block.Headers) != 0 {
		return nil, fmt.Errorf("%w: its signature is malformed", ErrUnsigned)
	}
	if err := verify(block.Bytes, sealed, id, signers); err != nil {
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), identities...)
	if err != nil {
		return nil, fmt.Errorf("opening the record: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxObject))
	if err != nil {
		return nil, fmt.Errorf("opening the record: %w", err)
	}
	return b, nil
}

func verify(blob, data []byte, id string, signers []Signer) error {
	rest, ok := bytes.CutPrefix(blob, []byte(sigMagic))
	var s sigBlob
	if !ok || ssh.Unmarshal(rest, &s) != nil || s.Version != 1 {
		return fmt.Errorf("%w: its signature is malformed", ErrUnsigned)
	}
	if s.Namespace != Namespace || s.Hash != sigHash || s.Reserved != "" {
		return fmt.Errorf("%w: the signature is for %q with %s, not for %q with %s", ErrUnsigned, s.Namespace, s.Hash, Namespace, sigHash)
	}
	var sig ssh.Signature
	if err := ssh.Unmarshal(s.Signature, &sig); err != nil {
		return fmt.Errorf("%w: its signature is malformed", ErrUnsigned)
	}
	for _, a := range signers {
		if !bytes.Equal(a.Key.Marshal(), s.PublicKey) || !a.covers(id) {
			continue
		}
		if a.Key.Type() == ssh.KeyAlgoRSA && sig.Format == ssh.KeyAlgoRSA { // SHA-1
			return fmt.Errorf("%w: the signature uses SHA-1", ErrUnsigned)
		}
		if err := a.Key.Verify(message(data), &sig); err != nil {
			return fmt.Errorf("%w: the signature is wrong", ErrUnsigned)
		}
		return nil
	}
	return fmt.Errorf("%w: its key may not sign for %s", ErrUnsigned, id)
}

// Signer is a line of an allowed_signers file.
type Signer struct {
	Principals []string // patterns of instance ids
	Key        ssh.PublicKey
}

// covers reports whether the signer may sign for the instance.
func (s Signer) covers(id string) bool {
	ok := false
	for _, p := range s.Principals {
		negated := strings.HasPrefix(p, "!")
		if match, err := path.Match(strings.TrimPrefix(p, "!"), id); err == nil && match {
			if negated {
				return false
			}
			ok = true
		}
	}
	return ok
}

// ParseSigners reads an allowed_signers file: "PATTERNS [namespaces="..."]
// KEYTYPE KEY". Lines for other namespaces are skipped; options that would
// narrow a line in a way not known here are errors.
func ParseSigners(data []byte) ([]Signer, error) {
	var out []Signer
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		principals, rest, _ := strings.Cut(line, " ")
		key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(rest))
		if err != nil {
			return nil, fmt.Errorf("allowed signers, line %d: %w", n, err)
		}
		use := true
		for _, o := range options {
			value, ok := strings.CutPrefix(o, `namespaces="`)
			if !ok {
				return nil, fmt.Errorf("allowed signers, line %d: option %q is not supported", n, o)
			}
			use = false
			for ns := range strings.SplitSeq(strings.TrimSuffix(value, `"`), ",") {
				if match, err := path.Match(ns, Namespace); err == nil && match {
					use = true
				}
			}
		}
		if use {
			out = append(out, Signer{strings.Split(principals, ","), key})
		}
	}
	if len(out) == 0 {
		return nil, errors.New("allowed signers: nobody may sign for " + Namespace)
	}
	return out, nil
}
