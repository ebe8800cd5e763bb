package machine_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh/agent"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/sshagent"
)

// TestFirstRun makes everything, and the second run uses it.
func TestFirstRun(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc", "instar")
	reader := machine.Open(machine.Options{Dir: dir})
	if _, err := reader.Identities(); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir) {
		t.Errorf("without Create: %v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a reader made the directory")
	}
	var recipient string
	var owner [32]byte
	for run := range 2 {
		m := machine.Open(machine.Options{Dir: dir, Create: true, Comment: "root@web-1"})
		ids, err := m.Identities()
		if err != nil {
			t.Fatal(err)
		}
		signer, err := m.Signer(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		signers, err := m.Signers(signer)
		if err != nil {
			t.Fatal(err)
		}
		own, err := m.Owner()
		if err != nil {
			t.Fatal(err)
		}
		if want := []int{3, 0}[run]; len(m.Made()) != want {
			t.Errorf("run %d made %q, want %d files", run, m.Made(), want)
		}
		if run > 0 && (ids[0].Recipient().String() != recipient || own != owner) {
			t.Error("the second run has another identity")
		}
		recipient, owner = ids[0].Recipient().String(), own
		for file, mode := range map[string]fs.FileMode{
			"": 0o700, machine.IdentityFile: 0o600, machine.SigningKeyFile: 0o600, machine.SigningKeyFile + ".pub": 0o644, machine.SignersFile: 0o644,
		} {
			if st, err := os.Stat(filepath.Join(dir, file)); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s: %v; want mode %o", file, err, mode)
			}
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 5 {
			t.Errorf("%d files, %v; want 5 and no leftovers", len(entries), err)
		}
		sealed, err := keys.Wrap(make([]byte, 32), ids[0].Recipient())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := keys.Unwrap(sealed, 32, ids...); err != nil {
			t.Error(err)
		}
		if _, err := signers.Check(signer.Public(), "web-1", "instar-image"); err != nil {
			t.Error(err)
		}
		if _, err := signers.Check(signer.Public(), "web-1", "file"); err == nil {
			t.Error("the list allows what nobody needs")
		}
		verifies(t, filepath.Join(dir, machine.SigningKeyFile), m.SignersFile())
	}
}

// verifies checks with ssh-keygen that the key and the list fit.
func verifies(t *testing.T, key, signers string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "m")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("ssh-keygen", "-Y", "sign", "-f", key, "-n", "instar-head", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.Command("ssh-keygen", "-Y", "verify", "-f", signers, "-I", "web-1", "-n", "instar-head", "-s", file+".sig")
	cmd.Stdin = strings.NewReader("x")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestFirstRunsAtOnce: all of them end up with the same keys.
func TestFirstRunsAtOnce(t *testing.T) {
	dir := t.TempDir()
	owners := make([][32]byte, 8)
	public := make([]string, 8)
	var wg sync.WaitGroup
	for i := range owners {
		wg.Go(func() {
			m := machine.Open(machine.Options{Dir: dir, Create: true})
			var err error
			if owners[i], err = m.Owner(); err != nil {
				t.Error(err)
			}
			s, err := m.Signer(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			public[i] = string(s.Public().Marshal())
			if _, err := m.Signers(s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range owners {
		if owners[i] != owners[0] || public[i] != public[0] || owners[i] == [32]byte{} {
			t.Fatal("two of them have different keys")
		}
	}
}

// TestNamed uses what the operator names, makes nothing, and tells what must
// stay out of captures.
func TestNamed(t *testing.T) {
	dir, none := t.TempDir(), filepath.Join(t.TempDir(), "none")
	file := filepath.Join(dir, "key")
	if _, err := keys.WriteSigningKey(file, "me"); err != nil {
		t.Fatal(err)
	}
	m := machine.Open(machine.Options{Dir: none, Identities: []string{file}, SigningKey: file, Signers: filepath.Join(dir, "signers"), Create: true})
	ids, err := m.Identities()
	if err != nil || !strings.HasPrefix(ids[0].Recipient().String(), "ssh-ed25519 ") {
		t.Errorf("an SSH key as identity: %v", err)
	}
	s, err := m.Signer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Signers(s); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a named list that is absent: %v", err)
	}
	if len(m.Made()) != 0 {
		t.Errorf("made %q", m.Made())
	}
	if _, err := os.Stat(none); err == nil {
		t.Error("made its directory")
	}
	if secret := strings.Join(m.SecretFiles(), " "); !strings.Contains(secret, file) {
		t.Errorf("%s is not among the secret files %s", file, secret)
	}
}

func TestAgent(t *testing.T) {
	dir := t.TempDir()
	var signers []keys.Signer
	ring := agent.NewKeyring()
	for _, name := range []string{"a", "b"} {
		file := filepath.Join(dir, name)
		s, err := keys.WriteSigningKey(file, name)
		if err != nil {
			t.Fatal(err)
		}
		sshagent.Add(t, ring, file, name)
		signers = append(signers, s)
		os.Remove(file)
	}
	socket := sshagent.Serve(t, ring)
	with := func(key, socket string) (keys.Signer, error) {
		return machine.Open(machine.Options{SigningKey: key, AgentSocket: socket}).Signer(t.Context())
	}
	if _, err := with("agent", socket); !errors.Is(err, keys.ErrAgentKey) {
		t.Errorf("two keys: %v", err)
	}
	s, err := with(filepath.Join(dir, "b.pub"), socket)
	if err != nil || !bytes.Equal(s.Public().Marshal(), signers[1].Public().Marshal()) {
		t.Errorf("by the public key's file: %v", err)
	}
	if err := ring.Remove(signers[0].Public()); err != nil {
		t.Fatal(err)
	}
	if s, err := with("agent", socket); err != nil || !bytes.Equal(s.Public().Marshal(), signers[1].Public().Marshal()) {
		t.Errorf("the only key: %v", err)
	} else if _, err := s.Sign(t.Context(), "instar-head", []byte("x")); err != nil {
		t.Error(err)
	}
	if err := ring.RemoveAll(); err != nil {
		t.Fatal(err)
	}
	for _, sock := range []string{socket, "", filepath.Join(dir, "nobody")} {
		if _, err := with("agent", sock); !errors.Is(err, keys.ErrAgentKey) && !errors.Is(err, keys.ErrAgent) {
			t.Errorf("socket %q: %v", sock, err)
		}
	}
}

// TestLost: a key that was there and is gone is never replaced by a new one.
func TestLost(t *testing.T) {
	dir := t.TempDir()
	o := machine.Options{Dir: dir, Create: true}
	m := machine.Open(o)
	if _, err := m.Identities(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Signer(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		file string
		use  func(*machine.Machine) error
	}{
		{machine.IdentityFile, func(m *machine.Machine) error { _, err := m.Identities(); return err }},
		{machine.SigningKeyFile, func(m *machine.Machine) error { _, err := m.Signer(t.Context()); return err }},
	} {
		path := filepath.Join(dir, c.file)
		if err := os.Rename(path, path+".away"); err != nil {
			t.Fatal(err)
		}
		if err := c.use(machine.Open(o)); !errors.Is(err, machine.ErrLost) {
			t.Errorf("%s: %v", c.file, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was made: %v", c.file, err)
		}
		if err := os.Rename(path+".away", path); err != nil {
			t.Fatal(err)
		}
		if err := c.use(machine.Open(o)); err != nil {
			t.Errorf("%s, put back: %v", c.file, err)
		}
	}
}
