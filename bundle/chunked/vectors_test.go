package chunked

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
)

var updateVectors = flag.Bool("update", false, "write testdata/vectors anew")

const vectorFolder = "testdata/vectors"

// vector is one file of the public set; testdata/vectors/README.md has its
// format.
type vector struct {
	file   string
	fields [][2]string
	body   []byte
}

func (v *vector) all(key string) (values []string) {
	for _, f := range v.fields {
		if f[0] == key {
			values = append(values, f[1])
		}
	}
	return values
}

func (v *vector) get(key string) string {
	if all := v.all(key); len(all) > 0 {
		return all[0]
	}
	return ""
}

func (v *vector) encode() []byte {
	var b bytes.Buffer
	for _, f := range v.fields {
		fmt.Fprintf(&b, "%s: %s\n", f[0], f[1])
	}
	b.WriteByte('\n')
	b.Write(v.body)
	return b.Bytes()
}

func readVectors(t testing.TB) []*vector {
	t.Helper()
	files, err := filepath.Glob(vectorFolder + "/*.vector")
	if err != nil {
		t.Fatal(err)
	}
	var all []*vector
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		head, body, ok := bytes.Cut(data, []byte("\n\n"))
		if !ok {
			t.Fatalf("%s: no empty line", file)
		}
		v := &vector{file: strings.TrimSuffix(filepath.Base(file), ".vector"), body: body}
		for line := range strings.SplitSeq(string(head), "\n") {
			key, value, ok := strings.Cut(line, ": ")
			if !ok {
				t.Fatalf("%s: line %q", file, line)
			}
			v.fields = append(v.fields, [2]string{key, value})
		}
		all = append(all, v)
	}
	return all
}

