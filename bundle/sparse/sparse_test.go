package sparse_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/sparse"
)

func TestWriterRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 60 {
		var want []byte
		f, err := os.Create(filepath.Join(t.TempDir(), "f"))
		if err != nil {
			t.Fatal(err)
		}
		w := sparse.NewWriter(f)
		for range rng.IntN(12) {
			n := rng.IntN(3 * sparse.BlockSize)
			switch rng.IntN(3) {
			case 0:
				if err := w.Skip(int64(n)); err != nil {
					t.Fatal(err)
				}
				want = append(want, make([]byte, n)...)
			case 1:
				p := make([]byte, n)
				if k, err := w.Write(p); k != n || err != nil {
					t.Fatal(k, err)
				}
				want = append(want, p...)
			case 2:
				p := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, n)
				if k, err := w.Write(p); k != n || err != nil {
					t.Fatal(k, err)
				}
				want = append(want, p...)
			}
		}
		n, err := w.Finish()
		if err != nil || n != int64(len(want)) {
			t.Fatalf("round %d: Finish = %d, %v; want %d", round, n, err, len(want))
		}
		got, err := os.ReadFile(f.Name())
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("round %d: content differs (%v)", round, err)
		}
		m, err := sparse.Scan(int(f.Fd()), n)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Check(n); err != nil {
			t.Fatal(err)
		}
		back := make([]byte, n)
		r := sparse.NewReader(f, m)
		for _, e := range m {
			if _, err := io.ReadFull(r, back[e.Off:e.End()]); err != nil {
				t.Fatal(err)
			}
		}
		if k, err := r.Read(make([]byte, 1)); k != 0 || err != io.EOF {
			t.Fatalf("after the last extent: %d, %v", k, err)
		}
		if !bytes.Equal(back, want) {
			t.Fatalf("round %d: the map leaves data out", round)
		}
		f.Close()
	}
}

func TestWriterLeavesHoles(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := sparse.NewWriter(f)
	w.Write([]byte("begin"))
	w.Write(make([]byte, 64<<20))
	w.Write([]byte("end"))
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > 64<<10 {
		t.Errorf("64 MiB of zeros take %d bytes on disk", st.Blocks*512)
	}
}

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		m    sparse.Map
		size int64
		ok   bool
	}{
		"empty":        {nil, 0, true},
		"whole":        {sparse.Dense(10), 10, true},
		"touching":     {sparse.Map{{0, 5}, {5, 5}}, 10, true},
		"overlap":      {sparse.Map{{0, 6}, {5, 5}}, 10, false},
		"order":        {sparse.Map{{5, 5}, {0, 5}}, 10, false},
		"empty extent": {sparse.Map{{0, 0}}, 10, false},
		"negative":     {sparse.Map{{-1, 2}}, 10, false},
		"beyond":       {sparse.Map{{8, 3}}, 10, false},
		"overflow":     {sparse.Map{{8, 1<<63 - 1}}, 10, false},
	} {
		if err := c.m.Check(c.size); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
