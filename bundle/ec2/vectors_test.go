package ec2

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The vectors in testdata/vectors are for anybody who writes a reader of EC2
// bundles: each is a bundle with at most one thing wrong, and says what a
// reader is to make of it. Format: lines "field: value", an empty line, then
// one line for each object, the manifest's NAME being "manifest":
// "text NAME content" or "base64 NAME content". Where several classes are
// right, since a reader may notice one thing or the other first, they are
// joined by "|". `go test -run TestVectors -update` makes them anew from the
// tables in cases_*_test.go.
var update = flag.Bool("update", false, "write testdata/vectors anew")

// A vector is a test case in memory and in a file.
type vector struct {
	name    string // "family/what"
	comment string
	expect  string // "ok" or a class of classNames
	open    string // who opens: user, ec2
	trust   string // who is trusted: user, ec2, both, "" (the opener)
	allow   bool   // accept UNSIGNED
	sha256  string // of the image, if ok
	bundle
}

var classNames = map[string]error{
	"format": ErrFormat, "truncated": ErrTruncated, "too new": ErrTooNew, "too old": ErrTooOld,
	"signature": ErrSignature, "unsigned": ErrUnsigned, "digest": ErrDigest, "size": ErrSize,
	"key": ErrKey, "limit": ErrLimit, "missing": fs.ErrNotExist,
}

func (v *vector) fileName() string {
	return strings.NewReplacer("/", "-", " ", "-", "<", "", ">", "").Replace(v.name) + ".txt"
}

func (v *vector) marshal() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "comment: %s\nexpect: %s\nopen: %s\ntrust: %s\nallow-unsigned: %v\nimage-sha256: %s\n\n", v.comment, v.expect, v.open, v.trust, v.allow, v.sha256)
	if bytes.ContainsFunc(v.doc, func(r rune) bool { return r < ' ' || r > '~' }) {
		fmt.Fprintf(&b, "base64 manifest %s\n", base64.StdEncoding.EncodeToString(v.doc))
	} else {
		fmt.Fprintf(&b, "text manifest %s\n", v.doc)
	}
	for _, name := range slices.Sorted(maps.Keys(v.parts)) {
		fmt.Fprintf(&b, "base64 %s %s\n", name, base64.StdEncoding.EncodeToString(v.parts[name]))
	}
	return b.Bytes()
}

func readVector(t *testing.T, path string) *vector {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	v, err := parseVector(data)
	if err != nil {
		t.Fatal(err)
	}
	v.name = filepath.Base(path)
	return v
}

func parseVector(data []byte) (*vector, error) {
	v := &vector{bundle: bundle{parts: make(map[string][]byte)}}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		field, value, _ := strings.Cut(line, ": ")
		if doc, ok := strings.CutPrefix(line, "text manifest "); ok {
			v.doc = []byte(doc)
		} else if obj, ok := strings.CutPrefix(line, "base64 "); ok {
			name, b64, _ := strings.Cut(obj, " ")
			content, err := base64.StdEncoding.DecodeString(b64)
			if err != nil {
				return nil, err
			}
			if name == "manifest" {
				v.doc = content
			} else {
				v.parts[name] = content
			}
		} else {
			switch field {
			case "comment":
				v.comment = value
			case "expect":
				v.expect = value
			case "open":
				v.open = value
			case "trust":
				v.trust = value
			case "allow-unsigned":
				v.allow = value == "true"
			case "image-sha256":
				v.sha256 = value
			}
		}
	}
	return v, nil
}

// run opens the bundle into a file in dir, as the commands do.
func (v *vector) run(ctx context.Context, f *forge, path string) error {
	o := UnbundleOptions{Key: f.user.key, AllowUnsigned: v.allow}
	if v.open == "ec2" {
		o.Key = f.cloud.key
	}
	switch v.trust {
	case "user":
		o.Trust = []*rsa.PublicKey{f.user.pub()}
	case "ec2":
		o.Trust = []*rsa.PublicKey{f.cloud.pub()}
	case "both":
		o.Trust = []*rsa.PublicKey{f.cloud.pub(), f.user.pub()}
	}
	doc := v.doc
	if IsEncryptedManifest(doc) {
		var err error
		if doc, err = DecryptManifest(doc, o.Key); err != nil {
			return err
		}
	}
	m, err := ParseManifest(doc)
	if err != nil {
		return err
	}
	return UnbundleFile(ctx, o, m, mapSource(v.parts), path)
}

type mapSource map[string][]byte

func (s mapSource) OpenPart(_ context.Context, name string) (io.ReadCloser, error) {
	b, ok := s[name]
	if !ok {
		return nil, fmt.Errorf("part %q: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// check runs v and holds the outcome against what it says: the class of the
// error, or the image; and nothing left behind where there is no image.
func (v *vector) check(t *testing.T, f *forge) {
	t.Helper()
	dir := t.TempDir()
	err := v.run(t.Context(), f, filepath.Join(dir, "image"))
	if v.expect == "ok" {
		if err != nil {
			t.Fatalf("%s: %v", v.comment, err)
		}
		img, err := os.ReadFile(filepath.Join(dir, "image"))
		if err != nil {
			t.Fatal(err)
		}
		if got := sha256Hex(img); got != v.sha256 {
			t.Errorf("%s: image has SHA-256 %s, want %s", v.comment, got, v.sha256)
		}
		return
	}
	got := "none"
	for name, class := range classNames {
		if errors.Is(err, class) {
			if got != "none" {
				t.Errorf("%s: %v is of class %q and %q", v.comment, err, got, name)
			}
			got = name
		}
	}
	if !slices.Contains(strings.Split(v.expect, "|"), got) {
		t.Errorf("%s: got %v of class %q, want class %q", v.comment, err, got, v.expect)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%s: left behind %v, %v", v.comment, left, err)
	}
}

func TestVectors(t *testing.T) {
	f := newForge(t)
	dir := filepath.Join("testdata", "vectors")
	if *update {
		writeVectors(t, f, dir)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 200 {
		t.Errorf("%d vectors, want at least 200", len(files))
	}
	for _, path := range files {
		v := readVector(t, path)
		t.Run(strings.TrimSuffix(v.name, ".txt"), func(t *testing.T) { v.check(t, f) })
	}
}

func writeVectors(t *testing.T, f *forge, dir string) {
	t.Helper()
	old, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	seen := make(map[string]bool)
	for _, v := range f.cases(t) {
		if v.open == "" {
			v.open = "user"
		}
		if v.expect == "ok" && v.sha256 == "" {
			v.sha256 = sha256Hex(f.image)
		}
		if seen[v.fileName()] {
			t.Errorf("two vectors called %s", v.fileName())
		}
		seen[v.fileName()] = true
		if err := os.WriteFile(filepath.Join(dir, v.fileName()), v.marshal(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
