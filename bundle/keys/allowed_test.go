package keys

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestAllowedSigners asks ssh-keygen and this package the same questions.
func TestAllowedSigners(t *testing.T) {
	dir := t.TempDir()
	s, err := WriteSigningKey(filepath.Join(dir, "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	o, err := WriteSigningKey(filepath.Join(dir, "other"), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("TZ", "UTC")
	sig, err := s.Sign(t.Context(), namespace, message)
	if err != nil {
		t.Fatal(err)
	}
	write0600(t, filepath.Join(dir, "sig"), sig)
	key, other := SSHKeyLine(s.Public()), SSHKeyLine(o.Public())
	short := filepath.Join(dir, "short")
	run(t, nil, "ssh-keygen", "-q", "-t", "rsa", "-b", "1024", "-N", "", "-C", "", "-f", short)
	weak, err := os.ReadFile(short + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	blob := strings.Fields(key)[1]

	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC) // of the signature
	// ok: both accept. Else this package's reason, and ssh-keygen refuses; but if
	// stricter is set it accepts.
	for _, c := range []struct {
		name, principal, file string
		want                  error
		stricter              bool
	}{
		{"plain", "m", "m " + key, nil, false},
		{"comment and blanks", "m", "\n# hello\n  # hello\n\t m\t " + key + "  a comment of words \n", nil, false},
		{"CRLF", "m", "# x\r\n\r\nm " + key + "\r\n", nil, false},
		{"several lines", "m", "x " + key + "\nm " + other + "\nm " + key + "\n", nil, false},
		{"list", "m", "a,b,m,c " + key, nil, false},
		{"quoted list", "m", `"a,m" ` + key, nil, false},
		{"star", "machine-7", "machine-* " + key, nil, false},
		{"question mark", "machine-7", "machine-? " + key, nil, false},
		{"stars", "a-b-c", "*-*-* " + key, nil, false},
		{"star for nothing", "m", "m* " + key, nil, false},
		{"forbidden after", "m9", "m*,!m9 " + key, ErrUntrusted, false},
		{"forbidden before", "m9", "!m9,m* " + key, ErrUntrusted, false},
		{"another forbidden", "m8", "!m9,m* " + key, nil, false},
		{"only forbidden", "m", "!x " + key, ErrUntrusted, false},
		{"case", "M", "m " + key, ErrUntrusted, false},
		{"prefix", "mm", "m " + key, ErrUntrusted, false},
		{"other name", "m", "x " + key, ErrUntrusted, false},
		{"other key", "m", "m " + other, ErrUntrusted, false},
		{"empty", "m", "", ErrUntrusted, false},
		{"namespace", "m", `m namespaces="instar-image" ` + key, nil, false},
		{"namespaces", "m", `m namespaces="file,instar-*" ` + key, nil, false},
		{"other namespace", "m", `m namespaces="file" ` + key, ErrUntrusted, false},
		{"namespace forbidden", "m", `m namespaces="*,!instar-image" ` + key, ErrUntrusted, false},
		{"keyword in capitals", "m", `m NameSpaces="instar-image" ` + key, nil, false},
		{"after", "m", `m valid-after="20261122" ` + key, nil, false},
		{"after this second", "m", `m valid-after="20261122120000Z" ` + key, nil, false},
		{"after the next second", "m", `m valid-after="20261122120001Z" ` + key, ErrExpired, false},
		{"before this second", "m", `m valid-before="20261122120000" ` + key, nil, false},
		{"before this minute", "m", `m valid-before="202611221200Z" ` + key, nil, false},
		{"before the last second", "m", `m valid-before="20261122115959" ` + key, ErrExpired, false},
		{"all options", "m", `m valid-before="20300101Z",namespaces="instar-image",valid-after="20200101Z" ` + key, nil, false},
		{"expired, and again without", "m", `m valid-before="20200101" ` + key + "\nm " + key, nil, false},
		{"wrong namespace, and again", "m", `m namespaces="x" ` + key + "\nm namespaces=\"instar-image\" " + key, nil, false},
		{"quote within", "m", `m namespaces="a\"b,instar-image" ` + key, nil, false},
		{"blank within", "m", `m namespaces="a b,instar-image" ` + key, nil, false},

		{"authority", "m", "m cert-authority " + key, ErrAllowedSigners, false},
		{"namespaces twice", "m", `m namespaces="instar-image",namespaces="x" ` + key, ErrAllowedSigners, false},
		{"unknown option", "m", "m no-touch " + key, ErrAllowedSigners, false},
		{"no quotes", "m", "m namespaces=instar-image " + key, ErrAllowedSigners, false},
		{"no closing quote", "m", `m namespaces="instar-image ` + key, ErrAllowedSigners, false},
		{"comma behind", "m", `m namespaces="instar-image", ` + key, ErrAllowedSigners, false},
		{"not a time", "m", `m valid-after="yesterday" ` + key, ErrAllowedSigners, false},
		{"month 13", "m", `m valid-after="20261301" ` + key, ErrAllowedSigners, false},
		{"before is after after", "m", `m valid-after="20270101",valid-before="20260101" ` + key, ErrAllowedSigners, false},
		{"only principals", "m", "m", ErrAllowedSigners, false},
		{"no key", "m", `m namespaces="instar-image"`, ErrAllowedSigners, false},
		{"kind without key", "m", "m ssh-ed25519", ErrAllowedSigners, false},
		{"wrong kind", "m", "m ssh-rsa " + blob, ErrAllowedSigners, false},
		{"key cut", "m", "m ssh-ed25519 " + blob[:40], ErrAllowedSigners, false},
		{"quote not closed", "m", `"m ` + key, ErrAllowedSigners, false},
		{"key without principals", "m", key, ErrAllowedSigners, false},

		// Where this package wants more than ssh-keygen does.
		{"bad line for others", "m", "x cert-authority " + key + "\nm " + key, ErrAllowedSigners, true},
		{"bad line behind", "m", "m " + key + "\nm hello\n", ErrAllowedSigners, true},
		{"empty pattern", "m", "m, " + key, ErrAllowedSigners, true},
		{"weak key for others", "m", "x " + string(weak) + "\nm " + key, ErrAllowedSigners, true},
		{"comma in front", "m", `m ,namespaces="instar-image" ` + key, ErrAllowedSigners, true},
		{"30 February", "m", `m valid-after="20260230" ` + key, ErrAllowedSigners, true},
		{"not UTF-8", "m", "# \xff\nm " + key, ErrAllowedSigners, true},
		{"NUL", "m", "m " + key + " \x00", ErrAllowedSigners, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			stock := exec.Command("ssh-keygen", "-Y", "verify", "-f", write0600(t, filepath.Join(dir, "allowed"), []byte(c.file)),
				"-I", c.principal, "-n", namespace, "-s", filepath.Join(dir, "sig"), "-O", "verify-time=20261122120000Z")
			stock.Stdin = bytes.NewReader(message)
			out, err := stock.CombinedOutput()
			if accepts := c.want == nil || c.stricter; (err == nil) != accepts {
				t.Errorf("ssh-keygen: %v, %s", err, out)
			}
			if got := allows([]byte(c.file), s, c.principal, at); !errors.Is(got, c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

// allows is what this package says where ssh-keygen -Y verify is asked.
func allows(file []byte, s Signer, principal string, at time.Time) error {
	a, err := ParseAllowedSigners(file)
	if err != nil {
		return err
	}
	g, err := a.Check(s.Public(), principal, namespace)
	if err != nil {
		return err
	}
	return g.At(at)
}

func TestLocalTime(t *testing.T) {
	a := time.Date(2026, 11, 22, 12, 0, 0, 0, time.Local)
	if got, err := parseStamp("202611221200"); err != nil || !got.Equal(a) {
		t.Errorf("%v, %v", got, err)
	}
}

// TestPatterns compares with the obvious recursive definition.
func TestPatterns(t *testing.T) {
	var match func(s, p string) bool
	match = func(s, p string) bool {
		switch {
		case p == "":
			return s == ""
		case p[0] == '*':
			return match(s, p[1:]) || s != "" && match(s[1:], p)
		}
		return s != "" && (p[0] == '?' || p[0] == s[0]) && match(s[1:], p[1:])
	}
	r := rand.New(rand.NewPCG(1, 2))
	word := func(letters string, n int) string {
		b := make([]byte, r.IntN(n))
		for i := range b {
			b[i] = letters[r.IntN(len(letters))]
		}
		return string(b)
	}
	yes := 0
	for range 20000 {
		s, p := word("ab", 8), word("ab*?", 6)
		want := match(s, p)
		if matchPattern(s, p) != want {
			t.Fatalf("%q and pattern %q: not %v", s, p, want)
		}
		if want {
			yes++
		}
	}
	if yes < 1000 {
		t.Errorf("only %d matches", yes)
	}
	if matchPattern(strings.Repeat("a", 10000), strings.Repeat("*a", 5000)+"b") { // must end
		t.Error("matches")
	}
}

func TestAllowedSignerLine(t *testing.T) {
	s, err := WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []AllowedSigner{
		{Principals: "*", Key: s.Public()},
		{Principals: "a b,!c", Key: s.Public(), Comment: "who and where"},
		{Principals: "m-?", Namespaces: `instar-*,"x y"`, ValidAfter: time.Unix(1790000000, 0), ValidBefore: time.Unix(1890000000, 0), Key: s.Public()},
	} {
		a, err := ParseAllowedSigners([]byte(e.String()))
		if err != nil {
			t.Fatalf("%s: %v", e, err)
		}
		got := a.Entries()[0]
		if got.String() != e.String() || !got.ValidAfter.Equal(e.ValidAfter) || got.Principals != e.Principals || got.Namespaces != e.Namespaces {
			t.Errorf("%s\nis read as\n%s", e, got)
		}
		if !a.Knows(Fingerprint(s.Public()), strings.NewReplacer("?", "1", "*", "m", "!c", "c").Replace(strings.Split(e.Principals, ",")[0]), "instar-head") {
			t.Errorf("%s: its own key is unknown", e)
		}
	}
	if NewAllowedSigners().Knows(Fingerprint(s.Public()), "m", "n") {
		t.Error("nobody knows somebody")
	}
}

func FuzzAllowedSigners(f *testing.F) {
	s, err := WriteSigningKey(filepath.Join(f.TempDir(), "key"), "")
	if err != nil {
		f.Fatal(err)
	}
	key := SSHKeyLine(s.Public())
	for _, line := range []string{
		"m " + key, `"a b" namespaces="x",valid-after="20260101Z" ` + key + " c", "# x\n\n!a,b* " + key, `m valid-before="202601010000" ` + key, `m cert-authority ` + key,
	} {
		f.Add([]byte(line), "m")
	}
	f.Fuzz(func(t *testing.T, data []byte, principal string) {
		a, err := ParseAllowedSigners(data)
		if err != nil {
			if !errors.Is(err, ErrAllowedSigners) {
				t.Fatal(err)
			}
			return
		}
		var again strings.Builder
		for _, e := range a.Entries() {
			fmt.Fprintln(&again, e)
		}
		b, err := ParseAllowedSigners([]byte(again.String()))
		if err != nil {
			t.Fatalf("what was read cannot be written and read: %v\n%s", err, again.String())
		}
		_, ea := a.Check(s.Public(), principal, "n")
		_, eb := b.Check(s.Public(), principal, "n")
		if (ea == nil) != (eb == nil) || len(a.Entries()) != len(b.Entries()) {
			t.Fatalf("read again, it says something else: %v, %v", ea, eb)
		}
	})
}

func FuzzSSHKey(f *testing.F) {
	s, err := WriteSigningKey(filepath.Join(f.TempDir(), "key"), "")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(SSHKeyLine(s.Public()) + " comment")
	f.Add("sk-ssh-ed25519@openssh.com AAAA")
	f.Fuzz(func(t *testing.T, line string) {
		key, comment, err := ParseSSHKey(line)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		want := strings.Join(strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })[:2], " ")
		if SSHKeyLine(key) != want || !strings.HasSuffix(strings.TrimRight(line, " \t"), comment) {
			t.Fatalf("%q is read as %q, %q", line, SSHKeyLine(key), comment)
		}
	})
}

func FuzzRecipient(f *testing.F) {
	id, err := WriteIdentity(filepath.Join(f.TempDir(), "id"), time.Unix(1, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(id.Recipient().String())
	f.Add("age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p")
	f.Add("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMQiWXjzNRpfcufgIYP1OCUKss/U/Csex5JM3GFKvCgo x")
	f.Fuzz(func(t *testing.T, line string) {
		r, err := ParseRecipient(line)
		if err != nil {
			if !errors.Is(err, ErrRecipient) {
				t.Fatal(err)
			}
			return
		}
		again, err := ParseRecipient(r.String())
		if err != nil || again.String() != r.String() || !strings.Contains(line, strings.Fields(r.String())[0]) {
			t.Fatalf("%q is read as %q, and that as %v", line, r, err)
		}
	})
}

func FuzzSignature(f *testing.F) {
	s, err := WriteSigningKey(filepath.Join(f.TempDir(), "key"), "")
	if err != nil {
		f.Fatal(err)
	}
	good, err := s.Sign(f.Context(), namespace, message)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseSignature(data)
		if err != nil {
			if !errors.Is(err, ErrSignature) && !errors.Is(err, ErrKeyType) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(armor(p.parsed.Marshal()), data) {
			t.Fatal("two forms of one signature")
		}
		own := Fingerprint(p.Key()) == Fingerprint(s.Public()) // of this process, not of the seed's
		if own && p.Verify(message, namespace) == nil && !bytes.Equal(data, good) {
			t.Fatal("forged")
		}
	})
}
