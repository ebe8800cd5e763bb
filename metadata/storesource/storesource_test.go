package storesource

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/upload"
)

var ctx = context.Background()

func newSigner(t testing.TB, rsaKey bool) ssh.Signer {
	t.Helper()
	var key any
	var err error
	if rsaKey {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		_, key, err = ed25519.GenerateKey(rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newIdentity(t testing.TB) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func line(principals string, s ssh.Signer) string {
	return principals + " " + string(ssh.MarshalAuthorizedKey(s.PublicKey()))
}

func signers(t testing.TB, text string) []Signer {
	t.Helper()
	s, err := ParseSigners([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func record(n int, more string) []byte {
	return fmt.Appendf(nil, "instance-id: i-%d\ncaller: {addresses: [10.0.0.%d]}\n%s", n, n, more)
}

func seal(t testing.TB, record []byte, s ssh.Signer, r age.Recipient) []byte {
	t.Helper()
	b, err := Seal(record, s, r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newStore(t testing.TB) upload.Store {
	t.Helper()
	s, err := upload.OpenDir(t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t testing.TB, s upload.Store, key string, b []byte) {
	t.Helper()
	if _, err := upload.PutBytes(ctx, s, key, b, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

// TestSource follows a store, and refuses everything that is not signed by
// somebody who may sign for that very instance.
func TestSource(t *testing.T) {
	store, id, good, thief, other := newStore(t), newIdentity(t), newSigner(t, false), newSigner(t, false), newSigner(t, true)
	o := Options{Store: store, Identities: []age.Identity{id}, Signers: signers(t, line("i-*,!i-9", good)+line("i-2", other)+"# "+line("*", thief)+strings.Replace(line("*", thief), "* ", `* namespaces="git,file" `, 1))}
	put(t, store, "instances/i-1", seal(t, record(1, "user-data: one\n"), good, id.Recipient()))
	put(t, store, "instances/i-2", seal(t, record(2, ""), other, id.Recipient()))
	s, err := Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if ids := s.Instances().IDs(); strings.Join(ids, " ") != "i-1 i-2" || string(s.Instances().Get("i-1").UserData) != "one" {
		t.Errorf("instances %v", ids)
	}

	sealed := seal(t, record(1, "user-data: evil\n"), good, id.Recipient())
	_, ageFile, _ := bytes.Cut(sealed, []byte("-----END SSH SIGNATURE-----\n"))
	flipped := bytes.Clone(sealed)
	flipped[len(flipped)-1] ^= 1
	for _, c := range []struct {
		name, key string
		object    []byte
		want      string
	}{
		{"plain YAML", "instances/i-1", record(1, ""), "does not begin with a signature"},
		{"sealed but unsigned", "instances/i-1", ageFile, "does not begin with a signature"},
		{"signed by a thief", "instances/i-1", seal(t, record(1, ""), thief, id.Recipient()), "may not sign for i-1"},
		{"signed by another instance's signer", "instances/i-1", seal(t, record(1, ""), other, id.Recipient()), "may not sign for i-1"},
		{"changed", "instances/i-1", flipped, "signature is wrong"},
		{"cut off", "instances/i-1", sealed[:len(sealed)-20], "signature is wrong"},
		{"something before it", "instances/i-1", append([]byte("x\n"), sealed...), "does not begin"},
		{"another's record under this name", "instances/i-1", seal(t, record(2, ""), good, id.Recipient()), "is instance i-2's"},
		{"sealed to somebody else", "instances/i-1", seal(t, record(1, ""), good, newIdentity(t).Recipient()), "opening the record"},
		{"a record that is wrong", "instances/i-1", seal(t, record(1, "hostnam: x\n"), good, id.Recipient()), "instances/i-1:3: "},
		{"a record that names a file", "instances/i-1", seal(t, record(1, "user-data-file: /etc/shadow\n"), good, id.Recipient()), "user-data-file"},
		{"credentials in a file", "instances/i-1", seal(t, record(1, "role: {name: r, file: /etc/shadow}\n"), good, id.Recipient()), "may not name files"},
		{"an instance the signer may not sign for", "instances/i-9", seal(t, record(9, ""), good, id.Recipient()), "may not sign for i-9"},
	} {
		put(t, store, c.key, c.object)
		err := s.Reload(ctx)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if strings.Contains(c.want, "sign") && !errors.Is(err, ErrUnsigned) {
			t.Errorf("%s: %v is not ErrUnsigned", c.name, err)
		}
		in := s.Instances().Get("i-1")
		if in == nil || string(in.UserData) != "one" || s.Instances().Len() != 2 {
			t.Errorf("%s: the good records of before are gone", c.name)
		}
	}
	if err := store.Delete(ctx, "instances/i-9"); err != nil {
		t.Fatal(err)
	}
	put(t, store, "instances/i-1", seal(t, record(1, "user-data: two\n"), good, id.Recipient()))
	put(t, store, "instances/i-3", seal(t, record(3, ""), good, id.Recipient()))
	if err := store.Delete(ctx, "instances/i-2"); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(ctx); err != nil {
		t.Error(err)
	}
	if ids := s.Instances().IDs(); strings.Join(ids, " ") != "i-1 i-3" || string(s.Instances().Get("i-1").UserData) != "two" {
		t.Errorf("instances %v", ids)
	}
	put(t, store, "instances/i-4", seal(t, []byte("instance-id: i-4\ncaller: {addresses: [10.0.0.3]}\n"), good, id.Recipient()))
	if err := s.Reload(ctx); err == nil || s.Instances().Len() != 2 {
		t.Errorf("two instances with one address: %v, %d", err, s.Instances().Len())
	}
}

// TestSSHKeygen exchanges signatures with ssh-keygen, both ways.
func TestSSHKeygen(t *testing.T) {
	dir := t.TempDir()
	run := func(stdin []byte, args ...string) {
		t.Helper()
		cmd := exec.Command("ssh-keygen", args...)
		cmd.Dir, cmd.Stdin = dir, bytes.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
		}
	}
	id := newIdentity(t)
	for _, kind := range []string{"ed25519", "rsa", "ecdsa"} {
		run(nil, "-q", "-t", kind, "-N", "", "-f", kind)
		private, err := os.ReadFile(filepath.Join(dir, kind))
		if err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.ParsePrivateKey(private)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "allowed"), []byte(line("i-1", signer)), 0o600); err != nil {
			t.Fatal(err)
		}
		object := seal(t, record(1, ""), signer, id.Recipient())
		i := bytes.Index(object, []byte("age-encryption.org"))
		for name, b := range map[string][]byte{"sig": object[:i], "data": object[i:]} {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		run(object[i:], "-Y", "verify", "-f", "allowed", "-I", "i-1", "-n", Namespace, "-s", "sig")
		os.Remove(filepath.Join(dir, "data.sig"))
		run(nil, "-Y", "sign", "-f", kind, "-n", Namespace, "data")
		theirs, err := os.ReadFile(filepath.Join(dir, "data.sig"))
		if err != nil {
			t.Fatal(err)
		}
		allowed := signers(t, line("i-1", signer))
		if _, err := open(append(theirs, object[i:]...), "i-1", allowed, []age.Identity{id}); err != nil {
			t.Errorf("%s: ssh-keygen's signature: %v", kind, err)
		}
		os.Remove(filepath.Join(dir, "data.sig"))
		run(nil, "-Y", "sign", "-f", kind, "-n", "file", "data")
		if theirs, err = os.ReadFile(filepath.Join(dir, "data.sig")); err != nil {
			t.Fatal(err)
		}
		if _, err := open(append(theirs, object[i:]...), "i-1", allowed, []age.Identity{id}); !errors.Is(err, ErrUnsigned) {
			t.Errorf("%s: a signature for another namespace: %v", kind, err)
		}
	}
}

func TestParseSigners(t *testing.T) {
	k := line("i-1", newSigner(t, false))
	for _, bad := range []string{"", "# x\n", "i-1\n", "i-1 nonsense\n", strings.Replace(k, " ", " cert-authority ", 1), strings.Replace(k, " ", ` valid-before="20200101" `, 1), strings.Replace(k, " ", ` namespaces="git" `, 1)} {
		if s, err := ParseSigners([]byte(bad)); err == nil {
			t.Errorf("%q: %v", bad, s)
		}
	}
	if s, err := ParseSigners([]byte(strings.Replace(k, " ", ` namespaces="git,instar-*" `, 1))); err != nil || len(s) != 1 {
		t.Errorf("with our namespace: %v, %v", s, err)
	}
}

// TestState has four servers on one store: one token key, no lost update, and
// nothing believed that no server wrote.
func TestState(t *testing.T) {
	store, id := newStore(t), newIdentity(t)
	states := make([]*State, 4)
	var wg sync.WaitGroup
	for i := range states {
		wg.Go(func() {
			s, err := OpenState(ctx, store, []age.Identity{id}, []age.Recipient{id.Recipient()})
			if err != nil {
				t.Error(err)
			}
			states[i] = s
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, s := range states[1:] {
		if s.TokenKeys()[0] != states[0].TokenKeys()[0] {
			t.Fatal("two servers have different token keys")
		}
	}
	for _, s := range states {
		wg.Go(func() {
			for range 5 {
				if err := s.Update(ctx, "i-1", func(l *metadata.Live) error { l.Generation++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, s := range states {
		if err := s.Refresh(ctx); err != nil {
			t.Error(err)
		}
		if g := s.Live("i-1").Generation; g != 20 {
			t.Errorf("generation %d after 20 changes", g)
		}
	}
	no := errors.New("no")
	if err := states[0].Update(ctx, "i-1", func(l *metadata.Live) error { l.Generation = 0; return no }); !errors.Is(err, no) || states[0].Live("i-1").Generation != 20 {
		t.Errorf("a change that failed: %v", err)
	}
	b, _, err := upload.GetBytes(ctx, store, livePrefix+"i-1", maxObject)
	if err != nil {
		t.Fatal(err)
	}
	// An old version put back, or none: a withdrawn ticket would be good again.
	if err := states[1].Update(ctx, "i-1", func(l *metadata.Live) error { l.Generation = 20; return nil }); err != nil {
		t.Fatal(err)
	}
	latest, _, err := upload.GetBytes(ctx, store, livePrefix+"i-1", maxObject)
	if err != nil {
		t.Fatal(err)
	}
	for _, back := range []func() error{
		func() error { put(t, store, livePrefix+"i-1", b); return nil },
		func() error { return store.Delete(ctx, livePrefix+"i-1") },
	} {
		if err := back(); err != nil {
			t.Fatal(err)
		}
		if err := states[1].Refresh(ctx); err == nil || !strings.Contains(err.Error(), "older") {
			t.Errorf("an old state: %v", err)
		}
		if err := states[1].Update(ctx, "i-1", func(l *metadata.Live) error { l.Generation++; return nil }); err == nil || !strings.Contains(err.Error(), "older") {
			t.Errorf("a change of an old state: %v", err)
		}
		if g := states[1].Live("i-1").Generation; g != 20 {
			t.Errorf("generation %d", g)
		}
	}
	b = latest
	put(t, store, livePrefix+"i-1", b)
	if err := states[0].Refresh(ctx); err != nil {
		t.Error(err)
	}
	put(t, store, livePrefix+"i-2", b) // copied to another instance
	put(t, store, livePrefix+"i-1", bytes.Replace(b, []byte("20"), []byte("21"), 1))
	if err := states[0].Refresh(ctx); err == nil || !strings.Contains(err.Error(), "i-1") || !strings.Contains(err.Error(), "i-2") {
		t.Errorf("forged state: %v", err)
	}
	if states[0].Live("i-1").Generation != 20 || states[0].Live("i-2").Generation != 0 {
		t.Error("forged state was believed")
	}
	if err := states[0].Update(ctx, "i-1", func(*metadata.Live) error { return nil }); err == nil {
		t.Error("forged state was built upon")
	}
	if _, err := OpenState(ctx, store, []age.Identity{newIdentity(t)}, nil); err == nil {
		t.Error("a stranger's identity opened the token key")
	}
}

func FuzzOpen(f *testing.F) {
	id, signer := newIdentity(f), newSigner(f, false)
	good := seal(f, record(1, ""), signer, id.Recipient())
	f.Add(good)
	f.Add([]byte("-----BEGIN SSH SIGNATURE-----\nU1NIU0lH\n-----END SSH SIGNATURE-----\n"))
	allowed := signers(f, line("i-1", signer))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := open(b, "i-1", allowed, []age.Identity{id})
		if err == nil && !bytes.Equal(got, record(1, "")) {
			t.Errorf("opened %q", got)
		}
	})
}