func (v *vector) number(t testing.TB, key string) int64 {
	t.Helper()
	s := v.get(key)
	if s == "" {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func (v *vector) bytes32(t testing.TB, key string) (a [32]byte) {
	t.Helper()
	b, err := hex.DecodeString(v.get(key))
	if err != nil || len(b) != len(a) {
		t.Fatalf("%s %q: %v", key, v.get(key), err)
	}
	copy(a[:], b)
	return a
}

func (v *vector) time(t testing.TB, key string) time.Time {
	t.Helper()
	s := v.get(key)
	if s == "" {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func (v *vector) trust(t testing.TB) *keys.AllowedSigners {
	t.Helper()
	a, err := keys.ParseAllowedSigners([]byte(strings.Join(v.all("signers"), "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// identities reads the private keys that a vector names. Git does not keep
// their mode.
func (v *vector) identities(t testing.TB) (ids []*keys.Identity) {
	t.Helper()
	for _, name := range v.all("identity") {
		id, err := keys.ReadIdentities(secretFile(t, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id...)
	}
	return ids
}

func secretFile(t testing.TB, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(vectorFolder, "keys", name))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// classes are the words for "expect", and the errors they mean.
func classes() []struct {
	word string
	err  error
} {
	return []struct {
		word string
		err  error
	}{
		{"allowed-signers", keys.ErrAllowedSigners},
		{"corrupt", ErrCorrupt},
		{"malformed", ErrFormat},
		{"version", ErrVersion},
		{"foreign", ErrForeign},
		{"limit", ErrLimit},
		{"other", ErrOther},
		{"rollback", ErrRollback},
		{"forked", ErrForked},
		{"stale", ErrStale},
		{"signature", keys.ErrSignature},
		{"key-type", keys.ErrKeyType},
		{"namespace", keys.ErrNamespace},
		{"untrusted", keys.ErrUntrusted},
		{"expired", keys.ErrExpired},
		{"no-identity", keys.ErrNoIdentity},
		{"wrapped", keys.ErrWrapped},
		{"recipient", keys.ErrRecipient},
	}
}

// class is the one class that err is of.
func class(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return "ok"
	}
	var of []string
	for _, c := range classes() {
		if errors.Is(err, c.err) {
			of = append(of, c.word)
		}
	}
	if len(of) == 0 || len(of) > 1 && of[0] != "allowed-signers" {
		t.Errorf("%v is of classes %q", err, of)
		return "?"
	}
	return of[0]
}

// TestVectors: each vector gives exactly the class it expects.
func TestVectors(t *testing.T) {
	if *updateVectors {
		writeVectors(t)
	}
	all := readVectors(t)
	if len(all) < 200 {
		t.Errorf("%d vectors", len(all))
	}
	count := map[string]int{}
	for _, v := range all {
		count[v.get("kind")+" "+v.get("expect")]++
		t.Run(v.file, func(t *testing.T) {
			err := v.check(t)
			if got := class(t, err); got != v.get("expect") {
				t.Errorf("%s, expected is %s: %v", got, v.get("expect"), err)
			}
		})
	}
	for _, kind := range vectorKinds() {
		if count[kind+" ok"] == 0 {
			t.Errorf("no good vector of kind %s", kind)
		}
	}
}

func vectorKinds() []string {
	return []string{
		"seal", "chunk", "pack", "footer", "segment", "root", "moved", "manifest", "head", "domain", "trace", "keys",
		"condemned", "run", "signature", "allowed-signers", "recipient",
	}
}

// check reads the vector's object as a reader would.
func (v *vector) check(t *testing.T) error {
	body := bytes.Clone(v.body) // some are opened in place
	switch kind := v.get("kind"); kind {
	case "seal":
		u, err := newUnpacker()
		if err != nil {
			t.Fatal(err)
		}
		defer u.dec.Close()
		p, err := u.openExact("vector", Key(v.bytes32(t, "key")), Type(v.get("type")[0]), body, int(v.number(t, "size")), nil)
		return v.same(t, p, err)
	case "chunk":
		p, err := OpenChunk(Chunk{
			Digest: Digest(v.bytes32(t, "digest")), Key: Key(v.bytes32(t, "key")), Size: int(v.number(t, "size")),
			At: Location{Offset: packHeaderSize, Sealed: len(body)},
		}, body)
		return v.same(t, p, err)
	case "pack":
		f, err := Secret(v.bytes32(t, "secret")).Domain().OpenPack(Name(v.bytes32(t, "name")), body)
		return v.footer(t, f, err)
	case "footer":
		n := Name(v.bytes32(t, "name"))
		f, err := Secret(v.bytes32(t, "secret")).Domain().ReadFooter(t.Context(), packMap{n: body}, n, v.number(t, "size"))
		return v.footer(t, f, err)
	case "segment":
		s, err := OpenSegment(SegmentRef{
			Length: v.number(t, "length"), Name: Name(v.bytes32(t, "name")), Key: Key(v.bytes32(t, "key")),
			Plain: int32(v.number(t, "plain")), Stored: int32(v.number(t, "stored")),
		}, body)
		if err == nil {
			v.counts(t, "packs", len(s.Packs))
			v.counts(t, "chunks", len(s.Chunks))
			v.counts(t, "extents", len(s.Extents))
		}
		return err
	case "root":
		r, err := OpenRoot(Name(v.bytes32(t, "name")), Key(v.bytes32(t, "key")), body)
		if err == nil {
			v.counts(t, "streams", len(r.Streams))
		}
		return err
	case "moved":
		_, err := DecodeMoved(Name(v.bytes32(t, "name")), body)
		return err
	case "manifest", "head", "domain", "trace":
		return v.signed(t, kind, body)
	case "keys":
		k, err := ParseKeysObject(body)
		if err != nil || v.get("identity") == "" {
			return err
		}
		key, err := k.IndexKey(Name(v.bytes32(t, "root")), v.identities(t)...)
		if err == nil && key != Key(v.bytes32(t, "key")) {
			t.Error("another index key")
		}
		return err
	case "condemned":
		_, err := ParseCondemned(body)
		return err
	case "run":
		_, err := ParseRun(body)
		return err
	case "signature":
		s, err := keys.ParseSignature(body)
		if err != nil {
			return err
		}
		return s.Verify([]byte(v.get("message")), v.get("namespace"))
	case "allowed-signers":
		a, err := keys.ParseAllowedSigners(body)
		if err != nil {
			return err
		}
		key, _, err := keys.ParseSSHKey(v.get("key"))
		if err != nil {
			t.Fatal(err)
		}
		g, err := a.Check(key, v.get("principal"), v.get("namespace"))
		if err != nil {
			return err
		}
		return g.At(v.time(t, "time"))
	case "recipient":
		_, err := keys.ParseRecipient(string(body))
		return err
	default:
		t.Fatalf("kind %q", kind)
		return nil
	}
}

func (v *vector) signed(t *testing.T, kind string, body []byte) error {
	principal, trust := v.get("principal"), v.trust(t)
	switch kind {
	case "manifest":
		_, _, err := OpenManifest(body, trust, principal)
		return err
	case "trace":
		_, _, err := OpenTrace(body, trust, principal, Name(v.bytes32(t, "manifest")))
		return err
	case "domain":
		d, _, err := OpenDomain(body, trust, principal)
		if err != nil || v.get("identity") == "" {
			return err
		}
		s, err := d.Secret(v.identities(t)...)
		if err == nil && s != Secret(v.bytes32(t, "secret")) {
			t.Error("another secret")
		}
		return err
	}
	h, _, err := OpenHead(body, trust, principal)
	if err != nil {
		return err
	}
	f := Freshness{AtLeast: v.number(t, "at-least"), MaxAge: time.Duration(v.number(t, "max-age")) * time.Second, Now: v.time(t, "now")}
	for _, line := range v.all("seen") {
		part := strings.SplitN(line, " ", 3)
		n, err := strconv.ParseInt(part[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seen := Seen{Sequence: n, Signer: part[2]}
		if part[1] != "deleted" {
			if seen.Manifest, err = ParseName(part[1]); err != nil {
				t.Fatal(err)
			}
		}
		f.Seen = append(f.Seen, seen)
	}
	f.Seen = Current(f.Seen, trust, principal)
	return h.CheckFresh(f)
}

// same makes sure that a good vector has the plaintext it says.
func (v *vector) same(t *testing.T, p []byte, err error) error {
	if err == nil && v.get("plain") != fmt.Sprintf("%x", sha256.Sum256(p)) {
		t.Errorf("the plaintext has SHA-256 %x, not %s", sha256.Sum256(p), v.get("plain"))
	}
	return err
}

func (v *vector) counts(t *testing.T, what string, n int) {
	if int64(n) != v.number(t, what) {
		t.Errorf("%d %s, not %s", n, what, v.get(what))
	}
}

func (v *vector) footer(t *testing.T, f *Footer, err error) error {
	if err == nil {
		v.counts(t, "chunks", len(f.Entries))
		if own := f.OwnedBy(Key(v.bytes32(t, "owner"))); fmt.Sprint(own) != v.get("own") {
			t.Errorf("own is %v, not %s", own, v.get("own"))
		}
	}
	return err
}

// TestVectorsAlone: no vector is there twice, and the generator makes as many.
func TestVectorsAlone(t *testing.T) {
	seen := map[string]string{}
	for _, v := range readVectors(t) {
		fields := slices.DeleteFunc(slices.Clone(v.fields), func(f [2]string) bool { return f[0] == "comment" })
		key := string((&vector{fields: fields, body: v.body}).encode())
		if seen[key] != "" {
			t.Errorf("%s and %s are the same", v.file, seen[key])
		}
		seen[key] = v.file
	}
}

// TestVectorsStock asks programs that people have: sed and ssh-keygen about
// signatures, Python about the form of documents, age about wrapped keys.
func TestVectorsStock(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sh := func(script string, args ...string) ([]byte, error) {
		cmd := exec.Command("sh", append([]string{"-ec", script, "sh"}, args...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "TZ=UTC", "PYTHONIOENCODING=utf-8")
		return cmd.CombinedOutput()
	}
	asked := map[string]int{}
	for _, v := range readVectors(t) {
		namespace := map[string]string{"manifest": NamespaceImage, "head": NamespaceHead, "domain": NamespaceDomain, "trace": NamespaceTrace}[v.get("kind")]
		write("NAME", v.body)
		if v.get("ssh-keygen") != "" {
			write("allowed_signers", []byte(strings.Join(v.all("signers"), "\n")+"\n"))
			at := v.time(t, "created").Format("20060102150405") + "Z"
			out, err := sh(`rm -f m m.sig
sed '/^-----BEGIN SSH SIGNATURE-----$/,$d' NAME >m
sed -n '/^-----BEGIN SSH SIGNATURE-----$/,$p' NAME >m.sig
exec ssh-keygen -Y verify -f allowed_signers -I "$1" -n "$2" -O verify-time="$3" -s m.sig <m`, v.get("principal"), namespace, at)
			if got := map[bool]string{true: "accepts", false: "refuses"}[err == nil]; got != v.get("ssh-keygen") {
				t.Errorf("%s: ssh-keygen %s it, expected is %s: %s", v.file, got, v.get("ssh-keygen"), out)
			}
			if v.get("expect") == "ok" && v.get("ssh-keygen") != "accepts" {
				t.Errorf("%s: accepted here, but not by ssh-keygen", v.file)
			}
			asked[v.get("ssh-keygen")]++
		}
		if v.get("expect") == "ok" && (namespace != "" || slices.Contains([]string{"keys", "condemned", "run"}, v.get("kind"))) {
			doc := v.body
			if namespace != "" {
				doc, _, _ = Split(v.body)
			}
			write(v.file+".json", doc)
			asked["python"]++
		}
		if id := v.get("age"); id != "" {
			out, err := sh(`python3 -c 'import json, sys, base64
d = json.loads(open("NAME", encoding="utf-8").read().split("-----BEGIN")[0])
sys.stdout.buffer.write(base64.b64decode((d.get("recipients") or d.get("creators"))[int(sys.argv[1])]["wrapped"]))' "$2" | age -d -i "$1" | tail -c 32 | xxd -p -c 32`,
				secretFile(t, id), v.get("entry"))
			want := v.get("key") + v.get("secret")
			if err != nil || strings.TrimSpace(string(out)) != want {
				t.Errorf("%s: age -d: %v %s, not %s", v.file, err, out, want)
			}
			asked["age"]++
		}
	}
	if out, err := sh(`python3 -c 'import glob, json
for name in glob.glob("*.json"):
    text = open(name, encoding="utf-8", newline="").read()
    if json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n" != text:
        raise SystemExit(name + " is written otherwise")'`); err != nil {
		t.Errorf("Python: %v: %s", err, out)
	}
	for _, what := range []string{"accepts", "refuses", "python", "age"} {
		if asked[what] == 0 {
			t.Errorf("nothing for %q", what)
		}
	}
}
