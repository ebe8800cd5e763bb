package keys

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
)

// identityFiles makes a file of each kind of identity.
func identityFiles(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{"hybrid": filepath.Join(dir, "hybrid")}
	if _, err := WriteIdentity(files["hybrid"], time.Unix(1790000000, 0)); err != nil {
		t.Fatal(err)
	}
	x, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	files["X25519"] = write0600(t, filepath.Join(dir, "x25519"), []byte("# a comment\r\n\n"+x.String()+"\r\n"))
	for _, kind := range []string{"ed25519", "rsa"} {
		files[kind] = filepath.Join(dir, kind)
		run(t, nil, "ssh-keygen", "-q", "-t", kind, "-N", "", "-f", files[kind])
		files["locked "+kind] = filepath.Join(dir, "locked-"+kind)
		run(t, nil, "ssh-keygen", "-q", "-t", kind, "-N", "open sesame", "-f", files["locked "+kind])
	}
	return files
}

func TestWrap(t *testing.T) {
	dir := t.TempDir()
	payload := []byte("instar-index-key-1 and 64 bytes")
	asked := 0
	ask := func(string) ([]byte, error) { asked++; return []byte("open sesame"), nil }
	other, err := WriteIdentity(filepath.Join(dir, "other"), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, path := range identityFiles(t, dir) {
		t.Run(name, func(t *testing.T) {
			asked = 0
			ids, err := ReadIdentities(path, ask)
			if err != nil || len(ids) != 1 {
				t.Fatalf("%d, %v", len(ids), err)
			}
			// The recipient as text goes around the world and comes back.
			r, err := ParseRecipient(ids[0].Recipient().String())
			if err != nil || r.String() != ids[0].Recipient().String() {
				t.Fatal(err)
			}
			if r.PostQuantum() != (name == "hybrid") {
				t.Error("wrong about quantum computers")
			}
			wrapped, err := Wrap(payload, r)
			if err != nil || len(wrapped) > MaxWrapped {
				t.Fatal(len(wrapped), err)
			}
			if got, err := Unwrap(wrapped, len(payload), other, ids[0]); err != nil || !bytes.Equal(got, payload) {
				t.Fatalf("%q, %v", got, err)
			}
			if _, err := Unwrap(wrapped, len(payload), other); !errors.Is(err, ErrNoIdentity) {
				t.Errorf("another identity: %v", err)
			}
			if n := asked; strings.HasPrefix(name, "locked") && n != 1 || !strings.HasPrefix(name, "locked") && n != 0 {
				t.Errorf("asked %d times for a passphrase", n)
			}
			for _, size := range []int{len(payload) - 1, len(payload) + 1, 0} {
				if _, err := Unwrap(wrapped, size, ids[0]); !errors.Is(err, ErrWrapped) {
					t.Errorf("size %d: %v", size, err)
				}
			}
			if _, err := Unwrap(append(wrapped, 0), len(payload), ids[0]); !errors.Is(err, ErrWrapped) {
				t.Errorf("a byte behind: %v", err)
			}
			if _, err := Unwrap(wrapped[:len(wrapped)-1], len(payload), ids[0]); !errors.Is(err, ErrWrapped) {
				t.Errorf("a byte short: %v", err)
			}
			// Stock age opens it, if it knows the kind and need not ask.
			if name == "X25519" || name == "ed25519" || name == "rsa" {
				in := write0600(t, filepath.Join(t.TempDir(), "wrapped"), wrapped)
				if got := run(t, nil, "age", "-d", "-i", path, in); got != string(payload) {
					t.Errorf("age -d: %q", got)
				}
				stock := run(t, payload, "age", "-r", r.String())
				if got, err := Unwrap([]byte(stock), len(payload), ids...); err != nil || !bytes.Equal(got, payload) {
					t.Errorf("what age wrapped: %q, %v", got, err)
				}
			}
		})
	}
	if _, err := Unwrap(make([]byte, MaxWrapped+1), 1, other); !errors.Is(err, ErrWrapped) {
		t.Errorf("too long: %v", err)
	}
	if _, err := Unwrap(nil, 1); !errors.Is(err, ErrNoIdentity) {
		t.Errorf("no identities: %v", err)
	}
}

func TestWrongPassphrase(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "key")
	run(t, nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "open sesame", "-f", path)
	word := "wrong"
	ids, err := ReadIdentities(path, func(string) ([]byte, error) { return []byte(word), nil })
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := Wrap([]byte("x"), ids[0].Recipient())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Unwrap(wrapped, 1, ids...); !errors.Is(err, ErrWrong) {
		t.Errorf("wrong passphrase: %v", err)
	}
	word = "open sesame"
	if _, err := Unwrap(wrapped, 1, ids...); err != nil {
		t.Errorf("right after a wrong one: %v", err)
	}
	if _, err := ReadIdentities(path, nil); !errors.Is(err, ErrPassphrase) {
		t.Errorf("nobody to ask: %v", err)
	}
}

