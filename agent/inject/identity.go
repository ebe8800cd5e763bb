package inject

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// setHostname writes /etc/hostname.
func (h *hierarchy) setHostname(name string) error {
	if err := CheckHostname(name); err != nil {
		return err
	}
	return h.WriteFile("/etc/hostname", []byte(name+"\n"), 0o644)
}

// CheckHostname says why name is no host name (RFC 1123, at most 64 bytes, as
// the kernel keeps it).
func CheckHostname(name string) error {
	if name == "" || len(name) > 64 {
		return fmt.Errorf("host name %q is empty or longer than 64 bytes", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("host name %q has an empty label or one that begins or ends with '-'", name)
		}
		for _, c := range []byte(label) {
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-') {
				return fmt.Errorf("host name %q has a character other than letters, digits, '-' and '.'", name)
			}
		}
	}
	return nil
}

// freshMachineID gives the root a random machine-id (machine-id(5)), also
// under D-Bus's older name where that is a file of its own.
func (h *hierarchy) freshMachineID() (string, error) {
	b := make([]byte, 16)
	rand.Read(b)
	// A version 4 UUID, as systemd makes them.
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	id := hex.EncodeToString(b)
	if err := h.WriteFile("/etc/machine-id", []byte(id+"\n"), 0o444); err != nil {
		return "", fmt.Errorf("writing a machine-id: %w", err)
	}
	const dbus = "/var/lib/dbus/machine-id"
	if h.IsFile(dbus) {
		if err := h.WriteFile(dbus, []byte(id+"\n"), 0o644); err != nil {
			return "", fmt.Errorf("writing D-Bus's machine-id: %w", err)
		}
	}
	return id, nil
}

// machineIDOfThisBoot is the machine-id, if systemd made it when this system
// started: it does where an image has none. It may lie on a mount then, which
// cannot be replaced.
func (h *hierarchy) machineIDOfThisBoot() (string, bool) {
	f, err := h.OpenFile("/etc/machine-id")
	if err != nil {
		return "", false
	}
	defer f.Close()
	st, err := f.Stat()
	var info unix.Sysinfo_t
	if err != nil || unix.Sysinfo(&info) != nil {
		return "", false
	}
	booted := time.Now().Add(-time.Duration(info.Uptime) * time.Second)
	data, err := io.ReadAll(io.LimitReader(f, 64))
	id := strings.TrimSpace(string(data))
	if err != nil || len(id) != 32 || st.ModTime().Before(booted.Add(-2*time.Second)) {
		return "", false
	}
	return id, true
}

// keepMachineID shows the running system the machine-id it started with, by a
// mount over the new one: the journal's files, for one, are named by it.
func keepMachineID(root, run string, old []byte) error {
	if err := writeRun(run, "instar/machine-id", old, 0o755, 0o444); err != nil {
		return fmt.Errorf("keeping the machine-id until the next boot: %w", err)
	}
	at := filepath.Join(root, "etc/machine-id")
	if err := unix.Mount(filepath.Join(run, "instar/machine-id"), at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keeping the machine-id until the next boot: mounting over %s: %w", at, err)
	}
	return nil
}

// hostKey is an SSH host key, as its two files have it.
type hostKey struct {
	file    string
	private []byte
	public  string // without a line break
}

// freshHostKeys gives the root new SSH host keys in place of the image's: of
// each type that sshd's configuration names, else ed25519 and ecdsa; none if
// the root has no sshd. RSA is made only where named, for it takes long in a
// small machine. The public halves are returned. The image's keys stay until
// there are new ones: without any, sshd would not start.
func (h *hierarchy) freshHostKeys(comment string) ([]string, error) {
	dir, err := h.OpenDir("/etc/ssh")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("making SSH host keys: %w", err)
	}
	names, err := dir.Readdirnames(-1)
	dir.Close()
	if err != nil {
		return nil, fmt.Errorf("making SSH host keys: %w", err)
	}
	conf, err := h.readSSHDConfig()
	if err != nil {
		return nil, fmt.Errorf("making SSH host keys: %w", err)
	}
	files := conf.hostKeys
	if len(files) == 0 {
		files = []string{"/etc/ssh/ssh_host_ed25519_key", "/etc/ssh/ssh_host_ecdsa_key"}
	}
	var made []hostKey
	for _, f := range files {
		k, err := makeHostKey(f, comment)
		if err != nil {
			return nil, fmt.Errorf("making SSH host key %s: %w", f, err)
		}
		if k != nil {
			made = append(made, *k)
		}
	}
	var publics []string
	fresh := make(map[string]bool)
	for _, k := range made {
		// The public half first: one without its private half is no key of sshd's.
		err := h.WriteFile(k.file+".pub", []byte(k.public+"\n"), 0o644)
		if err == nil {
			err = h.WriteFile(k.file, k.private, 0o600)
		}
		if err != nil {
			return publics, fmt.Errorf("making SSH host key %s: %w", k.file, err)
		}
		publics = append(publics, k.public)
		fresh[path.Clean(k.file)], fresh[path.Clean(k.file+".pub")] = true, true
	}
	for _, n := range names {
		if !strings.HasPrefix(n, "ssh_host_") || fresh["/etc/ssh/"+n] {
			continue
		}
		if strings.HasSuffix(n, "_key") || strings.HasSuffix(n, "_key.pub") || strings.HasSuffix(n, "_key-cert.pub") {
			if err := h.Remove("/etc/ssh/" + n); err != nil {
				return publics, fmt.Errorf("removing the image's SSH host keys: %w", err)
			}
		}
	}
	return publics, nil
}

// makeHostKey makes a key of the type that its file's name tells; nil if it
// tells none, or one that OpenSSH no longer knows (dsa).
func makeHostKey(file, comment string) (*hostKey, error) {
	var private, public any
	switch base := path.Base(file); {
	case strings.Contains(base, "ed25519"):
		pub, priv, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		private, public = priv, pub
	case strings.Contains(base, "ecdsa"):
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		private, public = k, &k.PublicKey
	case strings.Contains(base, "rsa"):
		k, err := rsa.GenerateKey(rand.Reader, 3072)
		if err != nil {
			return nil, err
		}
		private, public = k, &k.PublicKey
	default:
		return nil, nil
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return nil, err
	}
	pub, err := ssh.NewPublicKey(public)
	if err != nil {
		return nil, err
	}
	line := strings.TrimSuffix(string(ssh.MarshalAuthorizedKey(pub)), "\n") + " " + comment
	return &hostKey{file: file, private: pem.EncodeToMemory(block), public: line}, nil
}
