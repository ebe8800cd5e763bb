package keys

import (
	"bytes"
	"context"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Reasons for not getting at a private key.
var (
	ErrMode     = errors.New("private key readable by others")        // by its permissions
	ErrAgent    = errors.New("no answer from the ssh-agent")          // not running, or it refused
	ErrAgentKey = errors.New("the ssh-agent does not have that key")  // ssh-add it
	ErrWrong    = errors.New("wrong passphrase")                      // for a private key's file
	ErrPublic   = errors.New("a public key where a private is meant") // the other file
)

// A Signer signs with one SSH key, wherever its private half is.
type Signer interface {
	// Public is the key's public half.
	Public() ssh.PublicKey
	// Sign returns the armored SSHSIG of message for namespace, as
	// `ssh-keygen -Y sign` writes it. With an agent it may wait for a person
	// who confirms, until ctx ends. Several calls may run at once.
	Sign(ctx context.Context, namespace string, message []byte) ([]byte, error)
}

// Passphrase asks for the passphrase of the private key in the file at path.
// It is called only for keys that have one.
type Passphrase func(path string) ([]byte, error)

// OpenSigner gives the signer for the key in the file at path. A private key
// (ed25519, RSA of 2048 bits and more, ECDSA; OpenSSH's format or PEM) signs
// itself; ask may be nil if it has no passphrase. For a public key the agent
// that listens on socket (the caller's SSH_AUTH_SOCK) has the private half and
// is asked for each signature: the only way for security keys.
func OpenSigner(ctx context.Context, path, socket string, ask Passphrase) (Signer, error) {
	data, err := fromFile(path, "signing key", func(b []byte) ([]byte, error) { return b, nil })
	if err != nil {
		return nil, err
	}
	if pub, _, err := ParseSSHKey(string(bytes.TrimSpace(data))); err == nil {
		s, err := AgentSigner(ctx, socket, pub)
		if err != nil {
			return nil, fmt.Errorf("signing key %s: %w", path, err)
		}
		return s, nil
	}
	return ReadSigner(path, ask)
}

// ReadSigner reads the private key in the file at path. Its permissions must
// give nothing to group and others, or it is ErrMode.
func ReadSigner(path string, ask Passphrase) (Signer, error) {
	data, err := readSecret(path, "signing key")
	if err != nil {
		return nil, err
	}
	raw, err := parseSSHPrivate(path, data, ask)
	if err != nil {
		return nil, fmt.Errorf("reading signing key %s: %w", path, err)
	}
	s, err := ssh.NewSignerFromKey(raw)
	if err != nil {
		return nil, fmt.Errorf("reading signing key %s: %w: %w", path, ErrKeyType, err)
	}
	if err := CheckSigningKey(s.PublicKey()); err != nil {
		return nil, fmt.Errorf("reading signing key %s: %w", path, err)
	}
	return fileSigner{s}, nil
}

type fileSigner struct{ key ssh.Signer }

func (f fileSigner) Public() ssh.PublicKey { return f.key.PublicKey() }

func (f fileSigner) Sign(ctx context.Context, namespace string, message []byte) ([]byte, error) {
	return signSSH(ctx, f.key, namespace, message)
}

// AgentSigner signs through the agent that listens on the Unix socket, with
// the private half of public, which it must have now: else ErrAgentKey, or
// ErrAgent if there is no agent. Each signature is a connection of its own.
func AgentSigner(ctx context.Context, socket string, public ssh.PublicKey) (Signer, error) {
	if err := CheckSigningKey(public); err != nil {
		return nil, err
	}
	a := agentSigner{socket: socket, public: public}
	return a, a.with(ctx, func(ssh.Signer) error { return nil })
}

type agentSigner struct {
	socket string
	public ssh.PublicKey
}

func (a agentSigner) Public() ssh.PublicKey { return a.public }

func (a agentSigner) Sign(ctx context.Context, namespace string, message []byte) (armored []byte, err error) {
	err = a.with(ctx, func(s ssh.Signer) error {
		armored, err = signSSH(ctx, s, namespace, message)
		if err != nil && !errors.Is(err, ErrSignature) {
			err = fmt.Errorf("%w: %w", ErrAgent, err)
		}
		return err
	})
	return armored, err
}

// with connects to the agent, finds the key and gives it to use. The
// connection ends with ctx, whatever waits on it then.
func (a agentSigner) with(ctx context.Context, use func(ssh.Signer) error) error {
	if a.socket == "" {
		return fmt.Errorf("%w: SSH_AUTH_SOCK is not set; start one with `eval $(ssh-agent)` and `ssh-add`, or name a private key's file", ErrAgent)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", a.socket)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAgent, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		return errors.Join(ctx.Err(), fmt.Errorf("%w: %w", ErrAgent, err))
	}
	want := a.public.Marshal()
	i := slices.IndexFunc(signers, func(s ssh.Signer) bool { return bytes.Equal(s.PublicKey().Marshal(), want) })
	if i < 0 {
		return fmt.Errorf("%w: %s is not among its %d; add it with ssh-add", ErrAgentKey, Fingerprint(a.public), len(signers))
	}
	if err := use(signers[i]); err != nil {
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		return err
	}
	return nil
}

// ParseSSHKey reads one line of an SSH public key: kind, base64, and maybe a
// comment, which is everything behind them. Options in front are refused.
func ParseSSHKey(line string) (key ssh.PublicKey, comment string, err error) {
	kind, rest, _ := cutField(line)
	text, comment, _ := cutField(rest)
	key, err = parseSSHKey(kind, text)
	return key, comment, err
}

// readSecret reads a private key's file, of which nobody else may read or
// change anything. Pipes have no permissions worth asking for.
func readSecret(path, what string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	if st.Mode().IsRegular() && st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("reading %s %s: %w: mode %04o; run `chmod 600` on it, and replace the key if others may have read it",
			what, path, ErrMode, st.Mode().Perm())
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", what, err)
	}
	if len(data) > MaxFile {
		return nil, fmt.Errorf("reading %s %s: %w", what, path, ErrTooLarge)
	}
	return data, nil
}

// parseSSHPrivate reads a private key that SSH knows, asking for its passphrase
// if it has one.
func parseSSHPrivate(path string, data []byte, ask Passphrase) (any, error) {
	raw, err := ssh.ParseRawPrivateKey(data)
	var locked *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &locked):
		if ask == nil {
			return nil, fmt.Errorf("%w, and nobody is there to ask: add the key to an ssh-agent and name PATH.pub instead", ErrPassphrase)
		}
		word, err := ask(path)
		if err != nil {
			return nil, fmt.Errorf("asking for the passphrase: %w", err)
		}
		if raw, err = ssh.ParseRawPrivateKeyWithPassphrase(data, word); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrWrong, err)
		}
	case err != nil:
		if _, _, perr := ParseSSHKey(string(bytes.TrimSpace(data))); perr == nil {
			return nil, fmt.Errorf("%w: name the file without .pub", ErrPublic)
		}
		return nil, fmt.Errorf("%w: %w; a security key (sk-) signs through an ssh-agent: name its .pub file", ErrMalformed, err)
	}
	if k, ok := raw.(*rsa.PrivateKey); ok {
		if err := k.Validate(); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	return raw, nil
}
