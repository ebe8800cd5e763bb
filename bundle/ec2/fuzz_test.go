package ec2

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func addVectors(f *testing.F, add func(v *vector)) {
	f.Helper()
	paths, err := filepath.Glob(filepath.Join("testdata", "vectors", "*.txt"))
	if err != nil || len(paths) == 0 {
		f.Fatal("no vectors")
	}
	for i := 0; i < len(paths); i += 9 {
		data, err := os.ReadFile(paths[i])
		if err != nil {
			f.Fatal(err)
		}
		v, err := parseVector(data)
		if err != nil {
			f.Fatal(err)
		}
		add(v)
	}
}

// What is accepted says the same after being written and read again, and what
// is parsed is what a search for the signed bytes finds.
func FuzzManifest(f *testing.F) {
	addVectors(f, func(v *vector) { f.Add(v.doc) })
	for _, p := range []string{"ec2-full/web-1.0.manifest.xml", "euca-basic/fx.img.manifest.xml", "old-manifests/v3.manifest.xml"} {
		b, err := os.ReadFile(fixture(p))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseManifest(data)
		if err != nil {
			return
		}
		if !bytes.Equal(m.signed, rawSigned(data)) {
			t.Errorf("parsed %q, a search finds %q", m.signed, rawSigned(data))
		}
		n := *m
		doc, err := n.encode(nil)
		if err != nil {
			t.Fatal(err)
		}
		if m.Version == Version3 {
			doc = bytes.Replace(doc, []byte("<version>3<"), []byte("<version>20070829<"), 1)
		}
		got, err := ParseManifest(doc)
		if err != nil {
			t.Fatalf("written as %s: %v", doc, err)
		}
		// Mappings are sorted when written.
		opts := cmp.Options{
			cmpopts.IgnoreUnexported(Manifest{}), cmpopts.IgnoreFields(Manifest{}, "Signature", "Version"), cmpopts.EquateEmpty(),
			cmpopts.SortSlices(func(a, b Mapping) bool { return a.Virtual+"\x00"+a.Device < b.Virtual+"\x00"+b.Device }),
		}
		if d := cmp.Diff(m, got, opts); d != "" {
			t.Error(d)
		}
	})
}

func FuzzEncryptedManifest(f *testing.F) {
	fg := newForge(f)
	b, err := os.ReadFile(fixture("old-manifests", "encrypted-v2.manifest"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{1, 0})
	f.Add([]byte{2, 1, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := DecryptManifest(data, fg.user.key)
		if err == nil && len(doc) >= len(data) {
			t.Errorf("%d bytes decrypt to %d", len(data), len(doc))
		}
	})
}

// unstream runs the decoder over what inflates, if it is gzip at all.
func unstream(z []byte) ([]byte, error) {
	fg := forge{}
	var out bytes.Buffer
	err := UnbundleStream(context.Background(), StreamOptions{}, bytes.NewReader(fg.encrypted(z)), &limited{w: &out, left: 1 << 20})
	return out.Bytes(), err
}

type limited struct {
	w    *bytes.Buffer
	left int64
	n    int64
}

func (l *limited) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		return 0, io.ErrShortWrite
	}
	l.n += int64(len(p))
	return l.w.Write(p)
}

func (l *limited) Skip(n int64) error {
	if n > l.left {
		return io.ErrShortWrite
	}
	_, err := l.Write(make([]byte, n))
	return err
}

func (l *limited) Finish() (int64, error) { return l.n, nil }

// What the member-splitting reader accepts, compress/gzip reads as the same.
func FuzzMembers(f *testing.F) {
	fg := newForge(f)
	plain := fg.tar()
	var d deflater
	ours, err := d.member(nil, plain)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ours)
	f.Add(gzipped(plain))
	f.Add(append(ourMember(plain[:1000], 9), ourMember(plain[1000:], 1)...))
	f.Add(append(ourMember(plain[:1000], 9), gzipped(plain[1000:])...))
	f.Add(append(gzipped(plain[:1000]), ourMember(plain[1000:], 0)...))
	f.Fuzz(func(t *testing.T, z []byte) {
		img, err := unstream(z)
		if err != nil {
			return
		}
		r, err := gzip.NewReader(bytes.NewReader(z))
		if err != nil {
			t.Fatal(err)
		}
		all, err := io.ReadAll(io.LimitReader(r, 64<<20))
		if err != nil {
			t.Fatalf("accepted, but compress/gzip says %v", err)
		}
		again, err := unstream(gzipped(all))
		if err != nil || !bytes.Equal(img, again) {
			t.Errorf("read as one stream it is another image: %v", err)
		}
	})
}

// What the tar reader accepts as an old-GNU or plain member, archive/tar
// reads as the same file.
func FuzzTar(f *testing.F) {
	fg := newForge(f)
	f.Add(fg.tar()[:2048])
	for _, e := range []int64{512, 300} {
		m := member{name: "img", size: 700, mode: 0o644}
		m.data = m.data.Append(extent(0, e))
		f.Add(tarOf(m.header(), fg.image[:e])[:3072])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		img, err := unstream(gzipped(data))
		if err != nil {
			return
		}
		r := tar.NewReader(bytes.NewReader(data))
		h, err := r.Next()
		if err != nil || h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse && h.Typeflag != tar.TypeCont {
			return // archive/tar is stricter about fields that are not used here
		}
		want, err := io.ReadAll(r)
		if err == nil && !bytes.Equal(img, want) {
			t.Errorf("another file than archive/tar finds: %d bytes, %d bytes", len(img), len(want))
		}
	})
}
