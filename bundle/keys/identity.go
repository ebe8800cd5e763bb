package keys

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
)

// Identity is a private key that decrypts what was encrypted to its recipient.
// Several calls may use it at once.
type Identity struct {
	to   *Recipient
	with age.Identity
}

// Recipient is the identity's public half.
func (i *Identity) Recipient() *Recipient { return i.to }

// ReadIdentities reads the identities in the file at path: an age identity
// file with one secret key a line (X25519 or hybrid), or an SSH private key,
// ed25519 or RSA. The passphrase of an SSH key is asked for when something is
// encrypted to it and not before. The file's permissions must give nothing to
// group and others, or it is ErrMode.
func ReadIdentities(path string, ask Passphrase) ([]*Identity, error) {
	data, err := readSecret(path, "identity")
	if err != nil {
		return nil, err
	}
	ids, err := parseIdentities(path, data, ask)
	if err != nil {
		return nil, fmt.Errorf("reading identity %s: %w", path, err)
	}
	return ids, nil
}

// ParseIdentities reads an age identity file: one secret key a line, empty
// lines and those beginning with # left out. Nothing of a key is ever part of
// an error.
func ParseIdentities(data []byte) ([]*Identity, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, ErrTooLarge)
	}
	var ids []*Identity
	n := 0
	for line := range strings.SplitSeq(string(data), "\n") {
		n++
		if line = strings.Trim(line, " \t\r"); line == "" || line[0] == '#' {
			continue
		}
		id, err := parseIdentity(line)
		if err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrIdentity, n, err)
		}
		ids = append(ids, id)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: no secret key in it", ErrIdentity)
	}
	return ids, nil
}

func parseIdentity(line string) (*Identity, error) {
	switch {
	case strings.HasPrefix(line, "AGE-SECRET-KEY-PQ-1"):
		i, err := age.ParseHybridIdentity(line)
		if err != nil {
			return nil, errors.New("damaged AGE-SECRET-KEY-PQ-1")
		}
		r := i.Recipient()
		return &Identity{&Recipient{text: r.String(), to: r}, i}, nil
	case strings.HasPrefix(line, "AGE-SECRET-KEY-1"):
		i, err := age.ParseX25519Identity(line)
		if err != nil {
			return nil, errors.New("damaged AGE-SECRET-KEY-1")
		}
		r := i.Recipient()
		return &Identity{&Recipient{text: r.String(), to: r}, i}, nil
	case strings.HasPrefix(line, "AGE-PLUGIN-"):
		return nil, errors.New("a plugin's key: plugins are not supported")
	case strings.HasPrefix(line, "age1"), strings.HasPrefix(line, "ssh-"):
		return nil, fmt.Errorf("%w", ErrPublic)
	}
	return nil, errors.New("not an age secret key")
}

func parseIdentities(path string, data []byte, ask Passphrase) ([]*Identity, error) {
	switch {
	case bytes.HasPrefix(data, []byte("age-encryption.org/")), bytes.HasPrefix(data, []byte("-----BEGIN AGE ENCRYPTED FILE-----")):
		return nil, fmt.Errorf("%w: the file is itself encrypted; decrypt it with `age -d` first", ErrIdentity)
	case !bytes.HasPrefix(data, []byte("-----BEGIN")):
		return ParseIdentities(data)
	}
	raw, err := ssh.ParseRawPrivateKey(data)
	if locked := (*ssh.PassphraseMissingError)(nil); errors.As(err, &locked) {
		id, err := lockedIdentity(path, data, locked.PublicKey, ask)
		return []*Identity{id}, err
	}
	if raw == nil || err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	id, err := sshIdentity(raw)
	if err != nil {
		return nil, err
	}
	return []*Identity{id}, nil
}

// sshIdentity takes what x/crypto/ssh read.
func sshIdentity(raw any) (*Identity, error) {
	signer, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	to, err := sshRecipient(SSHKeyLine(signer.PublicKey()))
	if err != nil {
		return nil, err
	}
	var with age.Identity
	switch k := raw.(type) {
	case *ed25519.PrivateKey:
		with, err = agessh.NewEd25519Identity(*k)
	case ed25519.PrivateKey:
		with, err = agessh.NewEd25519Identity(k)
	case *rsa.PrivateKey:
		if err = k.Validate(); err == nil {
			with, err = agessh.NewRSAIdentity(k)
		}
	default:
		err = fmt.Errorf("a key of kind %T does not decrypt", raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	return &Identity{to, with}, nil
}

// locked is an SSH key whose passphrase has not been needed yet.
type locked struct {
	path string
	pem  []byte
	ask  Passphrase
	to   *Recipient
	tag  string // of stanzas for this key, age's SSH recipient format
	mu   sync.Mutex
	open *Identity
}

func lockedIdentity(path string, pem []byte, pub ssh.PublicKey, ask Passphrase) (*Identity, error) {
	if pub == nil || ask == nil {
		return nil, fmt.Errorf("%w; convert it with `ssh-keygen -p -f KEY` or give one without", ErrPassphrase)
	}
	to, err := sshRecipient(SSHKeyLine(pub))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(pub.Marshal())
	return &Identity{to, &locked{path: path, pem: pem, ask: ask, to: to, tag: base64.RawStdEncoding.EncodeToString(sum[:4])}}, nil
}

// Unwrap implements age.Identity.
func (l *locked) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	kind, _, _ := strings.Cut(l.to.text, " ")
	mine := func(s *age.Stanza) bool { return s.Type == kind && len(s.Args) > 0 && s.Args[0] == l.tag }
	if !slices.ContainsFunc(stanzas, mine) {
		return nil, age.ErrIncorrectIdentity
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		raw, err := parseSSHPrivate(l.path, l.pem, l.ask)
		if err != nil {
			return nil, err
		}
		id, err := sshIdentity(raw)
		if err != nil {
			return nil, err
		}
		if id.to.text != l.to.text {
			return nil, fmt.Errorf("%w: the file's public and private halves differ", ErrIdentity)
		}
		l.open = id
	}
	return l.open.with.Unwrap(stanzas)
}
