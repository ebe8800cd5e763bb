package keys

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/test/sshagent"
)

const namespace = "instar-image"

var message = []byte("{\n  \"format\": \"instar-image\"\n}\n")

// run runs a program that must succeed and returns what it printed.
func run(t testing.TB, stdin []byte, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(string(stdin))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func write0600(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// stockVerify is ssh-keygen -Y verify: nil if it accepts.
func stockVerify(t testing.TB, allowed, principal, space string, sig, msg []byte) error {
	t.Helper()
	dir := t.TempDir()
	f := write0600(t, filepath.Join(dir, "allowed"), []byte(allowed))
	s := write0600(t, filepath.Join(dir, "sig"), sig)
	cmd := exec.Command("ssh-keygen", "-Y", "verify", "-f", f, "-I", principal, "-n", space, "-s", s)
	cmd.Stdin = strings.NewReader(string(msg))
	cmd.Env = append(os.Environ(), "TZ=UTC")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("ssh-keygen: %v", err)
	}
	if err != nil {
		return errors.New(string(out))
	}
	return nil
}

// softKey is a security key without the hardware (PROTOCOL.u2f).
type softKey struct {
	priv  ed25519.PrivateKey
	flags byte
}

func (s softKey) PublicKey() ssh.PublicKey {
	blob := ssh.Marshal(struct {
		Kind        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, s.priv.Public().(ed25519.PublicKey), "ssh:"})
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		panic(err)
	}
	return key
}

func (s softKey) Sign(_ io.Reader, data []byte) (*ssh.Signature, error) {
	app, msg := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	rest := []byte{s.flags, 0, 0, 0, 7}
	toSign := append(append(app[:], rest...), msg[:]...)
	return &ssh.Signature{Format: ssh.KeyAlgoSKED25519, Blob: ed25519.Sign(s.priv, toSign), Rest: rest}, nil
}

// keyFiles makes a private key's file of each kind, by ssh-keygen and by Go.
func keyFiles(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, k := range []struct{ name, kind, bits string }{
		{"ed25519", "ed25519", "256"},
		{"rsa", "rsa", "2048"},
		{"p256", "ecdsa", "256"},
		{"p384", "ecdsa", "384"},
		{"p521", "ecdsa", "521"},
	} {
		files[k.name] = filepath.Join(dir, k.name)
		run(t, nil, "ssh-keygen", "-q", "-t", k.kind, "-b", k.bits, "-N", "", "-C", "a comment", "-f", files[k.name])
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	files["PKCS#1"] = write0600(t, filepath.Join(dir, "pkcs1"), block(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), nil))
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(ec)
	files["PKCS#8"] = write0600(t, filepath.Join(dir, "pkcs8"), block(t, "PRIVATE KEY", der, err))
	return files
}

// sign signs the message.
func sign(t testing.TB, s Signer) []byte {
	t.Helper()
	sig, err := s.Sign(t.Context(), namespace, message)
	if err != nil {
		t.Fatal(err)
	}
	return sig
}

