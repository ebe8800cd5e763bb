package stored_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/stored"
)

var at = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// pieces are members of all sorts, and their bytes.
func pieces() ([]stored.Member, map[string][]byte) {
	bytesOf := map[string][]byte{
		"empty":                               {},
		"one":                                 {1},
		"block":                               bytes.Repeat([]byte("b"), 512),
		"packs/ab/" + strings.Repeat("c", 64): bytes.Repeat([]byte("pack"), 5000),
		strings.Repeat("long", 50):            []byte("a name that a short header does not hold"),
		"ünïcode":                             []byte("x"),
	}
	var l []stored.Member
	for _, n := range []string{"one", "empty", "block", "packs/ab/" + strings.Repeat("c", 64), strings.Repeat("long", 50), "ünïcode"} {
		sum := sha256.Sum256(bytesOf[n])
		m := stored.Member{Name: n, Size: int64(len(bytesOf[n])), SHA256: hex.EncodeToString(sum[:])}
		if n == "block" {
			old := sha1.Sum(bytesOf[n])
			m.SHA256, m.SHA1 = "", hex.EncodeToString(old[:])
		}
		l = append(l, m)
	}
	return l, bytesOf
}

func write(t testing.TB, head string, l []stored.Member, bytesOf map[string][]byte) ([]byte, error) {
	t.Helper()
	behind, err := stored.Lay(l, at)
	if err != nil {
		t.Fatal(err)
	}
	r, err := stored.NewReader(t.Context(), []byte(head), l, at, func(_ context.Context, m stored.Member) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(bytesOf[m.Name])), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	_, err = io.CopyBuffer(struct{ io.Writer }{&b}, struct{ io.Reader }{r}, make([]byte, 700))
	if err == nil && int64(b.Len()) != stored.HeadSize(len(head))+behind {
		t.Fatalf("%d bytes were announced, %d came", stored.HeadSize(len(head))+behind, b.Len())
	}
	return b.Bytes(), err
}

