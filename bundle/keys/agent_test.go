package keys

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/instar-image/instar/test/sshagent"
)

// skAgent holds one security key.
type skAgent struct {
	agent.Agent
	key   softKey
	touch chan struct{} // a signature waits for it; nil: touched
}

func (a skAgent) List() ([]*agent.Key, error) {
	p := a.key.PublicKey()
	return []*agent.Key{{Format: p.Type(), Blob: p.Marshal()}}, nil
}

func (a skAgent) Sign(_ ssh.PublicKey, data []byte) (*ssh.Signature, error) {
	if a.touch != nil {
		<-a.touch
	}
	return a.key.Sign(nil, data)
}

func TestAgent(t *testing.T) {
	dir := t.TempDir()
	ring := agent.NewKeyring()
	for name, path := range keyFiles(t, dir) {
		sshagent.Add(t, ring, path, name)
	}
	socket := sshagent.Serve(t, ring)
	for _, name := range []string{"ed25519", "rsa", "p256", "p384", "p521"} {
		s, err := OpenSigner(t.Context(), filepath.Join(dir, name+".pub"), socket, nil)
		if err != nil {
			t.Fatal(err)
		}
		accept(t, s, sign(t, s))
	}
	if _, err := OpenSigner(t.Context(), filepath.Join(dir, "rsa.pub"), "", nil); !errors.Is(err, ErrAgent) {
		t.Errorf("no socket: %v", err)
	}
	if _, err := OpenSigner(t.Context(), filepath.Join(dir, "rsa.pub"), filepath.Join(dir, "none"), nil); !errors.Is(err, ErrAgent) {
		t.Errorf("no agent: %v", err)
	}
	run(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "other"))
	if _, err := OpenSigner(t.Context(), filepath.Join(dir, "other.pub"), socket, nil); !errors.Is(err, ErrAgentKey) {
		t.Errorf("key the agent lacks: %v", err)
	}
	s, err := OpenSigner(t.Context(), filepath.Join(dir, "rsa.pub"), socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := ring.Lock([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sign(t.Context(), namespace, message); !errors.Is(err, ErrAgentKey) {
		t.Errorf("locked agent: %v", err)
	}
}

// TestStockAgent signs through OpenSSH's own agent.
func TestStockAgent(t *testing.T) {
	dir := t.TempDir()
	socket, path := filepath.Join(dir, "agent"), filepath.Join(dir, "key")
	run(t, nil, "ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", path)
	cmd := exec.Command("ssh-agent", "-D", "-a", socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() }) // it never ends by itself
	for range 600 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	add := exec.Command("ssh-add", "-q", path)
	add.Env = append(os.Environ(), "SSH_AUTH_SOCK="+socket)
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("ssh-add: %v\n%s", err, out)
	}
	s, err := OpenSigner(t.Context(), path+".pub", socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	accept(t, s, sign(t, s))
}