// accept has us and ssh-keygen verify a signature of the message, and refuse it
// where it is not for.
func accept(t testing.TB, s Signer, sig []byte) {
	t.Helper()
	p, err := ParseSignature(sig)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify(message, namespace); err != nil {
		t.Fatal(err)
	}
	allowed := AllowedSigner{Principals: "machine-*,!machine-9", Namespaces: namespace, Key: s.Public(), Comment: "made by a test"}
	a, err := ParseAllowedSigners([]byte(allowed.String() + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	if g, err := a.Check(p.Key(), "machine-1", namespace); err != nil || g.At(time.Now()) != nil {
		t.Fatal(err)
	}
	if err := stockVerify(t, allowed.String(), "machine-1", namespace, sig, message); err != nil {
		t.Fatal(err)
	}
	if stockVerify(t, allowed.String(), "machine-9", namespace, sig, message) == nil {
		t.Fatal("ssh-keygen accepts a forbidden principal")
	}
}

func TestFileSigners(t *testing.T) {
	for name, path := range keyFiles(t, t.TempDir()) {
		t.Run(name, func(t *testing.T) {
			s, err := OpenSigner(t.Context(), path, "", nil)
			if err != nil {
				t.Fatal(err)
			}
			sig := sign(t, s)
			accept(t, s, sig)

			// What ssh-keygen makes is read the same way. It wants the .pub file.
			if err := WritePublicKey(path+".pub", s.Public(), name); err != nil {
				t.Fatal(err)
			}
			stock := run(t, message, "ssh-keygen", "-q", "-Y", "sign", "-f", path, "-n", namespace)
			accept(t, s, []byte(stock))
			if s.Public().Type() == ssh.KeyAlgoED25519 && stock != string(sig) {
				t.Error("another form of signature than ssh-keygen's")
			}
		})
	}
}

func TestSignatureRefusals(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	s, err := WriteSigningKey(path, "")
	if err != nil {
		t.Fatal(err)
	}
	good, err := s.Sign(t.Context(), namespace, message)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParseSignature(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify(message, "instar-head"); !errors.Is(err, ErrNamespace) {
		t.Errorf("another namespace: %v", err)
	}
	if err := p.Verify(append([]byte(" "), message...), namespace); !errors.Is(err, ErrSignature) {
		t.Errorf("another message: %v", err)
	}

	signed := func(change func(*sshsig.Signature)) []byte {
		q, err := sshsig.Unarmor(good)
		if err != nil {
			t.Fatal(err)
		}
		change(q)
		return armor(q.Marshal())
	}
	with := func(signer ssh.Signer, hash sshsig.HashAlgorithm) []byte {
		q, err := sshsig.Sign(strings.NewReader(string(message)), signer, hash, namespace)
		if err != nil {
			t.Fatal(err)
		}
		return armor(q.Marshal())
	}
	inner := s.(fileSigner).key
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	shortSigner, err := ssh.NewSignerFromKey(short)
	if err != nil {
		t.Fatal(err)
	}
	text := string(good)
	for _, c := range []struct {
		name string
		sig  []byte
		want error
	}{
		{"nothing", nil, ErrSignature},
		{"cut", good[:len(good)-30], ErrSignature},
		{"without last newline", good[:len(good)-1], ErrSignature},
		{"CRLF", []byte(strings.ReplaceAll(text, "\n", "\r\n")), ErrSignature},
		{"blank in front", []byte(" " + text), ErrSignature},
		{"text behind", []byte(text + "x"), ErrSignature},
		{"empty line behind", []byte(text + "\n"), ErrSignature},
		{"two", []byte(text + text), ErrSignature},
		{"64 columns", pem.EncodeToMemory(&pem.Block{Type: "SSH SIGNATURE", Bytes: p.parsed.Marshal()}), ErrSignature},
		{"PEM header", []byte(strings.Replace(text, "\n", "\nComment: x\n\n", 1)), ErrSignature},
		{"not base64", []byte(strings.Replace(text, "U1NI", "U1N!", 1)), ErrSignature},
		{"too long", []byte(strings.Repeat("A", MaxSignature+1)), ErrSignature},
		{"version 2", signed(func(q *sshsig.Signature) { q.Version = 2 }), ErrSignature},
		{"bytes behind the signature", signed(func(q *sshsig.Signature) { q.Signature.Rest = []byte{0} }), ErrSignature},
		{"sha256", with(inner, sshsig.HashSHA256), ErrSignature},
		{"short RSA", with(shortSigner, sshsig.HashSHA512), ErrKeyType},
	} {
		if _, err := ParseSignature(c.sig); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	// Every bit of it counts.
	blob := p.parsed.Marshal()
	for i := range len(blob) * 8 {
		blob[i/8] ^= 1 << (i % 8)
		if q, err := ParseSignature(armor(blob)); err == nil && q.Verify(message, namespace) == nil {
			t.Fatalf("accepted with bit %d changed", i)
		}
		blob[i/8] ^= 1 << (i % 8)
	}
}

func TestPassphraseAndMode(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	run(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", path)
	ask := func(word string) Passphrase {
		return func(p string) ([]byte, error) {
			if p != path {
				t.Errorf("asked for %s", p)
			}
			return []byte(word), nil
		}
	}
	s, err := ReadSigner(path, ask("open sesame"))
	if err != nil {
		t.Fatal(err)
	}
	accept(t, s, sign(t, s))
	if _, err := ReadSigner(path, ask("wrong")); !errors.Is(err, ErrWrong) {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := ReadSigner(path, nil); !errors.Is(err, ErrPassphrase) {
		t.Errorf("nobody to ask: %v", err)
	}
	no := errors.New("no terminal")
	if _, err := ReadSigner(path, func(string) ([]byte, error) { return nil, no }); !errors.Is(err, no) {
		t.Errorf("asking failed: %v", err)
	}
	if _, err := ReadSigner(path+".pub", nil); !errors.Is(err, ErrMode) {
		t.Errorf("public key, mode 0644: %v", err)
	}
	if err := os.Chmod(path+".pub", 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSigner(path+".pub", nil); !errors.Is(err, ErrPublic) {
		t.Errorf("public key: %v", err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSigner(path, ask("open sesame")); !errors.Is(err, ErrMode) {
			t.Errorf("mode %o: %v", mode, err)
		}
		if _, err := ReadIdentities(path, ask("open sesame")); !errors.Is(err, ErrMode) {
			t.Errorf("identity of mode %o: %v", mode, err)
		}
	}
	short := filepath.Join(dir, "short")
	run(t, nil, "ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", short)
	if _, err := ReadSigner(short, nil); !errors.Is(err, ErrKeyType) {
		t.Errorf("RSA of 1024 bits: %v", err)
	}
	if _, err := ReadSigner(write0600(t, filepath.Join(dir, "garbage"), []byte("hello")), nil); !errors.Is(err, ErrMalformed) {
		t.Errorf("garbage: %v", err)
	}
}

func TestSecurityKey(t *testing.T) {
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key := softKey{priv, 1}
	s, err := AgentSigner(t.Context(), sshagent.Serve(t, skAgent{key: key}), key.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	accept(t, s, sign(t, s))

	untouched := softKey{priv, 0}
	s, err = AgentSigner(t.Context(), sshagent.Serve(t, skAgent{key: untouched}), key.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sign(t.Context(), namespace, message); !errors.Is(err, ErrSignature) {
		t.Errorf("a key nobody touched: %v", err)
	}

	// Nobody touches it: the wait ends with the context.
	never := make(chan struct{})
	defer close(never)
	s, err = AgentSigner(t.Context(), sshagent.Serve(t, skAgent{key: key, touch: never}), key.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := s.Sign(ctx, namespace, message); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestSSHKeyLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	s, err := WriteSigningKey(path, "me@here on a line")
	if err != nil {
		t.Fatal(err)
	}
	line, err := os.ReadFile(path + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	key, comment, err := ParseSSHKey(strings.TrimSpace(string(line)))
	if err != nil || comment != "me@here on a line" || Fingerprint(key) != Fingerprint(s.Public()) {
		t.Fatalf("%q: %v, comment %q", line, err, comment)
	}
	b64 := base64.StdEncoding.EncodeToString(key.Marshal())
	for _, bad := range []string{
		"", "ssh-ed25519", "ssh-rsa " + b64, "x " + b64, "ssh-ed25519 " + b64 + "====", "ssh-ed25519 " + b64[:40],
		"ssh-ed25519 " + strings.TrimRight(b64, "=") + "AAAA", `no-pty ssh-ed25519 ` + b64,
	} {
		if _, _, err := ParseSSHKey(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if !strings.HasPrefix(run(t, nil, "ssh-keygen", "-y", "-f", path), "ssh-ed25519 "+b64) {
		t.Error("ssh-keygen reads another key")
	}
}
