package keys

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"strings"
	"time"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/internal/durable"
)

// WriteIdentity makes a machine's age identity and writes it to a new file at
// path, as age-keygen does, mode 0600 and durable: when it returns nil, what
// is encrypted to the identity stays readable after a power cut. A file that
// exists is left alone: the error is fs.ErrExist.
//
// The identity is a hybrid one (ML-KEM-768 and X25519). What is encrypted to it
// lies in somebody else's storage for years, where it can be kept until there
// is a machine that breaks X25519. Its price is 2 KB for each image it reads,
// and that age older than 1.3 cannot open it: who must, adds another recipient.
func WriteIdentity(path string, now time.Time) (*Identity, error) {
	i, err := age.GenerateHybridIdentity()
	if err != nil {
		return nil, fmt.Errorf("making an age identity: %w", err)
	}
	r := i.Recipient()
	text := fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", now.UTC().Format(time.RFC3339), r, i)
	if err := durable.Create(path, 0o600, []byte(text)); err != nil {
		return nil, fmt.Errorf("writing age identity: %w", err)
	}
	return &Identity{&Recipient{text: r.String(), to: r}, i}, nil
}

// WriteSigningKey makes an ed25519 key and writes it to new files at path, in
// OpenSSH's format without a passphrase, mode 0600, and path.pub, mode 0644,
// both durable. If path exists the error is fs.ErrExist; path.pub, which holds
// nothing that is not in path, is replaced. The comment is one line.
func WriteSigningKey(path, comment string) (Signer, error) {
	if strings.ContainsAny(comment, "\r\n\x00") {
		return nil, fmt.Errorf("making a signing key: comment %q is not one line", comment)
	}
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a signing key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return nil, fmt.Errorf("making a signing key: %w", err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		return nil, fmt.Errorf("making a signing key: %w", err)
	}
	if err := durable.Create(path, 0o600, pem.EncodeToMemory(block)); err != nil {
		return nil, fmt.Errorf("writing signing key: %w", err)
	}
	if err := WritePublicKey(path+".pub", s.PublicKey(), comment); err != nil {
		return nil, err
	}
	return fileSigner{s}, nil
}

// WritePublicKey writes key's one line to the file at path, mode 0644, durable
// and whole or not at all. What was there is replaced.
func WritePublicKey(path string, key ssh.PublicKey, comment string) error {
	line := strings.TrimRight(SSHKeyLine(key)+" "+comment, " ") + "\n"
	if err := durable.Replace(path, 0o644, []byte(line)); err != nil {
		return fmt.Errorf("writing public key: %w", err)
	}
	return nil
}