func dirStore(t testing.TB, object []byte) upload.Store {
	t.Helper()
	s, err := upload.OpenDir(t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if _, err := upload.PutBytes(t.Context(), s, "o", object, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestArchive: what is written is a tar archive that anybody's tar reads, and
// what is read of it is what was written.
func TestArchive(t *testing.T) {
	for _, head := range []string{"h", strings.Repeat("head", 128), strings.Repeat("a long head ", 40_000)} {
		l, bytesOf := pieces()
		object, err := write(t, head, l, bytesOf)
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(bytes.NewReader(object))
		for i := -1; i < len(l); i++ {
			h, err := tr.Next()
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(tr)
			want, name := head, stored.HeadName
			if i >= 0 {
				want, name = string(bytesOf[l[i].Name]), l[i].Name
			}
			if err != nil || h.Name != name || string(b) != want || h.Mode != 0o644 || !h.ModTime.Equal(at) {
				t.Fatalf("%s: %v, %d bytes, %v", name, h, len(b), err)
			}
		}
		if _, err := tr.Next(); err != io.EOF {
			t.Fatalf("behind the last member: %v", err)
		}
		o, err := stored.Open(t.Context(), dirStore(t, object), "o")
		if err != nil || string(o.Head) != head || o.Size != int64(len(object)) {
			t.Fatalf("the head has %d bytes, %v", len(o.Head), err)
		}
		v, err := o.View(l)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for obj, err := range v.List(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			n++
			got, _, err := upload.GetBytes(t.Context(), v, obj.Key, 1<<20)
			if err != nil || !bytes.Equal(got, bytesOf[obj.Key]) {
				t.Errorf("%s: %d bytes, %v", obj.Key, len(got), err)
			}
			for off := int64(0); off <= obj.Size; off += 100 {
				r, _, err := v.Get(t.Context(), obj.Key, upload.GetOptions{Offset: off, Length: 50})
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(r)
				want := bytesOf[obj.Key][off:min(off+50, obj.Size)]
				if err = errors.Join(err, r.Close()); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s from %d: %q, %v", obj.Key, off, got, err)
				}
			}
		}
		if n != len(l) {
			t.Errorf("%d are listed, not %d", n, len(l))
		}
	}
}

// TestDamage: a member that is not what its digest says, or too short, ends the
// writing; and what was changed in the object is not read.
func TestDamage(t *testing.T) {
	for name, change := range map[string]func(b []byte) []byte{
		"changed": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"cut":     func(b []byte) []byte { return b[:len(b)-1] },
	} {
		l, bytesOf := pieces()
		for _, m := range l {
			if m.Size == 0 {
				continue
			}
			kept := bytesOf[m.Name]
			bytesOf[m.Name] = change(bytes.Clone(kept))
			if _, err := write(t, "head", l, bytesOf); !errors.Is(err, stored.ErrDamaged) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s, %s: %v", m.Name, name, err)
			}
			bytesOf[m.Name] = kept
		}
	}
	l, bytesOf := pieces()
	object, err := write(t, "head", l, bytesOf)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range l {
		if m.Size == 0 {
			continue
		}
		bad := bytes.Clone(object)
		bad[stored.HeadSize(4)+m.Offset+m.Size-1] ^= 1
		o, err := stored.Open(t.Context(), dirStore(t, bad), "o")
		if err != nil {
			t.Fatal(err)
		}
		v, err := o.View(l)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := upload.GetBytes(t.Context(), v, m.Name, 1<<20); !errors.Is(err, stored.ErrDamaged) {
			t.Errorf("%s: %v", m.Name, err)
		}
	}
}

// TestHostileObjects: heads and members that an object cannot have.
func TestHostileObjects(t *testing.T) {
	l, bytesOf := pieces()
	object, err := write(t, "head", l, bytesOf)
	if err != nil {
		t.Fatal(err)
	}
	patch := func(at int, with string) []byte { b := bytes.Clone(object); copy(b[at:], with); return b }
	for name, b := range map[string][]byte{
		"empty": {}, "short": object[:511], "zeros": make([]byte, 4096), "another name": patch(0, "x"), "a longer name": patch(len(stored.HeadName), "x"),
		"a wrong sum": patch(100, "1"), "a head larger than the object": patch(124, "77777777777\x00"), "text": []byte(strings.Repeat("no archive ", 100)),
	} {
		if _, err := stored.Open(t.Context(), dirStore(t, b), "o"); !errors.Is(err, stored.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o, err := stored.Open(t.Context(), dirStore(t, object), "o")
	if err != nil {
		t.Fatal(err)
	}
	good := stored.Member{Name: "a", Offset: 512, Size: 1, SHA256: strings.Repeat("0", 64)}
	for name, change := range map[string]func(m *stored.Member){
		"before the front": func(m *stored.Member) { m.Offset = -1 }, "behind the end": func(m *stored.Member) { m.Offset = o.Size },
		"over the end": func(m *stored.Member) { m.Size = o.Size }, "an overflow": func(m *stored.Member) { m.Offset, m.Size = 1<<62, 1<<62 },
		"a negative size": func(m *stored.Member) { m.Size = -1 }, "out of the store": func(m *stored.Member) { m.Name = "../a" },
		"absolute": func(m *stored.Member) { m.Name = "/etc/passwd" }, "no name": func(m *stored.Member) { m.Name = "" },
		"no digest": func(m *stored.Member) { m.SHA256 = "" }, "two digests": func(m *stored.Member) { m.SHA1 = strings.Repeat("0", 40) },
		"capitals": func(m *stored.Member) { m.SHA256 = strings.Repeat("A", 64) }, "a short digest": func(m *stored.Member) { m.SHA256 = "00" },
	} {
		m := good
		change(&m)
		if _, err := o.View([]stored.Member{m}); !errors.Is(err, stored.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := good
	b.Name = "b"
	for name, l := range map[string][]stored.Member{"none": nil, "twice": {good, {Name: "a", Offset: 600, Size: 1, SHA256: good.SHA256}}, "over each other": {good, b}} {
		if _, err := o.View(l); !errors.Is(err, stored.ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	v, err := o.View([]stored.Member{good})
	if err != nil {
		t.Fatal(err)
	}
	_, perr := upload.PutBytes(t.Context(), v, "a", nil, upload.PutOptions{})
	_, serr := v.PutStream(t.Context(), "a", strings.NewReader(""), upload.PutOptions{})
	_, cerr := v.Copy(t.Context(), "b", "a", upload.PutOptions{})
	for _, err := range []error{perr, serr, cerr, v.Delete(t.Context(), "a")} {
		if !errors.Is(err, upload.ErrUnsupported) {
			t.Errorf("changing it: %v", err)
		}
	}
	if _, err := v.Stat(t.Context(), "c"); !errors.Is(err, upload.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

// TestLargeMembers: places of members that are larger than a short header says.
func TestLargeMembers(t *testing.T) {
	l := []stored.Member{{Name: "a", Size: 9 << 30}, {Name: "b", Size: 1 << 42}, {Name: "c", Size: 1}}
	behind, err := stored.Lay(l, at)
	if err != nil || l[0].Offset != 3*512 || l[1].Offset != l[0].Offset+9<<30+3*512 || l[2].Offset != l[1].Offset+1<<42+512 || behind != l[2].Offset+3*512 {
		t.Errorf("%+v, %d, %v", l, behind, err)
	}
	if _, err := stored.Lay([]stored.Member{{Name: "a", Size: 1 << 53}}, at); !errors.Is(err, stored.ErrFormat) {
		t.Errorf("too large: %v", err)
	}
	if _, err := stored.Lay(nil, at); !errors.Is(err, stored.ErrFormat) {
		t.Errorf("none: %v", err)
	}
}

// FuzzOpen: no object makes the reader of heads fail but in its own way, or read
// beyond the head.
func FuzzOpen(f *testing.F) {
	l, bytesOf := pieces()
	object, err := write(f, "head", l, bytesOf)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(object[:2048])
	f.Add([]byte(stored.HeadName + "\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := stored.Open(t.Context(), dirStore(t, b), "o")
		if err != nil {
			if !errors.Is(err, stored.ErrFormat) {
				t.Errorf("%v", err)
			}
			return
		}
		if len(o.Head) == 0 || !bytes.Contains(b, o.Head) {
			t.Errorf("a head of %d bytes", len(o.Head))
		}
		if v, err := o.View([]stored.Member{{Name: "a", Offset: int64(len(b)) / 2, Size: 10, SHA256: fmt.Sprintf("%064d", 0)}}); err == nil {
			if _, _, err := upload.GetBytes(t.Context(), v, "a", 100); err == nil {
				t.Error("a digest of zeros is right")
			}
		}
	})
}