func TestWrapTampered(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	ids, err := ParseIdentities([]byte(id.String()))
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := Wrap([]byte("payload"), ids[0].Recipient())
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(wrapped) * 8 {
		wrapped[i/8] ^= 1 << (i % 8)
		if _, err := Unwrap(wrapped, 7, ids...); !errors.Is(err, ErrWrapped) && !errors.Is(err, ErrNoIdentity) {
			t.Fatalf("bit %d: %v", i, err)
		}
		wrapped[i/8] ^= 1 << (i % 8)
	}
}

func TestRecipientRefusals(t *testing.T) {
	dir := t.TempDir()
	pub := func(args ...string) string {
		path := filepath.Join(dir, strings.Join(args, "-"))
		run(t, nil, "ssh-keygen", append([]string{"-q", "-N", "", "-f", path}, args...)...)
		data, err := os.ReadFile(path + ".pub")
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	sk := SSHKeyLine(softKey{make([]byte, 64), 1}.PublicKey())
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	good, other := id.Recipient().String(), "x"
	if strings.HasSuffix(good, other) {
		other = "q"
	}
	for _, c := range []struct{ line, says string }{
		{"", "neither"},
		{"hello", "neither"},
		{pub("-t", "ecdsa"), "ECDSA"},
		{sk, "security key signs but cannot decrypt"},
		{pub("-t", "rsa", "-b", "1024"), "2048"},
		{id.String(), "secret key"},
		{good[:len(good)-1] + other, ""},
		{strings.ToUpper(good), "neither"},
		{good + " comment", ""},
		{good + "\n" + good, "more than one line"},
		{"age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t", "plugin"},
		{"ssh-ed25519 AAAA", "SSH"},
	} {
		_, err := ParseRecipient(c.line)
		if !errors.Is(err, ErrRecipient) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.40q: %v, want %q in it", c.line, err, c.says)
		}
		if err != nil && strings.Contains(err.Error(), "AGE-SECRET-KEY-1") {
			t.Errorf("secret in error: %v", err)
		}
	}
	all, err := ParseRecipients([]byte("# me\n\n" + good + "\r\n" + pub("-t", "ed25519")))
	if err != nil || len(all) != 2 || all[1].Comment() == "" {
		t.Errorf("file of recipients: %v, %v", all, err)
	}
	for _, bad := range []string{"", "# none\n", good + "\nhello\n"} {
		if _, err := ParseRecipients([]byte(bad)); !errors.Is(err, ErrRecipient) {
			t.Errorf("file %q: %v", bad, err)
		}
	}
}

func TestIdentityRefusals(t *testing.T) {
	dir := t.TempDir()
	ec := filepath.Join(dir, "ec")
	run(t, nil, "ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", ec)
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string { return write0600(t, filepath.Join(dir, name), []byte(text)) }
	for _, c := range []struct {
		path string
		want error
	}{
		{file("empty", ""), ErrIdentity},
		{file("comment", "# only\n"), ErrIdentity},
		{file("public", id.Recipient().String()), ErrPublic},
		{file("damaged", id.String()[:70]), ErrIdentity},
		{file("plugin", "AGE-PLUGIN-YUBIKEY-1QQQ"), ErrIdentity},
		{file("encrypted", "age-encryption.org/v1\n"), ErrIdentity},
		{file("armored", "-----BEGIN AGE ENCRYPTED FILE-----\n"), ErrIdentity},
		{file("pem", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"), ErrIdentity},
		{ec, ErrRecipient},
		{filepath.Join(dir, "none"), fs.ErrNotExist},
	} {
		_, err := ReadIdentities(c.path, nil)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", filepath.Base(c.path), err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), id.String()[16:60]) {
			t.Errorf("secret in error: %v", err)
		}
	}
}

func TestGeneratedFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "identity.age")
	if _, err := WriteIdentity(path, time.Now()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := WriteIdentity(path, time.Now()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if _, err := WriteSigningKey(path, ""); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Error("a key was overwritten")
	}
	if _, err := WriteSigningKey(filepath.Join(dir, "k"), "two\nlines"); err == nil {
		t.Error("a comment of two lines")
	}
	if _, err := WriteSigningKey(filepath.Join(dir, "no", "k"), ""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := WriteSigningKey(filepath.Join(dir, "k"), "one line"); err != nil {
		t.Fatal(err)
	}
	want := []struct {
		name string
		mode fs.FileMode
	}{{"identity.age", 0o600}, {"k", 0o600}, {"k.pub", 0o644}}
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != len(want) {
		t.Fatalf("%v, %v", all, err)
	}
	for i, e := range all {
		st, err := e.Info()
		if err != nil || e.Name() != want[i].name || st.Mode().Perm() != want[i].mode {
			t.Errorf("%s %v, want %s %v: %v", e.Name(), st.Mode(), want[i].name, want[i].mode, err)
		}
	}
}
