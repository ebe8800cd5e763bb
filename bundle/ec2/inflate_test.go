package ec2

import (
	"bytes"
	"compress/flate"
	"io"
	"math/rand/v2"
	"testing"

	kflate "github.com/klauspost/compress/flate"
)

// standard is what compress/flate makes of src: the bytes, and whether it is
// one complete stream and nothing else.
func standard(src []byte, limit int64) (out []byte, ok bool) {
	r := bytes.NewReader(src)
	out, err := io.ReadAll(io.LimitReader(flate.NewReader(r), limit+1))
	return out, err == nil && r.Len() == 0 && int64(len(out)) <= limit
}

func TestInflate(t *testing.T) {
	var s inflateState
	texts := map[string][]byte{
		"empty": nil, "one": []byte("x"), "run": bytes.Repeat([]byte("a"), 100_000), "zeros": make([]byte, memberSize),
		"mixed": patchwork(150_000, 1), "long distances": append(patchwork(32768, 5), patchwork(32768, 5)...),
	}
	r := rand.New(rand.NewPCG(3, 4))
	skewed := make([]byte, 60_000) // long codes: subtables
	for i := range skewed {
		skewed[i] = byte(min(255, int(r.ExpFloat64()*r.ExpFloat64()*9)))
	}
	texts["skewed"] = skewed
	for name, text := range texts {
		for level := -2; level <= 9; level++ {
			for _, maker := range []func(io.Writer) (io.WriteCloser, error){
				func(w io.Writer) (io.WriteCloser, error) { return flate.NewWriter(w, level) },
				func(w io.Writer) (io.WriteCloser, error) { return kflate.NewWriter(w, level) },
			} {
				var b bytes.Buffer
				w, err := maker(&b)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := w.Write(text); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				dst := make([]byte, len(text))
				if err := s.inflate(dst, b.Bytes()); err != nil || !bytes.Equal(dst, text) {
					t.Errorf("%s at level %d: %v", name, level, err)
				}
				if err := s.inflate(make([]byte, len(text)+1), b.Bytes()); err == nil {
					t.Errorf("%s at level %d: fills a byte more", name, level)
				}
				if len(text) > 0 {
					if err := s.inflate(dst[1:], b.Bytes()); err == nil {
						t.Errorf("%s at level %d: fits in a byte less", name, level)
					}
				}
				if err := s.inflate(dst, append(b.Bytes(), 0)); err == nil {
					t.Errorf("%s at level %d: takes a byte more", name, level)
				}
				for _, n := range []int{0, 1, b.Len() / 2, b.Len() - 1} {
					if err := s.inflate(dst, b.Bytes()[:n]); err == nil {
						t.Errorf("%s at level %d: content with %d of %d bytes", name, level, n, b.Len())
					}
				}
			}
		}
	}
}

// Every single-bit flip and many double ones of streams of each kind: the
// same verdict and the same bytes as compress/flate.
func TestInflateDamaged(t *testing.T) {
	var s inflateState
	text := append(patchwork(1500, 8), []byte("abcabcabcabcabcabcabcabc, and so on and so on")...)
	r := rand.New(rand.NewPCG(5, 6))
	for _, level := range []int{flate.NoCompression, flate.HuffmanOnly, 1, 6, 9} {
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(text[:700]); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(text[700:]); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		z := b.Bytes()
		for i := range 8 * len(z) {
			bad := bytes.Clone(z)
			bad[i/8] ^= 1 << (i % 8)
			compareInflate(t, &s, bad)
			j := r.IntN(8 * len(z))
			bad[j/8] ^= 1 << (j % 8)
			compareInflate(t, &s, bad)
		}
	}
}

func compareInflate(t *testing.T, s *inflateState, src []byte) {
	t.Helper()
	want, ok := standard(src, 1<<20)
	dst := make([]byte, len(want))
	err := s.inflate(dst, src)
	if (err == nil) != ok {
		t.Fatalf("%x: %v, but compress/flate says %v", src, err, ok)
	}
	if ok && !bytes.Equal(dst, want) {
		t.Fatalf("%x: other bytes than compress/flate", src)
	}
}

func FuzzInflate(f *testing.F) {
	for level := -2; level <= 9; level += 3 {
		var b bytes.Buffer
		w, err := flate.NewWriter(&b, level)
		if err != nil {
			f.Fatal(err)
		}
		if _, err := w.Write([]byte("hello hello hello, this is a test, is it not? hello")); err != nil {
			f.Fatal(err)
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, src []byte) { compareInflate(t, new(inflateState), src) })
}

func BenchmarkInflate(b *testing.B) {
	var d deflater
	raw := patchwork(memberSize, 3)
	z, err := d.member(nil, raw)
	if err != nil {
		b.Fatal(err)
	}
	var in inflater
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if err := in.member(raw, z); err != nil {
			b.Fatal(err)
		}
	}
}
