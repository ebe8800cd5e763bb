package keys

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
)

// Reasons for not encrypting to a key or decrypting with it.
var (
	ErrRecipient  = errors.New("not a key one can encrypt to") // malformed, or of a kind that only signs
	ErrIdentity   = errors.New("not a key that decrypts")      // a file without one
	ErrNoIdentity = errors.New("encrypted to other keys")      // none of the identities opens it
	ErrWrapped    = errors.New("damaged encrypted key")        // not an age file, or changed
)

// MaxWrapped is the length in bytes of the longest wrapped payload that is
// opened. One for a hybrid key takes 1.9 KB.
const MaxWrapped = 16 << 10

// Recipient is a public key that payloads are encrypted to.
type Recipient struct {
	text, comment string
	to            age.Recipient
}

// String is the key's one spelling: "age1…", "age1pq1…", "ssh-ed25519 …" or
// "ssh-rsa …".
func (r *Recipient) String() string { return r.text }

// Comment is what stood behind an SSH key.
func (r *Recipient) Comment() string { return r.comment }

// PostQuantum says whether what is encrypted to it stays secret from whoever
// stores it until there are quantum computers.
func (r *Recipient) PostQuantum() bool {
	_, ok := r.to.(*age.HybridRecipient)
	return ok
}

// ParseRecipient reads a public key: an age key, X25519 ("age1…") or hybrid
// post-quantum ("age1pq1…"), or an SSH key, ssh-ed25519 or ssh-rsa of 2048
// bits and more, as in a .pub file. All others are ErrRecipient with the
// reason.
func ParseRecipient(line string) (*Recipient, error) {
	line = strings.Trim(line, " \t\r\n")
	switch {
	case strings.ContainsAny(line, "\r\n"):
		return nil, fmt.Errorf("%w: more than one line", ErrRecipient)
	case strings.HasPrefix(line, "AGE-SECRET-KEY-"):
		return nil, fmt.Errorf("%w: this is a secret key; give its public half, which age-keygen -y prints", ErrRecipient)
	case strings.HasPrefix(line, "age1pq1"):
		r, err := age.ParseHybridRecipient(line)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRecipient, err)
		}
		return &Recipient{text: r.String(), to: r}, nil
	case strings.HasPrefix(line, "age1") && strings.Count(line, "1") > 1 && !isX25519(line):
		return nil, fmt.Errorf("%w: %.20q is damaged or a plugin's key, and plugins are not supported; use age1…, age1pq1…, ssh-ed25519 or ssh-rsa", ErrRecipient, line)
	case strings.HasPrefix(line, "age1"):
		r, err := age.ParseX25519Recipient(line)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRecipient, err)
		}
		return &Recipient{text: r.String(), to: r}, nil
	}
	return sshRecipient(line)
}

// isX25519 tells a native key from a plugin's: bech32's data has no "1".
func isX25519(s string) bool {
	_, err := age.ParseX25519Recipient(s)
	return err == nil
}

func sshRecipient(line string) (*Recipient, error) {
	key, comment, err := ParseSSHKey(line)
	if err != nil {
		return nil, fmt.Errorf("%w: neither age1… nor an SSH public key: %w", ErrRecipient, err)
	}
	r := &Recipient{text: SSHKeyLine(key), comment: comment}
	switch key.Type() {
	case ssh.KeyAlgoED25519:
		r.to, err = agessh.NewEd25519Recipient(key)
	case ssh.KeyAlgoRSA:
		if err = checkSSHSize(key); err == nil {
			r.to, err = agessh.NewRSARecipient(key)
		}
	case ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256:
		err = errors.New("a security key signs but cannot decrypt; use an age key, or an ssh-ed25519 or ssh-rsa key in a file")
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		err = errors.New("age does not encrypt to ECDSA keys; use an age key, or an ssh-ed25519 or ssh-rsa key")
	default:
		err = fmt.Errorf("%s keys cannot decrypt; use an age key, or an ssh-ed25519 or ssh-rsa key", key.Type())
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecipient, err)
	}
	return r, nil
}

// ParseRecipients reads a file of recipients: one a line, empty lines and
// those beginning with # left out. There is at least one.
func ParseRecipients(data []byte) ([]*Recipient, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%w: %w", ErrRecipient, ErrTooLarge)
	}
	var all []*Recipient
	n := 0
	for line := range strings.SplitSeq(string(data), "\n") {
		n++
		if line = strings.Trim(line, " \t\r"); line == "" || line[0] == '#' {
			continue
		}
		r, err := ParseRecipient(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: no key in it", ErrRecipient)
	}
	return all, nil
}

// ReadRecipients reads the file of recipients at path, which may be an SSH
// key's .pub file.
func ReadRecipients(path string) ([]*Recipient, error) {
	return fromFile(path, "recipients", ParseRecipients)
}

// Wrap encrypts payload to r alone: a binary age file (age-encryption.org/v1)
// that stock age opens. No two are alike.
func Wrap(payload []byte, r *Recipient) ([]byte, error) {
	var b bytes.Buffer
	w, err := age.Encrypt(&b, r.to)
	if err == nil {
		if _, err = w.Write(payload); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("encrypting to %.40s: %w", r.text, err)
	}
	return b.Bytes(), nil
}

// Unwrap opens what Wrap made with whichever identity fits, and returns a
// payload of exactly size bytes. If none fits it is ErrNoIdentity; anything
// else than such a file is ErrWrapped. A wrong passphrase of an identity is
// ErrWrong.
func Unwrap(wrapped []byte, size int, ids ...*Identity) ([]byte, error) {
	if len(wrapped) > MaxWrapped {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrWrapped, MaxWrapped)
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: no identity to try", ErrNoIdentity)
	}
	with := make([]age.Identity, len(ids))
	for i, id := range ids {
		with[i] = id.with
	}
	r, err := age.Decrypt(bytes.NewReader(wrapped), with...)
	if none := (*age.NoIdentityMatchError)(nil); errors.As(err, &none) {
		return nil, fmt.Errorf("%w: none of %d identities opens it", ErrNoIdentity, len(ids))
	}
	if err != nil {
		if errors.Is(err, ErrPassphrase) || errors.Is(err, ErrWrong) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", ErrWrapped, err)
	}
	payload, err := io.ReadAll(io.LimitReader(r, int64(size)+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrapped, err)
	}
	if len(payload) != size {
		return nil, fmt.Errorf("%w: it does not hold %d bytes", ErrWrapped, size)
	}
	return payload, nil
}
