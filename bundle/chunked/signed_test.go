package chunked

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

func testSigner(t testing.TB) keys.Signer {
	t.Helper()
	s, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func trustIn(s keys.Signer, principals string) *keys.AllowedSigners {
	return keys.NewAllowedSigners(keys.AllowedSigner{Principals: principals, Key: s.Public()})
}

func signed(t testing.TB, d document, s keys.Signer) []byte {
	t.Helper()
	b, err := sign(t.Context(), d, s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestStockVerify does to each kind of document what SPEC.md §7 tells people
// to do without this program.
func TestStockVerify(t *testing.T) {
	s, other := testSigner(t), testSigner(t)
	dir := t.TempDir()
	for _, c := range []struct {
		d         signedDocument
		principal string
	}{
		{testManifest(), "machine-1"},
		{testHead(), "machine-1"},
		{testTrace(), "machine-1"},
		{domainDoc(t, Secret{1}, testIdentity(t)), "default"},
	} {
		write := func(name string, b []byte) {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("NAME", signed(t, c.d, s))
		write("allowed_signers", []byte(trustIn(s, c.principal).Entries()[0].String()+"\n"))
		write("others", []byte(trustIn(other, c.principal).Entries()[0].String()+"\n"))
		verify := func(allowed, principal, namespace string) error {
			cmd := exec.Command("sh", "-ec", `sed '/^-----BEGIN SSH SIGNATURE-----$/,$d' NAME >m.json
sed -n '/^-----BEGIN SSH SIGNATURE-----$/,$p' NAME >m.json.sig
ssh-keygen -Y verify -f "$1" -I "$2" -n "$3" -s m.json.sig <m.json`, "sh", allowed, principal, namespace)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}
		if err := verify("allowed_signers", c.principal, c.d.format()); err != nil {
			t.Errorf("%s: ssh-keygen refuses: %v", c.d.format(), err)
		}
		for _, bad := range [][3]string{
			{"allowed_signers", "machine-2", c.d.format()},
			{"allowed_signers", c.principal, "instar-other"},
			{"others", c.principal, c.d.format()},
		} {
			if verify(bad[0], bad[1], bad[2]) == nil {
				t.Errorf("%s: ssh-keygen accepts %q", c.d.format(), bad)
			}
		}
	}
}

func TestVerifyOrder(t *testing.T) {
	s, other := testSigner(t), testSigner(t)
	trust := trustIn(s, "machine-1")
	good := signed(t, testManifest(), s)
	m, v, err := OpenManifest(good, trust, "machine-1")
	if err != nil || m.Sequence != 7 || v.Principal != "machine-1" || keys.Fingerprint(v.Key) != keys.Fingerprint(s.Public()) {
		t.Fatalf("%+v, %v", v, err)
	}
	doc, sig, err := Split(good)
	if err != nil || !bytes.Equal(v.Doc, doc) {
		t.Fatal(err)
	}
	if u, err := ReadManifestUnverified(good); err != nil || u.Name != m.Name {
		t.Fatal(err)
	}
	resign := func(doc string, s keys.Signer) []byte {
		b, err := Sign(t.Context(), []byte(doc), NamespaceImage, s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	text := string(doc)
	otherName := strings.Replace(text, "machine-1", "machine-2", 1)
	for _, c := range []struct {
		name   string
		object []byte
		want   error
	}{
		{"nothing", nil, keys.ErrSignature},
		{"no signature", doc, keys.ErrSignature},
		{"signature alone", sig, keys.ErrSignature},
		{"trailing byte", append(bytes.Clone(good), '\n'), keys.ErrSignature},
		{"cut", good[:len(good)-1], keys.ErrSignature},
		{"two signatures", append(bytes.Clone(good), sig...), keys.ErrSignature},
		{"document twice", append(bytes.Clone(doc), good...), keys.ErrSignature},
		{"a signed document signed again", resign(string(good), s), ErrFormat},
		{"CRLF", bytes.ReplaceAll(good, []byte("\n"), []byte("\r\n")), keys.ErrSignature},
		{"CRLF signed", resign(strings.ReplaceAll(text, "\n", "\r\n"), s), ErrFormat},
		{"BOM", append([]byte("\ufeff"), good...), keys.ErrSignature},
		{"BOM signed", resign("\ufeff"+text, s), ErrFormat},
		{"other key", resign(text, other), keys.ErrUntrusted},
		{"other name", resign(otherName, s), ErrOther},
		{"document changed", append([]byte(otherName), sig...), keys.ErrSignature},
		{"unknown key", resign(strings.Replace(text, `  "tool"`, `  "x": 1,`+"\n"+`  "tool"`, 1), s), ErrFormat},
		{"doubled key", resign(strings.Replace(text, `  "data"`, `  "data": 1,`+"\n"+`  "data"`, 1), s), ErrFormat},
		{"key spelt otherwise", resign(strings.Replace(text, `"tool"`, `"Tool"`, 1), s), ErrFormat},
		{"number spelt otherwise", resign(strings.Replace(text, `"sequence": 7`, `"sequence": 7.0`, 1), s), ErrFormat},
		{"string spelt otherwise", resign(strings.Replace(text, "machine-1", `machine\u002d1`, 1), s), ErrFormat},
		{"later version", resign(strings.Replace(text, `"version": 1,`, `"version": 2,`, 1), s), ErrVersion},
		{"a head as manifest", signed(t, testHead(), s), keys.ErrNamespace},
		{"too long", make([]byte, MaxSigned+1), ErrLimit},
	} {
		if _, _, err := OpenManifest(c.object, trust, "machine-1"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if _, _, err := OpenManifest(good, trust, "machine-2"); !errors.Is(err, keys.ErrUntrusted) {
		t.Errorf("another principal: %v", err)
	}
	limited := keys.NewAllowedSigners(keys.AllowedSigner{Principals: "*", Key: s.Public(), ValidBefore: created.Add(-time.Second)})
	if _, _, err := OpenManifest(good, limited, "machine-1"); !errors.Is(err, keys.ErrExpired) {
		t.Errorf("created after the key's time: %v", err)
	}
	if _, _, err := OpenManifest(good, keys.NewAllowedSigners(keys.AllowedSigner{
		Principals: "*", Key: s.Public(), ValidAfter: created, ValidBefore: created,
	}), "machine-1"); err != nil {
		t.Errorf("created in the key's only second: %v", err)
	}
	trace := signed(t, testTrace(), s)
	if _, _, err := OpenTrace(trace, trust, "machine-1", nameN(20)); err != nil {
		t.Error(err)
	}
	if _, _, err := OpenTrace(trace, trust, "machine-1", nameN(21)); !errors.Is(err, ErrOther) {
		t.Errorf("trace of another manifest: %v", err)
	}
}
