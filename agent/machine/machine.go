// Package machine keeps what makes a machine somebody to a store of images: the
// identity that opens what was encrypted to it, the SSH key it signs with, and
// the allowed_signers file that says whose word it takes.
//
// In go a directory and what the operator named instead of its files; out come
// keys, and the paths of what must never be captured. The package reads these
// files, talks to the SSH agent when asked to, and, with [Options.Create],
// makes what is missing, each file whole or not at all.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/crypto/ssh"
	"lukechampine.com/blake3"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/internal/durable"
)

// Names of the files in [Options.Dir].
const (
	IdentityFile   = "identity.age"
	SigningKeyFile = "signing.key"
	SignersFile    = "allowed_signers"
)

// ErrLost is wrapped by errors about a private key that is missing although its
// public half shows that there was one. A new one in its place would open none
// of the images there are.
var ErrLost = errors.New("the private key was lost or moved")

// Namespaces of what a machine's own key may sign, as allowed_signers has them.
const Namespaces = "instar-image,instar-head,instar-domain,instar-trace,instar-catalog"

// Options say where a machine's keys are.
type Options struct {
	// Dir is the directory of what the machine has by default.
	Dir string
	// Identities are files with age identities or SSH private keys that open
	// images, instead of Dir's identity.age. The first is this machine's own.
	Identities []string
	// SigningKey is a file with an SSH private key, or a public one whose
	// private half the agent has, or "agent" for the only key the agent has;
	// "" is Dir's signing.key.
	SigningKey string
	// Signers is an allowed_signers file instead of Dir's.
	Signers string
	// Create makes those of Dir's files that are missing.
	Create bool
	// Comment is that of a signing key that is made, as "root@web-1".
	Comment string
	// AgentSocket is SSH_AUTH_SOCK.
	AgentSocket string
	// Ask asks for passphrases; nil if nobody can be asked.
	Ask keys.Passphrase
}

// Machine is a machine's keys. It is not for concurrent use.
type Machine struct {
	o    Options
	made []string
}

// Open takes note of the options. What they name is read when it is asked for.
func Open(o Options) *Machine { return &Machine{o: o} }

// Made are the files that were made, for the operator to be told.
func (m *Machine) Made() []string { return m.made }

// SecretFiles are the private keys this machine uses, which stay out of every
// capture. They need not exist.
func (m *Machine) SecretFiles() []string {
	files := append([]string{m.path(IdentityFile), m.path(SigningKeyFile)}, m.o.Identities...)
	if m.o.SigningKey != "" && m.o.SigningKey != "agent" {
		files = append(files, m.o.SigningKey)
	}
	return files
}

func (m *Machine) path(name string) string { return filepath.Join(m.o.Dir, name) }

// Identities are what opens images, the machine's own first. Without Create an
// absent one is an error that wraps fs.ErrNotExist.
func (m *Machine) Identities() ([]*keys.Identity, error) {
	files := m.o.Identities
	if len(files) == 0 {
		file := m.path(IdentityFile)
		err := m.place(file, func() error {
			id, err := keys.WriteIdentity(file, time.Now())
			if err != nil {
				return err
			}
			err = durable.Create(file+".pub", 0o644, []byte(id.Recipient().String()+"\n"))
			if errors.Is(err, fs.ErrExist) {
				return nil
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		files = []string{file}
	}
	var all []*keys.Identity
	for _, file := range files {
		ids, err := keys.ReadIdentities(file, m.o.Ask)
		if err != nil {
			return nil, err
		}
		all = append(all, ids...)
	}
	return all, nil
}

// Owner is 32 bytes that only this machine knows, by which it recognises the
// packs it made (SPEC §5). They follow from its own identity's file.
func (m *Machine) Owner() (owner [32]byte, err error) {
	if _, err := m.Identities(); err != nil {
		return owner, err
	}
	file := m.path(IdentityFile)
	if len(m.o.Identities) > 0 {
		file = m.o.Identities[0]
	}
	f, err := os.Open(file)
	if err != nil {
		return owner, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, keys.MaxFile))
	if err != nil {
		return owner, fmt.Errorf("reading the machine's identity: %w", err)
	}
	var secret []byte
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			secret = append(append(secret, line...), '\n')
		}
	}
	blake3.DeriveKey(owner[:], "instar 2026-11-22 pack owner", secret)
	return owner, nil
}

// Signer signs what this machine publishes.
func (m *Machine) Signer(ctx context.Context) (keys.Signer, error) {
	switch m.o.SigningKey {
	case "":
	case "agent":
		return m.onlyAgentKey(ctx)
	default:
		return keys.OpenSigner(ctx, m.o.SigningKey, m.o.AgentSocket, m.o.Ask)
	}
	file := m.path(SigningKeyFile)
	err := m.place(file, func() error {
		_, err := keys.WriteSigningKey(file, m.o.Comment)
		return err
	})
	if err != nil {
		return nil, err
	}
	return keys.ReadSigner(file, m.o.Ask)
}

// Signers says whose signatures count. A list that is made allows what signer
// signs, for images of any name; signer may be nil for whoever only reads.
func (m *Machine) Signers(signer keys.Signer) (*keys.AllowedSigners, error) {
	file := m.SignersFile()
	if m.o.Signers == "" {
		err := m.place(file, func() error {
			if signer == nil {
				return fmt.Errorf("%s: %w", file, fs.ErrNotExist)
			}
			return durable.Create(file, 0o644, fmt.Appendf(nil, "# Whose images this machine accepts: see ALLOWED SIGNERS in ssh-keygen(1).\n"+
				"# The first word is an image's name, or a pattern of names.\n%s\n", SignersLine(signer.Public(), m.o.Comment)))
		})
		if err != nil {
			return nil, err
		}
	}
	return keys.ReadAllowedSigners(file)
}

// SignersFile is where [Machine.Signers] looks.
func (m *Machine) SignersFile() string {
	if m.o.Signers != "" {
		return m.o.Signers
	}
	return m.path(SignersFile)
}

// SignersLine is the line of an allowed_signers file that lets a key sign
// images of any name.
func SignersLine(key ssh.PublicKey, comment string) string {
	return keys.AllowedSigner{Principals: "*", Namespaces: Namespaces, Key: key, Comment: comment}.String()
}

// place makes a file unless it is there. Of two that make it at the same time,
// one's is used by both.
func (m *Machine) place(file string, write func() error) error {
	if _, err := os.Lstat(file); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking for %s: %w", file, err)
	}
	if !m.o.Create {
		return fmt.Errorf("%s: %w", file, fs.ErrNotExist)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("making %s: %w", file, err)
	}
	if _, err := os.Lstat(file + ".pub"); err == nil {
		if _, err := os.Lstat(file); err == nil {
			return nil // another process made both between the two looks
		}
		return fmt.Errorf("%s: %w", file, ErrLost)
	}
	switch err := write(); {
	case errors.Is(err, fs.ErrExist):
		return nil
	case err != nil:
		return fmt.Errorf("making %s: %w", file, err)
	}
	m.made = append(m.made, file)
	return nil
}
